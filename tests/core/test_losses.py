"""The loss against transformers' own, however a batch is cut, padded or packed."""

import numpy as np
import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from olora_core.batches import IGNORED, MicroBatch, micro_batches
from olora_core.examples import Examples
from olora_core.losses import head_is_plain, packing_is_exact, task_loss
from olora_core.model import Base


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
    return list(micro_batches(EXAMPLES, ROWS, size=size, packing=packing, pad_token=0))


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
@pytest.mark.parametrize("every_logit", [False, True])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_is_transformers_own(request, name, every_logit, packing, size) -> None:
    base: Base = request.getfixturevalue(name)
    with torch.no_grad():
        batches = batches_of(size, packing=packing)
        ours = sum(task_loss(base.model, b, every_logit=every_logit).total.item() for b in batches)
        theirs = loss_by_transformers(base.model)
    assert ours == pytest.approx(theirs, rel=1e-5)


def gradient(model: PreTrainedModel, batches: list[MicroBatch]) -> torch.Tensor:
    """Accumulated gradient of one weight, normalised by the whole batch's trained tokens."""
    weight = model.get_decoder().layers[0].self_attn.q_proj.weight.requires_grad_(True)
    weight.grad = None
    trained = sum(batch.trained_tokens for batch in batches)
    for batch in batches:
        (task_loss(model, batch, every_logit=False).total / trained).backward()
    assert weight.grad is not None
    return weight.grad


def test_a_batch_gives_the_same_gradient_however_it_is_cut(llama: Base) -> None:
    whole = gradient(llama.model, batches_of(8))
    for other in (batches_of(1), batches_of(3), batches_of(8, packing=True), batches_of(2, packing=True)):
        assert torch.allclose(gradient(llama.model, other), whole, rtol=1e-4, atol=1e-6)


def test_the_logits_are_there_when_asked_for(llama: Base) -> None:
    (batch,) = batches_of(8)
    logits = task_loss(llama.model, batch, every_logit=True).logits
    assert logits is not None
    assert logits.shape == (*batch.input_ids.shape, 259)
    assert task_loss(llama.model, batch, every_logit=False).logits is None


def test_accuracy_counts_the_tokens_the_model_would_have_chosen(llama: Base) -> None:
    (batch,) = batches_of(8)
    with torch.no_grad():
        chosen = llama.model(input_ids=batch.input_ids).logits[:, :-1].argmax(-1)
        expected = ((chosen == batch.labels[:, 1:]) & (batch.labels[:, 1:] != IGNORED)).sum()
        assert task_loss(llama.model, batch, every_logit=False).correct == expected


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
