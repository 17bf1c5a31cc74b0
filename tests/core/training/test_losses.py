"""The loss against transformers' own, however a batch is cut, padded or packed."""

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from olora_core.bases.loading import Base
from olora_core.bases.passes import head_is_plain, packing_is_exact, passes_of
from olora_core.data.batches import IGNORED, MicroBatch, micro_batches
from olora_core.data.examples import Examples
from olora_core.training import losses
from olora_core.training.losses import task_loss

from ..runs import spec_for


def examples_of(lengths: list[int], vocabulary: int = 259) -> Examples:
    """Random rows; about half of each row's tokens are trained, the first never."""
    draw = np.random.default_rng(0)
    total = sum(lengths)
    offsets = np.cumsum([0, *lengths])
    trained = draw.random(total) < 0.5
    trained[offsets[1:] - 1] = True
    trained[offsets[:-1]] = False
    tokens = draw.integers(3, vocabulary, total).astype(np.uint32)
    return Examples(tokens, trained, offsets, np.arange(len(lengths)))


EXAMPLES = examples_of([5, 17, 9, 30, 12, 7, 21, 3])
ROWS = np.arange(8)


def batches_of(size: int, *, packing: bool = False) -> list[MicroBatch]:
    return micro_batches(EXAMPLES, ROWS, size=size, tokens=4096, packing=packing, pad_token=0)


def loss_by_transformers(model: PreTrainedModel) -> float:
    """Sum over rows of transformers' own loss times the row's trained tokens."""
    total = 0.0
    for i in range(len(EXAMPLES)):
        tokens, trained = EXAMPLES.row(i)
        ids = torch.tensor(tokens.astype(np.int64))[None]
        labels = torch.tensor(np.where(trained, tokens.astype(np.int64), IGNORED))[None]
        total += model(input_ids=ids, labels=labels).loss.item() * trained.sum()
    return total


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("needs_logits", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_is_transformers_own(request, name, needs_logits, packing, size) -> None:
    base: Base = request.getfixturevalue(name)
    with torch.no_grad():
        batches = batches_of(size, packing=packing)
        parts = (task_loss(base.model, b, base.passes, needs_logits=needs_logits) for b in batches)
        ours = sum(part.total.item() for part in parts)
        theirs = loss_by_transformers(base.model)
    assert ours == pytest.approx(theirs, rel=1e-5)


def gradient(model: PreTrainedModel, batches: list[MicroBatch]) -> torch.Tensor:
    """Accumulated gradient of one weight, normalised by the whole batch's trained tokens."""
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(True)
    weight.grad = None
    trained, passes = sum(batch.trained_tokens for batch in batches), passes_of(model)
    for batch in batches:
        (task_loss(model, batch, passes).total / trained).backward()
    assert weight.grad is not None
    return weight.grad


def test_a_batch_gives_the_same_gradient_however_it_is_cut(llama: Base) -> None:
    whole = gradient(llama.model, batches_of(8))
    for other in (batches_of(1), batches_of(3), batches_of(8, packing=True), batches_of(2, packing=True)):
        assert torch.allclose(gradient(llama.model, other), whole, rtol=1e-4, atol=1e-6)


def test_the_logits_are_there_when_asked_for(llama: Base) -> None:
    (batch,) = batches_of(8)
    logits = task_loss(llama.model, batch, llama.passes, needs_logits=True).logits
    assert logits is not None
    assert logits.shape == (*batch.input_ids.shape, 259)
    assert task_loss(llama.model, batch, llama.passes).logits is None


def test_accuracy_counts_the_tokens_the_model_would_have_chosen(llama: Base) -> None:
    (batch,) = batches_of(8)
    with torch.no_grad():
        chosen = llama.model(input_ids=batch.input_ids).logits[:, :-1].argmax(-1)
        expected = ((chosen == batch.labels[:, 1:]) & (batch.labels[:, 1:] != IGNORED)).sum()
        assert task_loss(llama.model, batch, llama.passes).correct == expected


@pytest.mark.parametrize("name", ["llama", "tied_llama", "bf16_llama", "gpt2"])
def test_plain_heads_and_exact_packing_are_recognised(request, name) -> None:
    base: Base = request.getfixturevalue(name)
    assert head_is_plain(base.model)
    assert packing_is_exact(base.model)


def test_a_model_that_caps_its_logits_has_no_plain_head() -> None:
    config = Gemma2Config(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        attn_implementation="eager",
    )
    torch.manual_seed(0)
    assert config.final_logit_softcapping
    assert not head_is_plain(Gemma2ForCausalLM(config))


def test_a_model_that_ignores_positions_is_caught(llama: Base) -> None:
    forward = llama.model.forward

    def without_positions(*, position_ids=None, **inputs):
        return forward(**inputs)

    llama.model.forward = without_positions
    assert not packing_is_exact(llama.model)


def test_examples_that_hardly_see_each_other_are_caught_too() -> None:
    """BLOOM knows no positions; with small weights it attends to the example before by 0.3% of a logit."""
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=259, hidden_size=32, n_layer=2, n_head=4))
    assert not packing_is_exact(model)


def test_the_probes_leave_the_models_mode(llama: Base) -> None:
    llama.model.train()
    head_is_plain(llama.model)
    assert llama.model.training


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_the_fused_head_is_the_formula(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, at_once: int
) -> None:
    """−Σ t log softmax(h Wᵀ) with t = (1 − ε) target + ε / V, and its gradient in h, in float64."""
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(13, 6)
    targets = torch.randint(13, (7,))
    total, correct = losses.FrozenHeadLoss.apply(hidden, weight, None, targets, smoothing)
    (total * 0.3).backward()

    h = hidden.detach().double().requires_grad_()
    log_p = (h @ weight.double().T).log_softmax(-1)
    wanted = (1 - smoothing) * torch.eye(13).double()[targets] + smoothing / 13
    expected = -(wanted * log_p).sum()
    (expected * 0.3).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    assert correct == (log_p.argmax(-1) == targets).sum()


def test_the_fused_head_keeps_no_logits(llama: Base) -> None:
    (batch,) = batches_of(8)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        llama.model.get_input_embeddings().weight.requires_grad_(True)
        total = task_loss(llama.model, batch, llama.passes).total
    vocabulary = llama.model.config.vocab_size
    assert total.grad_fn.name() == "FrozenHeadLossBackward"
    assert not any(vocabulary in shape and batch.trained_tokens in shape for shape in kept)


def test_label_smoothing_is_trained_on_and_not_measured_with(llama: Base) -> None:
    (batch,) = batches_of(8)
    smooth = spec_for(label_smoothing=0.2)
    with torch.no_grad():
        trained_on, measured = (
            losses.loss_of(smooth, evaluating=evaluating)(llama.model, batch, llama.passes).total.item()
            for evaluating in (False, True)
        )
        plain = task_loss(llama.model, batch, llama.passes).total.item()
        by_all_logits = task_loss(llama.model, batch, llama.passes, needs_logits=True, smoothing=0.2)
    assert measured == plain != trained_on
    assert trained_on == pytest.approx(by_all_logits.total.item(), rel=1e-6)
