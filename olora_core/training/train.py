"""One training run, as a generator: whoever iterates records what it says, and stops it by leaving.

Reading order is the order of events: `train` at the top, then what it calls.
"""

import shutil
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..bases.loading import Base, check_quantization
from ..bases.precision import compute_dtype
from ..bases.sites import target_sites
from ..devices import SINGLE, Devices
from ..export.adapter import export_adapter, record_certificate
from ..export.certificate import certify, certify_merged
from ..export.manifest import Story
from ..export.merged import Merged, check_mergeable, export_merged
from ..layers.adapter import adapter_tensors, load_adapter_tensors
from ..progress import Evaluated, Finished, Note, Phase, Progress, Resolved, Samples, Saved, Step
from ..specs import TrainSpec, check_validation, resolve
from .data import Data, read_data
from .early_stopping import is_over
from .evaluate import evaluate_fully
from .memory import Plan
from .resume import Checkpoints, resume_run, save
from .run import Run, check_dtype, check_sharding, restored_afterwards, run_facts, start
from .samples import sample
from .step import fill_note, peak_memory, take_step

__all__ = [
    "Evaluated",
    "Finished",
    "Note",
    "Phase",
    "Progress",
    "Resolved",
    "Samples",
    "Saved",
    "Step",
    "compute_dtype",
    "train",
]

CERTIFICATE_ROWS, CERTIFICATE_TOKENS = 16, 4096
TINY_MULTIPLIER = 0.01
ROUNDING_WORTH_A_WARNING = 0.01

Training = Generator[Progress, str | None, None]


def train(
    spec: TrainSpec,
    base: Base,
    training: Path,
    validation: Path | None,
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint_seconds: float = 60.0,
    cache: Path | None = None,
    devices: Devices = SINGLE,
) -> Training:
    """Trains an adapter for `base` and exports it, certified, to `folder / "adapter"`.

    Where the spec asks for merged weights, the whole model is exported to `folder / "model"` instead.

    `base` is loaded in `compute_dtype(spec, …)` and bears no adapter. While the loop runs, Finished included,
    it answers as the tuned model; when the loop is left, however that happens, it is as it was. `folder` is
    scratch and holds the checkpoints. Tokenised files are kept in `cache`, where another run on the same data
    finds them; without it, in `folder`. Sending "save" at a Step makes a Saved the next thing said. With
    `resume`, a checkpoint's folder, the run goes on exactly there.

    On several `devices` each process calls this with the same arguments and iterates to the end; only the
    first one's progress, wishes and leaving matter, and only it writes. When it leaves, the others end.

    Raises OloraErrors only for expected trouble; each says what to do.
    """
    asked = spec
    with devices.ending_together():
        check_dtype(spec, base)
        check_quantization(spec, base)
        check_sharding(spec, base, devices)
        check_validation(spec, given=validation is not None)
        sites = target_sites(base.model, spec.adapter.target_modules)
        check_mergeable(spec, base, sites)
        own_cache = folder / "tokens" if devices.is_main else None
        data = yield from read_data(spec, base, training, validation, cache or own_cache)
        spec, why = resolve(spec, run_facts(base, data, devices))
        with restored_afterwards(base):
            run, plan = yield from start(asked, spec, base, data, sites, devices)
            trained = sum(parameter.numel() for parameter in run.parameters)
            targets = [site.name for site in sites]
            reasons = [*why, *plan.why]
            yield Resolved(run.spec, reasons, run.total_steps, len(data.training), trained, targets)
            if resume is None:
                yield from notes(run, plan)
            else:
                resume_run(run, resume)
            yield from steps(run, Checkpoints(partial(save, folder=folder), checkpoint_seconds))
            devices.check_equal(adapter_tensors(run.adapters).values())
            if devices.is_main:
                yield from finish(run, folder)


def notes(run: Run, plan: Plan) -> Iterator[Note]:
    """What the owner should know before the first step."""
    yield from run.data.notes
    yield from plan.notes
    yield fill_note(run)
    for sentence in (*run.base.notes, *run.method.notes):
        yield Note("warn", sentence)
    multiplier = run.asked.hyperparameters.learning_rate_multiplier
    if multiplier != "auto" and multiplier < TINY_MULTIPLIER:
        yield Note(
            "warn",
            f"learning_rate_multiplier = {multiplier:g} multiplies the method's own rate, to "
            f"{run.hyperparameters.learning_rate:g}; for an absolute rate use learning_rate.",
        )


# --- the loop ------------------------------------------------------------------------------------------


def evaluation_is_due(run: Run) -> bool:
    """At the very start, at epochs' ends, at the last step, and every `eval_steps`."""
    every = run.hyperparameters.eval_steps
    at_epoch_end = run.step % run.steps_per_epoch == 0 or run.step == run.total_steps
    return at_epoch_end or (every is not None and run.step % every == 0)


