"""NEFTune's noise: how large it is, where it is, and above all where it is not."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers.integrations.neftune import neftune_post_forward_hook

from olora_core import methods
from olora_core.bases.loading import Base
from olora_core.errors import SpecError
from olora_core.methods.lora import LoRA
from olora_core.progress import Evaluated, Finished, Progress, Resolved, Step
from olora_core.specs import read_spec
from olora_core.training.neftune import with_noise
from olora_core.training.randomness import Randomness

from ..runs import chat_rows, losses, spec_for, train, write_rows

ALPHA, WIDTH = 5.0, 32


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    rows = chat_rows(16)
    return write_rows(tmp_path / "training.jsonl", rows[:11]), write_rows(
        tmp_path / "validation.jsonl", rows[11:]
    )


@dataclass
class Forwards:
    """Of each forward pass, in training mode or not: the tokens, and what was added to their embeddings."""

    training: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    other: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def of(self, run: Iterable[Progress]) -> list[Progress]:
        """All that a run says; without the passes that the memory estimate measures."""
        updates = []
        for progress in run:
            updates.append(progress)
            if isinstance(progress, Resolved):
                self.training.clear()
                self.other.clear()
        return updates


@contextmanager
def watched(base: Base) -> Iterator[Forwards]:
    """Looks at what goes into the first block, with hooks of its own."""
    seen, ids = Forwards(), []
    embedding, block = base.model.get_input_embeddings(), base.model.model.layers[0]

    def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        ids[:] = inputs

    def reach(module: nn.Module, inputs: tuple[Tensor, ...], options: Any) -> None:
        hidden = inputs[0] if inputs else options["hidden_states"]
        added = (hidden - embedding.weight[ids[0]]).detach()
        (seen.training if base.model.training else seen.other).append((ids[0].clone(), added))

    hooks = [
        embedding.register_forward_pre_hook(enter),
        block.register_forward_pre_hook(reach, with_kwargs=True),
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def segments(ids: Tensor, base: Base) -> Iterator[tuple[int, slice]]:
    """Row and place of each example: the padding is cut off, and a second question begins another example."""
    turn = base.tokenizer.convert_tokens_to_ids("<|im_start|>")
    for row in range(ids.shape[0]):
        length = int((ids[row] != base.padding).nonzero().max()) + 1
        starts = [i for i in range(length) if ids[row, i] == turn][::2]
        for start, end in zip(starts, [*starts[1:], length], strict=True):
            yield row, slice(start, end)


@pytest.mark.parametrize("packing", [False, True])
def test_each_example_gets_noise_by_its_own_length(llama, files, tmp_path, packing) -> None:
    spec = spec_for(neftune_alpha=ALPHA, packing=packing, n_epochs=6)
    with watched(llama) as seen:
        seen.of(train(spec, llama, files[0], None, tmp_path / "run"))
    shares, lengths = [], set()
    for ids, added in seen.training:
        for row, place in segments(ids, llama):
            length = place.stop - place.start
            bound = ALPHA / (length * WIDTH) ** 0.5
            noise = added[row, place]
            assert 0.97 * bound < noise.abs().max() <= bound * (1 + 1e-4)
            shares.append(noise / bound)
            lengths.add(length)
    assert len(shares) == 6 * 11
    assert len(lengths) > 3
    drawn = torch.cat(shares).flatten()  # uniform in ±1: mean 0, variance 1/3
    assert abs(drawn.mean()) < 5 * (1 / 3 / len(drawn)) ** 0.5
    assert drawn.var() == pytest.approx(1 / 3, rel=0.02)


def test_a_row_of_its_own_gets_transformers_noise(llama, files, tmp_path) -> None:
    """Theirs counts padding as tokens, so the comparison needs rows without."""
    spec = spec_for(neftune_alpha=ALPHA, micro_batch_size=1, batch_size=1, max_steps=1, seed=3, packing=False)
    with watched(llama) as seen:
        seen.of(train(spec, llama, files[0], None, tmp_path / "run"))
    ((ids, added),) = seen.training
    theirs = nn.Embedding.from_pretrained(llama.model.get_input_embeddings().weight.detach().clone())
    theirs.neftune_noise_alpha = ALPHA
    theirs.register_forward_hook(neftune_post_forward_hook)
    Randomness(3, ids.device).begin(step=1, position=0)
    expected = theirs(ids) - theirs.weight[ids]
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-6)


def test_only_training_sees_it(llama, files, tmp_path) -> None:
    before = {name: tensor.clone() for name, tensor in llama.model.state_dict().items()}
    with watched(llama) as seen:
        updates = seen.of(train(spec_for(neftune_alpha=ALPHA), llama, *files, tmp_path / "noisy"))
    assert len(seen.training) == 12
    assert all(added.any() for _, added in seen.training)
    assert len(seen.other) > 12, "evaluations of both kinds"
    assert not any(added.any() for _, added in seen.other)
    assert isinstance(updates[-1], Finished)
    assert updates[-1].certificate["passed"]
    plain = list(train(spec_for(), llama, *files, tmp_path / "plain"))
    first_noisy, first = (next(p for p in run if isinstance(p, Evaluated)) for run in (updates, plain))
    assert first_noisy == first
    assert losses(updates) != losses(plain)
    after = llama.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not llama.model.get_input_embeddings()._forward_hooks


class Compares(LoRA):
    """LoRA that looks at the base's logits beside the run's own."""

    needs_logits = True
    seen: ClassVar[list[tuple[Tensor, Tensor]]] = []

    def penalty(self, outputs: Any, reference: Any) -> Tensor | None:
        if not self.finished_steps:  # the adapter changes nothing yet
            self.seen.append((outputs.logits.detach(), reference()))
        return None


def test_the_reference_of_a_penalty_is_the_quiet_base(llama, files, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Compares)
    monkeypatch.setattr(Compares, "seen", [])
    spec = spec_for("lora", neftune_alpha=ALPHA, max_steps=1, packing=False)
    with watched(llama) as seen:
        seen.of(train(spec, llama, files[0], None, tmp_path / "run"))
    assert len(Compares.seen) == 2
    for (own, reference), (ids, _) in zip(Compares.seen, seen.training, strict=True):
        assert not torch.equal(own, reference)
        with torch.no_grad():
            assert torch.equal(reference, llama.model(ids).logits)


def test_the_hook_goes_however_the_loss_ends(llama) -> None:
    def fails(model: Any, batch: Any, **options: Any) -> Any:
        assert model.get_input_embeddings()._forward_hooks
        raise torch.OutOfMemoryError("the device is full")

    llama.model.train()
    with pytest.raises(torch.OutOfMemoryError):
        with_noise(fails, ALPHA)(llama.model, None, needs_logits=False)
    assert not llama.model.get_input_embeddings()._forward_hooks


def test_the_same_seed_draws_the_same_noise(llama, files, tmp_path) -> None:
    runs = [
        losses(train(spec_for(neftune_alpha=ALPHA, seed=seed), llama, files[0], None, tmp_path / str(i)))
        for i, seed in enumerate((5, 5, 6))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_a_block_that_is_computed_twice_sees_the_same_noise(llama, files, tmp_path) -> None:
    runs = [
        losses(
            train(spec_for(neftune_alpha=ALPHA, gradient_checkpointing=twice), llama, files[0], None, folder)
        )
        for twice, folder in ((False, tmp_path / "once"), (True, tmp_path / "twice"))
    ]
    assert runs[0] == pytest.approx(runs[1], rel=1e-6)


def test_what_a_driver_draws_changes_nothing(llama, files, tmp_path) -> None:
    spec = spec_for(neftune_alpha=ALPHA)
    undisturbed = losses(train(spec, llama, files[0], None, tmp_path / "undisturbed"))
    disturbed = []
    for progress in train(spec, llama, files[0], None, tmp_path / "disturbed"):
        if isinstance(progress, Step):
            torch.rand(3)
            disturbed.append(progress.loss)
    assert disturbed == undisturbed


def test_preferences_take_no_noise() -> None:
    with pytest.raises(SpecError, match=r"neftune_alpha is for method.type 'supervised'") as caught:
        read_spec(model="m", type="dpo", hyperparameters={"neftune_alpha": 5})
    assert caught.value.param == "hyperparameters.neftune_alpha"
    assert read_spec(model="m", type="dpo", hyperparameters={"neftune_alpha": 0})
