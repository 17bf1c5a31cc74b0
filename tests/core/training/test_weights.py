"""The weighted loss against a float64 formula, in single passes and in whole runs."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from olora_core.bases.loading import Base, load_base
from olora_core.data.batches import MicroBatch, epoch_order, micro_batches
from olora_core.data.example_files import ExampleWriter, open_examples
from olora_core.data.examples import Examples
from olora_core.progress import Evaluated, Finished, Progress, Samples, Saved, Step, result_of
from olora_core.training import losses
from olora_core.training.data import read_data
from olora_core.training.evaluate import evaluate
from olora_core.training.losses import task_loss
from olora_core.training.train import train

from ..runs import chat_rows, one, spec_for, write_rows
from .test_losses import EXAMPLES, ROWS

CHOICES = np.array([1, 0.5, 0.3, 0.05], dtype=np.float32)


def weighted(examples: Examples) -> Examples:
    """The same examples with a weight for each trained token; about a row in four keeps 1 throughout."""
    draw = np.random.default_rng(1)
    weights = draw.choice(CHOICES, len(examples.tokens)) * examples.trained
    for i in range(1, len(examples), 4):
        part = slice(examples.offsets[i], examples.offsets[i + 1])
        weights[part] = examples.trained[part]
    return replace(examples, token_weights=weights.astype(np.float32), known_digest=None)


def halved(examples: Examples) -> Examples:
    return replace(examples, token_weights=examples.trained.astype(np.float32) / 2, known_digest=None)


MIXED = weighted(EXAMPLES)


def batches_of(examples: Examples, size: int, *, packing: bool = False) -> list[MicroBatch]:
    return micro_batches(examples, ROWS, size=size, tokens=4096, packing=packing, pad_token=0)


def trained_weight(model: Any) -> Tensor:
    """One weight of the model, whose gradient is looked at."""
    blocks = model.transformer.h if hasattr(model, "transformer") else model.get_decoder().layers
    first = blocks[0].attn.c_attn if hasattr(blocks[0], "attn") else blocks[0].self_attn.q_proj
    first.weight.grad = None
    return first.weight.requires_grad_(True)


def by_formula(model: Any, examples: Examples, smoothing: float = 0.0) -> tuple[float, Tensor]:
    """Σ w t · −log softmax over Σ w, in float64, row by row, with its gradient.

    t is 1 − smoothing at the token, plus smoothing / V everywhere.
    """
    model = copy.deepcopy(model).double()
    weight = trained_weight(model)
    total = torch.zeros((), dtype=torch.float64)
    for start, end in zip(examples.offsets[:-1], examples.offsets[1:], strict=True):
        ids = torch.tensor(examples.tokens[start:end].astype(np.int64))
        w = torch.tensor(examples.token_weights[start:end].astype(np.float64))
        log_p = model(input_ids=ids[None]).logits[0, :-1].log_softmax(-1)
        of_tokens = (1 - smoothing) * log_p.gather(1, ids[1:, None])[:, 0] + smoothing * log_p.mean(-1)
        total = total - (w[1:] * of_tokens).sum()
    mean = total / examples.token_weights.astype(np.float64).sum()
    mean.backward()
    return mean.item(), weight.grad


def by_ours(
    base: Base, examples: Examples, batches: list[MicroBatch], **options: Any
) -> tuple[float, Tensor]:
    """The same from the micro-batches, each divided by the weight of the whole batch."""
    weight, total, loss = trained_weight(base.model), examples.weights[ROWS].sum().item(), 0.0
    for batch in batches:
        part = task_loss(base.model, batch, base.passes, **options).total / total
        part.backward()
        loss += part.item()
    return loss, weight.grad


@pytest.mark.parametrize("name", ["llama", "tied_llama", "gpt2"])
@pytest.mark.parametrize("needs_logits", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradient_are_the_formula_however_a_batch_is_cut(
    request, name, needs_logits, smoothing
) -> None:
    base: Base = request.getfixturevalue(name)
    expected, gradient = by_formula(base.model, MIXED, smoothing)
    for size in (1, 3, 8):
        for packing in (False, True):
            batches = batches_of(MIXED, size, packing=packing)
            loss, ours = by_ours(base, MIXED, batches, needs_logits=needs_logits, smoothing=smoothing)
            assert loss == pytest.approx(expected, rel=1e-6)
            assert torch.allclose(ours.double(), gradient, rtol=1e-4, atol=1e-7)


def test_the_formula_tells_weights_apart(llama: Base) -> None:
    """The tolerances above are far below what the weights change."""
    plain = replace(EXAMPLES, token_weights=EXAMPLES.trained.astype(np.float32))
    (mixed, of_mixed), (even, of_even) = (by_formula(llama.model, each) for each in (MIXED, plain))
    assert abs(mixed - even) > 1e-3
    assert not torch.allclose(of_mixed, of_even, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bf16_llama"])
@pytest.mark.parametrize("packing", [False, True])
def test_one_weight_for_everything_changes_not_a_bit(request, name, packing) -> None:
    base: Base = request.getfixturevalue(name)
    found = []
    for examples in (EXAMPLES, halved(EXAMPLES)):
        loss, gradient = by_ours(base, examples, batches_of(examples, 3, packing=packing))
        found.append((loss, gradient.clone()))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("at_once", [1, 40, 10**6])
def test_the_fused_head_is_the_weighted_formula(
    monkeypatch: pytest.MonkeyPatch, smoothing: float, at_once: int
) -> None:
    monkeypatch.setattr(losses, "LOGITS_AT_ONCE", at_once)
    torch.manual_seed(0)
    hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(13, 6)
    targets, weights = torch.randint(13, (7,)), torch.rand(7)
    total, correct = losses.FrozenHeadLoss.apply(hidden, weight, None, targets, smoothing, weights)
    (total * 0.3).backward()

    h = hidden.detach().double().requires_grad_()
    log_p = (h @ weight.double().T).log_softmax(-1)
    wanted = (1 - smoothing) * torch.eye(13).double()[targets] + smoothing / 13
    expected = -(weights.double()[:, None] * wanted * log_p).sum()
    (expected * 0.3).backward()
    assert total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert torch.allclose(hidden.grad.double(), h.grad, rtol=1e-5, atol=1e-6)
    assert correct == (log_p.argmax(-1) == targets).sum()


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_an_evaluation_is_the_weighted_mean_and_its_accuracy_counts_tokens(llama, packing, size) -> None:
    options: dict[str, Any] = {"size": size, "tokens": 4096, "packing": packing}
    loss, accuracy = result_of(evaluate(llama, MIXED, **options))
    plain_loss, plain_accuracy = result_of(evaluate(llama, EXAMPLES, **options))
    assert loss == pytest.approx(by_formula(llama.model, MIXED)[0], rel=1e-6)
    assert loss != pytest.approx(plain_loss, rel=1e-4)
    assert accuracy == plain_accuracy


# --- runs ----------------------------------------------------------------------------------------------


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows())


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "validation.jsonl", chat_rows(20)[11:])


Change = Callable[[Examples], Examples]


def cache_with(
    change: Change, base: Base, training: Path, validation: Path | None, cache: Path
) -> dict[str, Examples]:
    """Tokenises the files into `cache`, and replaces the entries with changed examples; by their role."""
    data = result_of(read_data(spec_for(), base, training, validation, cache))
    by_digest = {data.training.digest: "training"}
    if data.validation is not None:
        by_digest[data.validation.digest] = "validation"
    changed = {}
    for entry in list(cache.iterdir()):
        examples, about = open_examples(entry)
        role, made = by_digest[examples.digest], change(examples)
        with_weights = cache.parent / "with weights"
        with_weights.mkdir()
        with ExampleWriter(with_weights, len(base.tokenizer)) as writer:
            for i in range(len(made)):
                writer.add(int(made.lines[i]), made.example(i))
            writer.finish(writer.examples(), about)
        shutil.rmtree(entry)
        with_weights.rename(entry)
        changed[role] = open_examples(entry)[0]
    return changed


@pytest.fixture
def run(llama: Base, training: Path, tmp_path: Path) -> Callable[..., list[Progress]]:
    """A run on the training file's rows, changed."""

    def run_it(change: Change, validation: Path | None = None, **options: Any) -> list[Progress]:
        cache = tmp_path / change.__name__
        if not cache.exists():
            cache_with(change, llama, training, validation, cache)
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        return list(train(spec_for(**options), llama, training, validation, folder, cache=cache))

    return run_it


