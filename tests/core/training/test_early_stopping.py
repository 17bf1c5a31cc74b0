"""Early stopping: when a run stops, and that the best adapter comes out, also after a resume."""

import math
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from olora_core.bases.loading import Base
from olora_core.errors import SpecError
from olora_core.progress import Evaluated, Finished, Note, Progress, Saved, Step
from olora_core.specs import Hyperparameters, read_spec
from olora_core.training.early_stopping import best_of, is_over

from ..runs import chat_rows, one, spec_for, train, write_rows

UNCHANGING = {"schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 1e-2}
"""No rate depends on the number of planned steps, so that a shorter run takes the same steps."""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Validation asks the training's questions and expects other answers: what is learned makes it worse."""
    rows = chat_rows()
    wrong = [
        {"messages": [row["messages"][0], {"role": "assistant", "content": "pqr"[i % 3] * 4}]}
        for i, row in enumerate(rows)
    ]
    return write_rows(tmp_path / "training.jsonl", rows), write_rows(tmp_path / "wrong.jsonl", wrong)


def evaluations(updates: list[Progress]) -> dict[int, float]:
    return {p.step: p.loss for p in updates if isinstance(p, Evaluated)}


def notes(updates: list[Progress], level: str) -> list[str]:
    return [p.message for p in updates if isinstance(p, Note) and p.level == level]


def exported(finished: Finished) -> bytes:
    return (finished.folder / "adapter_model.safetensors").read_bytes()


def stopping(**options: Any) -> Any:
    chosen = {"n_epochs": 30, "eval_steps": 1, "early_stopping_patience": 3} | UNCHANGING | options
    return spec_for(**chosen)


def test_a_run_stops_when_validation_gets_worse_and_exports_its_best(llama: Base, files, tmp_path) -> None:
    updates = list(train(stopping(), llama, *files, tmp_path / "run"))
    losses, finished = evaluations(updates), one(Finished, updates)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert list(losses) == list(range(best + 4))
    assert all(losses[best + later] >= losses[best] for later in (1, 2, 3))
    assert [p.step for p in updates if isinstance(p, Step)] == list(range(1, best + 4))
    assert all(p.total_steps == 90 for p in updates if isinstance(p, Step))
    assert finished.steps == best + 3
    assert finished.metrics["exported_step"] == finished.certificate["exported_step"] == best
    assert finished.metrics["valid_loss_after"] == losses[best]
    assert finished.certificate["passed"]
    stopped, taken = notes(updates, "info")[-2:]
    assert f"stops after step {best + 3} of 90" in stopped
    assert f"The adapter of step {best} is exported" in taken

    shorter = spec_for(n_epochs=30, max_steps=best, **UNCHANGING)
    alone = list(train(shorter, llama, *files, tmp_path / "shorter"))
    assert exported(finished) == exported(one(Finished, alone))


def test_the_best_checkpoint_is_kept_beside_the_newest_two(llama: Base, files, tmp_path) -> None:
    updates = list(train(stopping(), llama, *files, tmp_path / "run"))
    finished = one(Finished, updates)
    best, last = finished.metrics["exported_step"], finished.steps
    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [int(folder.name[5:]) for folder in folders] == [best, last - 1, last]
    kept = load_file(folders[0] / "adapter.safetensors")
    native = load_file(finished.folder / "native" / "adapter.safetensors")
    assert all((native[name] == tensor).all() for name, tensor in kept.items())
    assert [p.best_step for p in updates if isinstance(p, Saved)] == [
        min(range(1, step + 1), key=lambda s: evaluations(updates)[s]) for step in range(1, last + 1)
    ]


def test_a_run_that_never_stops_early_exports_its_best_too(llama: Base, files, tmp_path) -> None:
    spec = stopping(early_stopping_patience=50, n_epochs=4)
    updates = list(train(spec, llama, *files, tmp_path / "run"))
    losses, finished = evaluations(updates), one(Finished, updates)
    best = min((step for step in losses if step), key=lambda step: losses[step])
    assert finished.steps == 12
    assert finished.metrics["exported_step"] == best < 12
    assert finished.metrics["valid_loss_after"] == losses[best]


@pytest.mark.parametrize("later", [1, 3])
def test_a_run_resumed_after_its_best_step_ends_the_same(llama: Base, files, tmp_path, later) -> None:
    """Also from the checkpoint of the very step after which it stops."""
    whole = one(Finished, train(stopping(), llama, *files, tmp_path / "whole"))
    best = whole.metrics["exported_step"]
    begun = train(stopping(), llama, *files, tmp_path / "begun")
    saved = next(p for p in begun if isinstance(p, Saved) and p.step == best + later)
    begun.close()
    rest = list(train(stopping(), llama, *files, tmp_path / "rest", resume=saved.folder))
    assert [p.step for p in rest if isinstance(p, Step)] == list(range(best + later + 1, best + 4))
    finished = one(Finished, rest)
    assert finished.metrics["exported_step"] == best
    assert exported(finished) == exported(whole)


def test_training_that_only_harms_is_pointed_out(llama: Base, files, tmp_path) -> None:
    spec = stopping(learning_rate=1.0, early_stopping_patience=1)
    updates = list(train(spec, llama, *files, tmp_path / "run"))
    losses = evaluations(updates)
    assert min(loss for step, loss in losses.items() if step) > losses[0]
    assert any("training has not helped" in message for message in notes(updates, "warn"))


def test_without_early_stopping_the_last_adapter_is_exported(llama: Base, files, tmp_path) -> None:
    updates = list(train(spec_for(eval_steps=1, **UNCHANGING), llama, *files, tmp_path / "run"))
    finished = one(Finished, updates)
    assert finished.metrics["exported_step"] == finished.steps == 6
    assert finished.metrics["valid_loss_after"] == evaluations(updates)[6]
    assert [p.best_step for p in updates if isinstance(p, Saved)] == [None] * 6


def test_eval_steps_come_beside_epoch_ends_each_with_a_checkpoint(llama: Base, files, tmp_path) -> None:
    updates = list(train(spec_for(eval_steps=2), llama, *files, tmp_path / "run", checkpoint_seconds=3600))
    assert list(evaluations(updates)) == [0, 2, 3, 4, 6]
    saved = [p for p in updates if isinstance(p, Saved)]
    assert [p.step for p in saved] == [2, 3, 4, 6]
    assert [p.metrics["full_valid_loss"] for p in saved] == list(evaluations(updates).values())[1:]
    plain = list(train(spec_for(), llama, *files, tmp_path / "plain"))
    assert [p.loss for p in updates if isinstance(p, Step)] == [p.loss for p in plain if isinstance(p, Step)]


LOSSES = [5.0, 4.0, 3.9, 3.95, 3.6, 3.7, 3.55, 3.8]
"""Of the base, then after steps 1 to 7."""


@pytest.mark.parametrize(
    ("patience", "min_delta", "over_at"),
    [
        (1, 0.0, 3),
        (2, 0.0, None),
        (1, 0.2, 2),
        (2, 0.2, 3),
        (3, 0.2, 7),  # 4.0 and 3.6 are improvements; 3.7, 3.55 and 3.8 are not
        (2, 1.0, 3),
        (7, 9.0, None),
    ],
)
def test_patience_counts_evaluations_without_improvement(patience, min_delta, over_at) -> None:
    options = Hyperparameters(early_stopping_patience=patience, early_stopping_min_delta=min_delta)
    reported = [Evaluated(step, loss, 0.5) for step, loss in enumerate(LOSSES)]
    over = [step for step in range(len(reported)) if is_over(reported[: step + 1], options)]
    assert (over[0] if over else None) == over_at
    assert not is_over(reported, Hyperparameters())


def test_the_best_is_the_earliest_lowest_after_any_training() -> None:
    reported = [Evaluated(step, loss, 0.5) for step, loss in enumerate([1.0, 3.0, 2.0, 2.0])]
    assert best_of(reported) is reported[2]
    assert best_of(reported[:1]) is None


@pytest.mark.parametrize("options", [{"early_stopping_patience": 2}, {"eval_steps": 10}])
def test_what_looks_at_a_validation_file_needs_one(llama: Base, files, tmp_path, options) -> None:
    with pytest.raises(SpecError, match="there is no validation_file") as caught:
        next(train(spec_for(**options), llama, files[0], None, tmp_path / "run"))
    assert caught.value.param == f"hyperparameters.{next(iter(options))}"


def test_a_least_improvement_without_patience_is_refused() -> None:
    with pytest.raises(SpecError, match="needs early_stopping_patience"):
        read_spec(model="m", hyperparameters={"early_stopping_min_delta": 0.1})


@pytest.mark.parametrize(
    "options",
    [{"early_stopping_patience": 0}, {"eval_steps": 0}, {"early_stopping_min_delta": math.nan}],
)
def test_numbers_that_make_no_sense_are_refused(options) -> None:
    with pytest.raises(SpecError, match=next(iter(options))):
        read_spec(model="m", hyperparameters=options)
