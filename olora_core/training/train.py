"""One training run, as a generator: the caller records its updates, and stops the run by closing it.

The functions stand in the order of events: `train`, then what it calls.
"""

from collections.abc import Callable, Generator, Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from ..bases.loading import Base, check_quantization
from ..bases.sites import target_sites
from ..devices import SINGLE, Devices
from ..export.merged import check_mergeable
from ..layers.adapter import adapter_tensors, load_adapter_tensors
from ..progress import Evaluated, Finished, Note, Phase, Progress, Resolved, Samples, Saved, Step
from ..specs import TrainSpec, check_validation, resolve
from .certified_export import export_certified
from .checkpoint import day_of
from .data import certificate_rows, read_data
from .early_stopping import is_over
from .evaluate import evaluate_fully
from .former import read_former
from .measured_rate import settle_rate
from .memory import Plan
from .resume import Checkpoints, resume_run, save
from .run import Run, check_dtype, check_sharding, restored_afterwards, run_facts, start
from .samples import sample
from .step import fill_note, peak_memory, take_step

TINY_MULTIPLIER = 0.01

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
    day: date | None = None,
    former: Path | None = None,
) -> Training:
    """Trains an adapter for `base` and exports it, certified, to `folder / "adapter"`.

    With `adapter.export = "merged"` the whole model is exported to `folder / "model"` instead.

    `base` must be loaded in `compute_dtype(spec, …)` and have no adapter attached. Until the generator is
    closed or exhausted the base has the adapter; afterwards, also after an error, it is as before. `folder`
    is scratch space and holds the checkpoints. Tokenised files are cached in `cache`, or without it in
    `folder`. Sending "save" at a Step makes the next update a Saved. With `resume`, the folder of a
    checkpoint, the run continues from there and gives the same bytes as one that was never interrupted.
    A chat template that writes today's date writes `day`: the checkpoint's, if there is one, and today if it
    is not given. With `former`, the folder of an adapter that was exported here, the run begins at the model
    that this adapter makes of the base; see `former.py`.

    With several `devices`, each process calls this with the same arguments and iterates to the end. Only the
    main process's updates and stop requests count, and only it writes; when it leaves, the others end.

    Raises OloraErrors for expected errors, each with a message that says what to do.
    """
    asked = spec
    with devices.ending_together():
        check_dtype(spec, base)
        check_quantization(spec, base)
        check_sharding(spec, base, devices)
        check_validation(spec, given=validation is not None)
        sites = target_sites(base.model, spec.adapter.target_modules)
        check_mergeable(spec, base, sites)
        trained_on = read_former(former) if former else None
        own_cache = folder / "tokens" if devices.is_main else None
        day = devices.broadcast_object(day_of(resume) or day or date.today())
        data = yield from read_data(spec, base, training, validation, cache or own_cache, day)
        spec, why = resolve(spec, run_facts(base, data, devices))
        with restored_afterwards(base):
            run, plan = yield from start(asked, spec, base, data, sites, devices, trained_on)
            why |= yield from settle_rate(run, resume)
            trained = sum(parameter.numel() for parameter in run.parameters)
            targets = [site.name for site in sites]
            reasons = [*why.values(), *plan.why]
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
    """Notes for the owner before the first step."""
    yield from run.data.notes
    yield from plan.notes
    if run.former is not None:
        yield former_note(run)
    yield fill_note(run)
    for sentence in (*run.base.notes, *run.method.notes):
        yield Note("warn", sentence)
    multiplier = run.asked.hyperparameters.learning_rate_multiplier
    if multiplier != "auto" and multiplier < TINY_MULTIPLIER:
        yield Note(
            "warn",
            f"learning_rate_multiplier = {multiplier:g} multiplies the automatic rate, to "
            f"{run.hyperparameters.learning_rate:g}; for an absolute rate use learning_rate.",
        )