def unchanged(examples: Examples) -> Examples:
    return examples


def test_the_first_steps_loss_is_the_weighted_mean_of_its_rows(llama, training, tmp_path, run) -> None:
    (examples,) = cache_with(weighted, llama, training, None, tmp_path / "weighted").values()
    rows = epoch_order(len(examples), seed=5, epoch=0)[:4]
    expected, _ = by_formula(llama.model, examples.select(rows))
    step = next(update for update in run(weighted) if isinstance(update, Step))
    assert step.loss == pytest.approx(expected, rel=1e-6)
    assert step.trained_tokens == examples.trained_lengths[rows].sum()
    plain = next(update for update in run(unchanged) if isinstance(update, Step))
    assert step.accuracy == plain.accuracy
    assert step.loss != pytest.approx(plain.loss, rel=1e-4)


def test_padding_packing_and_micro_batches_make_no_difference(run) -> None:
    found = [
        [update.loss for update in run(weighted, packing=packing, micro_batch_size=size) if is_step(update)]
        for packing, size in ((False, 4), (True, 4), (False, 1), (True, 2))
    ]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def is_step(update: Progress) -> bool:
    return isinstance(update, Step)


def weights_of(updates: list[Progress]) -> dict[str, Tensor]:
    return load_file(one(Finished, updates).folder / "adapter_model.safetensors")


