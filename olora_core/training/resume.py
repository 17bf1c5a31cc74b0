"""Saving a run to checkpoints, and resuming it from one."""

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from ..errors import CheckpointError
from ..layers.adapter import adapter_tensors, load_adapter_tensors
from ..progress import Evaluated, Saved
from . import checkpoint
from .checkpoint import Snapshot
from .data import certificate_rows
from .memory import set_checkpointing
from .run import Run, not_finite

LOCAL_CHECKPOINTS = 2
"""Checkpoints of a run that stay in its folder, beside the best one."""


@dataclass
class Checkpoints:
    """How and when a run is saved: after `seconds`, and with `follow_evaluations` after every evaluation."""

    save: Callable[[Run], Saved]
    seconds: float
    follow_evaluations: bool = True
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def are_due(self) -> bool:
        return time.monotonic() - self.saved_at >= self.seconds

    def make(self, run: Run) -> Saved:
        saved = self.save(run)
        self.saved_at = time.monotonic()
        return saved


def save(run: Run, folder: Path) -> Saved:
    """Writes a checkpoint of the run; keeps the newest two, and with early stopping the best."""
    best_step = run.best.step if run.best else None
    saved = write_checkpoint(folder, run.step, snapshot(run), keep=best_step)
    run.saved_at = run.step
    return Saved(run.step, saved, checkpoint_metrics(run), best_step, ended_epoch(run))


def ended_epoch(run: Run) -> int | None:
    """The epoch that ends with the run's newest step, counted from 1; None in the middle of one."""
    if run.step % run.steps_per_epoch == 0 or run.step == run.total_steps:
        return -(-run.step // run.steps_per_epoch)
    return None


def write_checkpoint(folder: Path, step: int, taken: Snapshot, keep: int | None = None) -> Path:
    """Writes the checkpoint of a step; removes all others but the newest two and step `keep`."""
    place = folder / "checkpoints" / checkpoint_name(step)
    saved = checkpoint.save(place, taken)
    for older in sorted(place.parent.glob("step-*"))[:-LOCAL_CHECKPOINTS]:
        if older.name != checkpoint_name(keep):
            shutil.rmtree(older)
    return saved


def checkpoint_name(step: int | None) -> str:
    return f"step-{step or 0:08d}"


def snapshot(run: Run) -> Snapshot:
    """The run's state. Raises TrainingError if the adapter is not finite."""
    if not all(tensor.isfinite().all() for tensor in adapter_tensors(run.adapters).values()):
        raise not_finite(run, f"The adapter is not finite after step {run.step}.")
    moments, groups = checkpoint.optimizer_state(run.optimizer)
    state = {
        "step": run.step,
        "epoch": run.step // run.steps_per_epoch,
        "index_in_epoch": run.step % run.steps_per_epoch,
        "method": run.method.state_dict(),
        "optimizer": groups,
        "threads": torch.get_num_threads(),
        "micro_batch_tokens": run.micro_batch_tokens,
        "checkpointing": run.checkpointing,
        "tokens": run.tokens,
        "trained_tokens": run.trained_tokens,
        "seconds": run.seconds,
        "history": run.history,
        "glances": run.quick_evaluations,
        "evaluations": [asdict(evaluated) for evaluated in run.evaluations],
        "evaluated_at": run.evaluated_at,
        "learning_rate": run.hyperparameters.learning_rate,
        "day": run.data.day and run.data.day.isoformat(),
        "base_model": run.base.fingerprint,
        "record": run.record().as_json(),
        "certificate_rows": certificate_rows(run.data),
    }
    tensors = {"adapter": adapter_tensors(run.adapters), "optimizer": moments}
    if run.chain.frozen:
        tensors["frozen"] = adapter_tensors(run.chain.under())
    if run.best_tensors is not None:
        tensors["best"] = run.best_tensors
    return Snapshot(run.identity, state, tensors)


def resume_run(run: Run, folder: Path) -> None:
    """Restores the run from a checkpoint's folder in every process. Raises CheckpointError.

    The main process is first, since it alone reports an error.
    """
    if not run.devices.is_main:
        run.devices.barrier()
    restore(run, checkpoint.load(folder, run.identity), folder.name)
    if run.devices.is_main:
        run.devices.barrier()


def restore(run: Run, saved: Snapshot, name: str) -> None:
    """Restores the run from a snapshot; `name` is for error messages. Raises CheckpointError."""
    state, tensors = saved.state, saved.tensors
    try:
        load_adapter_tensors(run.adapters, tensors["adapter"])
        checkpoint.load_optimizer_state(run.optimizer, tensors["optimizer"], state["optimizer"])
        run.method.load_state_dict(state["method"])
        run.step, run.tokens, run.trained_tokens = state["step"], state["tokens"], state["trained_tokens"]
        run.saved_at = run.step
        run.seconds, run.evaluated_at = state["seconds"], state["evaluated_at"]
        run.history = [tuple(entry) for entry in state["history"]]
        run.quick_evaluations = [tuple(entry) for entry in state["glances"]]
        run.evaluations = [Evaluated(**values) for values in state["evaluations"]]
        run.best_tensors = tensors["best"] if run.best else None
        torch.set_num_threads(state["threads"])
        run.micro_batch_tokens, run.checkpointing = state["micro_batch_tokens"], state["checkpointing"]
        set_checkpointing(run.base.model, run.checkpointing)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Checkpoint '{name}' does not fit this run: {error}. Restart it from the beginning."
        ) from None


def checkpoint_metrics(run: Run) -> dict[str, float]:
    """Measurements of the newest step, under OpenAI's names."""
    step, loss, accuracy, _ = run.history[-1]
    metrics = {"step": step, "train_loss": loss, "train_mean_token_accuracy": accuracy}
    if run.quick_evaluations and run.quick_evaluations[-1][0] == step:
        _, metrics["valid_loss"], metrics["valid_mean_token_accuracy"] = run.quick_evaluations[-1]
    if run.evaluations and run.evaluations[-1].step == step:
        metrics["full_valid_loss"] = run.evaluations[-1].loss
        metrics["full_valid_mean_token_accuracy"] = run.evaluations[-1].accuracy
    return metrics