def former_note(run: Run) -> Note:
    """How the run trains on from a former model, and the rank that its export will have."""
    pairs = [adapter.pair() for adapter in run.exported.values()]
    rank = max((pair.rank for pair in pairs if pair is not None), default=0)
    own = run.spec.adapter.method
    if run.chain.goes_on:
        how = f"{own} goes on in the former adapter's own tensors"
    else:
        how = f"the former adapter stays frozen beside {own}'s new one"
    sentence = f"Training starts at the former model: {how}. The exported adapter will have rank {rank}"
    if run.spec.adapter.export == "adapter" and run.spec.adapter.export_rank is None and run.chain.links:
        sentence += f"; adapter.export_rank = {run.spec.adapter.rank} would truncate it"
    return Note("info", f"{sentence}.", {"exported_rank": rank, "goes_on": run.chain.goes_on})


# --- the loop ------------------------------------------------------------------------------------------


def evaluation_is_due(run: Run) -> bool:
    """True before the first step, at the end of each epoch, at the last step, and every `eval_steps`."""
    every = run.hyperparameters.eval_steps
    at_epoch_end = run.step % run.steps_per_epoch == 0 or run.step == run.total_steps
    return at_epoch_end or (every is not None and run.step % every == 0)


def steps(
    run: Run, checkpoints: Checkpoints, is_due: Callable[[Run], bool] = evaluation_is_due
) -> Generator[Note | Phase | Step | Evaluated | Saved, str | None, None]:
    """The training loop: steps, full evaluations whenever `is_due`, and checkpoints."""
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
                f"validation loss; training stops after step {run.step} of {run.total_steps}.",
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
    """Generates sample answers, exports the adapter and certifies it."""
    run.base.model.eval()
    yield from take_the_best(run)
    samples = None
    if run.base.shards > 1:  # a pass needs all processes, and the others have ended
        if run.hyperparameters.samples:
            yield Note("info", "There are no sample answers, since the base is sharded over several devices.")
    else:
        samples = yield from sample(run.base, run.data, run.hyperparameters.samples)
    if samples:
        yield samples
    metrics = final_metrics(run)
    losses = [(step, loss) for step, loss, _, _ in run.history]
    exported, certificate = yield from export_certified(
        run.base,
        run.exported,
        folder,
        run.record(metrics=metrics, losses=losses, samples=samples),
        certificate_rows(run.data),
        {name: metrics[name] for name in ("valid_loss_before", "valid_loss_after", "exported_step")},
    )
    yield Finished(exported, certificate, metrics, run.trained_tokens, run.step)


def take_the_best(run: Run) -> Iterator[Note]:
    """With early stopping, restores the adapter with the lowest validation loss."""
    best = run.best
    if best is None:
        return
    load_adapter_tensors(run.adapters, run.best_tensors or {})
    yield Note(
        "info",
        f"The adapter of step {best.step} is exported: it has the lowest validation loss, {best.loss:.4f}.",
        {"step": best.step, "valid_loss": best.loss},
    )
    before = run.evaluations[0]
    if not best.loss < before.loss:
        yield Note(
            "warn",
            f"The base's own validation loss, {before.loss:.4f}, is not higher: on these rows training has "
            "not helped. Lower the learning rate, or check the data.",
        )


def final_metrics(run: Run) -> dict[str, Any]:
    """The run's metrics for the job and the model card."""
    last_epoch = run.history[-((run.step - 1) % run.steps_per_epoch + 1) :]
    losses = [loss for _, loss, *_ in last_epoch]
    weights = [run.data.training.weights[run.rows(step)].sum().item() for step, *_ in last_epoch]
    count = sum(count for *_, count in last_epoch)
    before, after = (run.evaluations[0], run.evaluations[-1]) if run.evaluations else (None, None)
    after = run.best or after
    return {
        "steps": run.step,
        "exported_step": run.best.step if run.best else run.step,
        "train_loss": sum(loss * of for loss, of in zip(losses, weights, strict=True)) / sum(weights),
        "train_accuracy": sum(accuracy * of for _, _, accuracy, of in last_epoch) / count,
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