def test_a_run_with_half_of_every_weight_is_the_run_without(run) -> None:
    whole, half = run(unchanged), run(halved)
    assert [u.loss for u in half if is_step(u)] == [u.loss for u in whole if is_step(u)]
    before, after = weights_of(whole), weights_of(half)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_noise_of_neftune_does_not_depend_on_the_weights(run) -> None:
    whole, half = (run(change, neftune_alpha=5) for change in (unchanged, halved))
    assert [u.loss for u in half if is_step(u)] == [u.loss for u in whole if is_step(u)]


def test_a_run_reports_weighted_losses(llama, training, validation, tmp_path, run) -> None:
    examples = cache_with(weighted, llama, training, validation, tmp_path / "weighted")
    updates = run(weighted, validation, n_epochs=1)
    metrics = one(Finished, updates).metrics
    before = next(update for update in updates if isinstance(update, Evaluated))
    assert before.loss == pytest.approx(by_formula(llama.model, examples["validation"])[0], rel=1e-6)
    assert metrics["valid_loss_before"] == before.loss
    order = epoch_order(11, seed=5, epoch=0)
    parts = [order[:4], order[4:8], order[8:]]
    token_weights, offsets = examples["training"].token_weights, examples["training"].offsets
    sums = [sum(token_weights[offsets[i] : offsets[i + 1]].sum(dtype=float) for i in rows) for rows in parts]
    losses = [update.loss for update in updates if isinstance(update, Step)]
    assert metrics["train_loss"] == pytest.approx(np.average(losses, weights=sums), rel=1e-9)
    counts = [examples["training"].trained_lengths[rows].sum() for rows in parts]
    accuracies = [update.accuracy for update in updates if isinstance(update, Step)]
    assert metrics["train_accuracy"] == pytest.approx(np.average(accuracies, weights=counts), rel=1e-9)


def test_sample_answers_are_asked_the_same_of_weighted_rows(run) -> None:
    asked = [
        [(row["line"], row["prompt"], row["reference"]) for row in one(Samples, run(change, samples=3)).rows]
        for change in (unchanged, weighted)
    ]
    assert asked[0] == asked[1]


def test_a_resumed_run_gives_the_bytes_of_an_unbroken_one(
    llama, training, validation, tmp_path, base_folders, run
) -> None:
    whole = run(weighted, validation)
    broken, cache = tmp_path / "broken", tmp_path / "weighted"
    going = train(spec_for(), llama, training, validation, broken, cache=cache)
    update = next(going)
    while not isinstance(update, Saved):
        stop = isinstance(update, Step) and update.step == 2
        update = going.send("save" if stop else None)
    going.close()
    assert update.step == 2
    base = load_base(base_folders["llama"], name="tiny-llama")
    rest = list(train(spec_for(), base, training, validation, broken, cache=cache, resume=update.folder))
    assert [u.loss for u in rest if is_step(u)] == [u.loss for u in whole if is_step(u)][2:]
    kept, again = weights_of(whole), weights_of(rest)
    assert all(torch.equal(kept[name], again[name]) for name in kept)
    metrics = [one(Finished, updates).metrics for updates in (whole, rest)]
    timed = ("seconds", "tokens_per_second", "peak_memory_bytes")
    assert json.dumps([{k: v for k, v in m.items() if k not in timed} for m in metrics[:1]]) == json.dumps(
        [{k: v for k, v in m.items() if k not in timed} for m in metrics[1:]]
    )