def steps(
    run: Run, checkpoints: Checkpoints, is_due: Callable[[Run], bool] = evaluation_is_due
) -> Generator[Note | Phase | Step | Evaluated | Saved, str | None, None]:
    """Steps, with the whole validation file whenever it `is_due`, and checkpoints."""
    while True:
        if is_due(run) and run.evaluated_at != run.step:
            yield from evaluate_fully(run)
            if checkpoints.follow_evaluations and run.step and run.devices.is_main:
                yield checkpoints.make(run)
        if run.step == run.total_steps:
            return
        if is_over(run.evaluations, run.hyperparameters):
            yield Note(
                "info",
                f"{run.hyperparameters.early_stopping_patience} evaluations in a row have not lowered the "
                f"validation loss; the training stops after step {run.step} of {run.total_steps}.",
                {"step": run.step, "total_steps": run.total_steps},
            )
            return
        step = yield from take_step(run)
        stop_request = yield step
        follows_anyway = checkpoints.follow_evaluations and is_due(run)
        if run.devices.is_main and (stop_request == "save" or (checkpoints.are_due and not follows_anyway)):
            yield checkpoints.make(run)


# --- the end -------------------------------------------------------------------------------------------


def finish(run: Run, folder: Path) -> Iterator[Note | Phase | Samples | Finished]:
    """Has both models answer, exports what was trained and lets it pass only with a certificate."""
    run.base.model.eval()
    yield from take_the_best(run)
    samples = None
    if run.base.shards > 1:  # the others, whom every pass takes, have ended
        if run.hyperparameters.samples:
            yield Note("info", "The base is sharded over several devices, so it answers no sample rows.")
    else:
        samples = yield from sample(run.base, run.data, run.hyperparameters.samples)
    if samples:
        yield samples
    merges = run.spec.adapter.export == "merged"
    exported, metrics = folder / ("model" if merges else "adapter"), final_metrics(run)
    yield Phase("exporting", 0, 1)
    shutil.rmtree(exported, ignore_errors=True)
    losses = [(step, loss) for step, loss, _, _ in run.history]
    story = Story(run.asked, run.spec, run.data.hashes, metrics, losses, samples)
    if merges:
        yield rounding_note(export_merged(run.base, run.adapters, exported, story))
    else:
        export_adapter(run.base, run.adapters, exported, story)
    yield Phase("exporting", 1, 1)
    yield Phase("certifying", 0, 1)
    certified = certify_merged if merges else certify
    certificate = certified(run.base, run.adapters, exported, certificate_rows(run.data))
    kept = ("valid_loss_before", "valid_loss_after", "exported_step")
    certificate |= {name: metrics[name] for name in kept}
    record_certificate(exported, certificate)
    yield Phase("certifying", 1, 1)
    yield Finished(exported, certificate, metrics, run.trained_tokens, run.step)


def rounding_note(merged: Merged) -> Note:
    """What the weights' dtype took of the update; in bf16 it may be much of a small one."""
    level = "warn" if merged.rounding_loss > ROUNDING_WORTH_A_WARNING else "info"
    sentence = (
        f"Merged and rounded to {merged.dtype}, the weights lose {merged.rounding_loss:.2%} of the update."
    )
    if level == "warn":
        sentence += " An adapter, adapter.export = 'adapter', loses nothing."
    return Note(level, sentence, {"rounding_loss": merged.rounding_loss})


def take_the_best(run: Run) -> Iterator[Note]:
    """With early stopping: back to the adapter of the lowest validation loss."""
    best = run.best
    if best is None:
        return
    load_adapter_tensors(run.adapters, run.best_tensors or {})
    told = (
        f"The adapter of step {best.step} is exported: its validation loss, {best.loss:.4f}, is the lowest."
    )
    yield Note("info", told, {"step": best.step, "valid_loss": best.loss})
    before = run.evaluations[0]
    if not best.loss < before.loss:
        yield Note(
            "warn",
            f"The base's own validation loss, {before.loss:.4f}, is not above it: on these rows the training "
            "has not helped. Lower the learning rate, or look at the data.",
        )


def certificate_rows(data: Data) -> list[list[int]]:
    """The first held-out rows, or training rows where nothing is held out."""
    examples, rows, tokens = data.validation or data.training, [], 0
    for i in range(min(CERTIFICATE_ROWS, len(examples))):
        row = examples.row(i)[0].tolist()
        if rows and tokens + len(row) > CERTIFICATE_TOKENS:
            break
        rows.append(row)
        tokens += len(row)
    return rows


def final_metrics(run: Run) -> dict[str, Any]:
    """What the job and the model card keep of the run."""
    last_epoch = run.history[-((run.step - 1) % run.steps_per_epoch + 1) :]
    weight = sum(weight for *_, weight in last_epoch)
    before, after = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else (None, None)
    after = run.best or after
    return {
        "steps": run.step,
        "exported_step": run.best.step if run.best else run.step,
        "train_loss": sum(loss * of for _, loss, _, of in last_epoch) / weight,
        "train_accuracy": sum(accuracy * of for _, _, accuracy, of in last_epoch) / weight,
        "valid_loss_before": before.loss if before else None,
        "valid_loss_after": after.loss if after else None,
        "valid_accuracy_before": before.accuracy if before else None,
        "valid_accuracy_after": after.accuracy if after else None,
        "trained_tokens": run.trained_tokens,
        "tokens": run.tokens,
        "seconds": run.seconds,
        "tokens_per_second": run.tokens / run.seconds,
        "peak_memory_bytes": peak_memory(run.base.device),
    }
