"""One training run, as a generator: whoever iterates records what it says, and stops it by leaving.

Reading order is the order of events: `train` at the top, then what it calls.
"""

import hashlib
import math
import shutil
import time
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import attention, checkpoint
from .adapter import Adapter, Site, adapter_tensors, adapters_off, detach, load_adapter_tensors
from .batches import MicroBatch, epoch_order, micro_batches, steps_per_epoch
from .certify import certify
from .checkpoint import Snapshot
from .data import Data, context_length, read_data
from .devices import ALONE, Devices
from .early_stopping import best_of, is_over
from .errors import CheckpointError, SpecError, TrainingError
from .evaluate import evaluate
from .examples import Examples
from .export import Story, export_adapter, record_certificate
from .losses import Loss, loss_of, set_training
from .methods import METHODS, Method, Outputs
from .methods.base import Schedule, placing
from .model import Base, check_quantization, target_sites
from .neftune import with_noise
from .passes import evaluating
from .plan import Plan, can_checkpoint, is_out_of_memory, plan_passes, set_checkpointing
from .precision import DTYPES, compute_dtype
from .progress import Evaluated, Finished, Note, Phase, Progress, Resolved, Samples, Saved, Step, result_of
from .randomness import Randomness
from .samples import sample
from .schedule import schedule_of
from .specs import Facts, Hyperparameters, TrainSpec, check_validation, resolve

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

SMALL_VALIDATION_ROWS = 16
SMALL_VALIDATIONS = 20
"""How often a run looks at the first validation rows."""
CERTIFICATE_ROWS, CERTIFICATE_TOKENS = 16, 4096
LOCAL_CHECKPOINTS = 2
FILL_STEPS = 20
"""Steps whose passes are looked at to say how full they are."""
TINY_MULTIPLIER = 0.01

Wishes = Generator[Progress, str | None, None]


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
    devices: Devices = ALONE,
) -> Wishes:
    """Trains an adapter for `base` and exports it, certified, to `folder / "adapter"`.

    `base` is loaded in `compute_dtype(spec, …)` and bears no adapter. While the loop runs, Finished included,
    it answers as the tuned model; when the loop is left, however that happens, it is as it was. `folder` is
    scratch and holds the checkpoints. Tokenised files are kept in `cache`, where another run on the same data
    finds them; without it, in `folder`. Sending "save" at a Step makes a Saved the next thing said. With
    `resume`, a checkpoint's folder, the run goes on exactly there.

    On several `devices` each process calls this with the same arguments and iterates to the end; only the
    first one's progress, wishes and leaving matter, and only it writes. When it leaves, the others end.

    Raises OloraErrors only for expected trouble; each says what to do.
    """
    asked, threads = spec, torch.get_num_threads()
    attention_before = base.model.config._attn_implementation
    with devices.sharing():
        check_dtype(spec, base)
        check_quantization(spec, base)
        check_sharding(spec, base, devices)
        check_validation(spec, given=validation is not None)
        sites = target_sites(base.model, spec.adapter.target_modules)
        own_cache = folder / "tokens" if devices.leads else None
        data = yield from read_data(spec, base, training, validation, cache or own_cache)
        spec, why = resolve(spec, facts(base, data, devices))
        try:
            run, plan = yield from start(asked, spec, base, data, sites, devices)
            trained = sum(parameter.numel() for parameter in run.parameters)
            targets = [site.name for site in sites]
            reasons = [*why, *plan.why]
            yield Resolved(run.spec, reasons, run.total_steps, len(data.training), trained, targets)
            if resume is None:
                yield from notes(run, plan)
            else:
                take_up(run, resume)
            yield from steps(run, folder, checkpoint_seconds)
            devices.check_equal(adapter_tensors(run.adapters).values())
            if devices.leads:
                yield from finish(run, folder)
        finally:
            detach(base.model)
            set_checkpointing(base.model, False)
            base.model.set_attn_implementation(attention_before)
            base.model.eval()
            torch.set_num_threads(threads)


# --- the run -------------------------------------------------------------------------------------------


def check_dtype(spec: TrainSpec, base: Base) -> None:
    """The resident base must have the dtype that the run computes in."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    asked = spec.hyperparameters.dtype
    if base.dtype not in names or asked not in ("auto", names[base.dtype]):
        wanted = "float32 or bfloat16" if asked == "auto" else asked
        raise SpecError(
            f"hyperparameters.dtype: the base model is loaded in {str(base.dtype).removeprefix('torch.')}, "
            f"and the run computes in {wanted}; load it with compute_dtype(spec, folder, device).",
            param="hyperparameters.dtype",
        )


def check_sharding(spec: TrainSpec, base: Base, devices: Devices) -> None:
    """The resident base must be spread over these devices or whole, as the run wants it."""
    asked = spec.hyperparameters.sharding
    fitting = (1, devices.count) if asked == "auto" else (devices.count if asked == "full" else 1,)
    if base.shards not in fitting:
        raise SpecError(
            f"hyperparameters.sharding = '{asked}' on {devices.count} devices, and the base model lies in "
            f"{base.shards} part(s); load it as is_sharded(spec, folder, device, devices) says.",
            param="hyperparameters.sharding",
        )


def facts(base: Base, data: Data, devices: Devices) -> Facts:
    dtype = "bfloat16" if base.dtype == torch.bfloat16 else "float32"
    width = base.model.config.get_text_config().hidden_size
    return Facts(
        len(data.training), width, context_length(base), dtype, devices.count, sharded=base.shards > 1
    )


@dataclass
class Run:
    """A run between two steps."""

    asked: TrainSpec
    spec: TrainSpec
    base: Base
    data: Data
    method: Method
    adapters: dict[str, Adapter]
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    total_steps: int
    micro_batch_tokens: int
    """Of a pass, at most; smaller than the spec's once the device ran out of memory."""
    checkpointing: bool
    """Whether the blocks keep only their inputs."""
    random: Randomness
    devices: Devices
    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Spent in steps, without evaluations and checkpoints."""
    history: list[tuple[int, float, float, int]] = field(default_factory=list)
    """(step, loss, accuracy, trained tokens or pairs) of each step."""
    glances: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, loss, accuracy) over the first validation rows."""
    evaluations: list[Evaluated] = field(default_factory=list)
    evaluated_at: int = -1
    """Step of the last full evaluation, or of the last that was due without a validation file."""
    saved_at: int | None = None
    """Step of the newest checkpoint."""
    best_tensors: dict[str, Tensor] | None = None
    """With early stopping: the adapter's, on the CPU, as of the lowest validation loss."""
    order: tuple[int, np.ndarray] | None = None
    """An epoch and its order of examples, made when a step of it asks."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        return self.spec.hyperparameters

    @property
    def best(self) -> Evaluated | None:
        """With early stopping: the evaluation whose adapter is exported."""
        return best_of(self.evaluations) if self.hyperparameters.early_stopping_patience else None

    @cached_property
    def loss(self) -> Loss:
        return with_noise(loss_of(self.spec), self.hyperparameters.neftune_alpha)

    @cached_property
    def measure(self) -> Loss:
        """The loss of evaluations."""
        return loss_of(self.spec, evaluating=True)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data.training), self.hyperparameters.batch_size)

    @cached_property
    def small_validation(self) -> Examples | None:
        held_out = self.data.validation
        return None if held_out is None else held_out.first(SMALL_VALIDATION_ROWS)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint of this run belongs to."""
        held_out = self.data.validation
        return {
            "spec": hashlib.sha256(self.spec.model_dump_json(exclude_defaults=True).encode()).hexdigest(),
            "training data": self.data.training.digest,
            "validation data": None if held_out is None else held_out.digest,
            "base model": self.base.fingerprint,
            "dtype": str(self.base.dtype),
        }

    def rows(self, step: int) -> np.ndarray:
        """The examples of an optimizer step; the last batch of an epoch may hold fewer."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, epoch_order(len(self.data.training), seed=self.spec.seed, epoch=epoch)
        size = self.hyperparameters.batch_size
        return self.order[1][index * size : (index + 1) * size]


def start(
    asked: TrainSpec, spec: TrainSpec, base: Base, data: Data, sites: list[Site], devices: Devices
) -> Generator[Phase, None, tuple[Run, Plan]]:
    """Puts the adapters in place, plans the passes and makes the optimizer."""
    devices.meet()
    hyperparameters = spec.hyperparameters
    per_epoch = steps_per_epoch(len(data.training), hyperparameters.batch_size)
    total_steps = min(hyperparameters.n_epochs * per_epoch, hyperparameters.max_steps or math.inf)
    schedule = schedule_of(hyperparameters)
    method = METHODS[spec.adapter.method](
        spec.adapter,
        seed=spec.seed,
        total_steps=total_steps,
        schedule=schedule,
        weight_decay=hyperparameters.weight_decay,
    )
    method.sum_over_processes = devices.sum
    packing = base.passes.packing  # asked before the adapters come
    adapters = yield from placing(method, base.model, sites, devices)
    # Devices of one kind compute the same start; these are the same bits on any.
    devices.share(adapter_tensors(adapters).values())
    if packing == "segments":
        base.model.set_attn_implementation(attention.NAME)
    own_plan = plan_passes(spec, base, adapters, data.training, loss_of(spec), method.needs_logits)
    plan = devices.agreed(own_plan)
    passes = plan.spec.hyperparameters
    set_checkpointing(base.model, passes.gradient_checkpointing)
    optimizer = torch.optim.AdamW(
        method.param_groups(adapters),
        lr=hyperparameters.learning_rate,
        betas=(0.9, 0.999),
        eps=1e-8,
        fused=True,
    )
    run = Run(
        asked,
        plan.spec,
        base,
        data,
        method,
        adapters,
        optimizer,
        schedule,
        total_steps,
        passes.micro_batch_tokens,
        passes.gradient_checkpointing,
        Randomness(spec.seed, base.device),
        devices,
    )
    return run, plan


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


def steps(run: Run, folder: Path, checkpoint_seconds: float) -> Wishes:
    """Steps, with the whole validation file at the start and whenever it is due, and checkpoints."""
    saved_at = time.monotonic()
    while True:
        if evaluation_is_due(run) and run.evaluated_at != run.step:
            yield from evaluate_fully(run)
            if run.step and run.devices.leads:
                yield save(run, folder)
                saved_at = time.monotonic()
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
        wish = yield (yield from take_step(run))
        is_due = time.monotonic() - saved_at >= checkpoint_seconds
        # After an evaluation a checkpoint follows anyway.
        if run.devices.leads and (wish == "save" or (is_due and not evaluation_is_due(run))):
            yield save(run, folder)
            saved_at = time.monotonic()


def evaluation_is_due(run: Run) -> bool:
    """At the very start, at epochs' ends, at the last step, and every `eval_steps`."""
    every = run.hyperparameters.eval_steps
    at_epoch_end = run.step % run.steps_per_epoch == 0 or run.step == run.total_steps
    return at_epoch_end or (every is not None and run.step % every == 0)


def take_step(run: Run) -> Generator[Note, None, Step]:
    """One optimizer step; the order of the method's hooks is part of their contract."""
    began, step, rows = time.perf_counter(), run.step + 1, run.rows(run.step + 1)
    rate = write_learning_rates(run, step)
    set_training(run.base.model, run.spec)
    while True:
        is_short = False
        try:
            with run.random:
                sums, tokens = accumulate(run, rows)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            if run.base.shards > 1:  # the others wait in the midst of this pass
                raise no_room(run, step, batches_of(run, rows)) from None
            is_short = True
        # One device that is short of memory is enough for all to begin again, since they share the batches.
        if not run.devices.meet(is_short):
            break
        # Nothing has moved yet: the step begins again, with less at a time.
        run.optimizer.zero_grad(set_to_none=True)
        run.method.step_again()
        yield need_less(run, step, rows)
    sums = run.devices.sum_gradients(run.parameters, sums)
    norm = nn.utils.clip_grad_norm_(run.parameters, run.hyperparameters.max_grad_norm)
    trained = int(run.data.training.trained_lengths[rows].sum())
    weight = int(run.data.training.weights[rows].sum())
    # The one wait for the device in a step: a step that is not finite must not move the weights.
    *means, grad_norm = torch.cat([sums / weight, norm.double()[None]]).tolist()
    mean, accuracy, margin = means
    if not (math.isfinite(mean) and math.isfinite(grad_norm)):
        raise not_finite(
            run, f"Step {step} is not finite and was not applied: loss {mean}, gradient norm {grad_norm}."
        )
    run.method.after_backward(step)
    run.optimizer.step()
    run.method.after_step(step, run.optimizer)
    run.optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - began
    run.step, run.tokens, run.trained_tokens = step, run.tokens + tokens, run.trained_tokens + trained
    run.seconds += seconds
    run.history.append((step, mean, accuracy, weight))
    seen = glance(run)
    return Step(
        step=step,
        total_steps=run.total_steps,
        epoch=step / run.steps_per_epoch,
        loss=mean,
        accuracy=accuracy,
        trained_tokens=trained,
        tokens=tokens,
        learning_rate=rate,
        grad_norm=grad_norm,
        seconds=seconds,
        memory_bytes=peak_memory(run.base.device),
        valid_loss=seen[0] if seen else None,
        valid_accuracy=seen[1] if seen else None,
        reward_margin=margin if run.spec.type == "dpo" else None,
    )


def not_finite(run: Run, what: str) -> TrainingError:
    """`what` happened; what helps, and from where the run could go on."""
    kept = "No checkpoint had been made yet."
    if run.saved_at is not None:
        kept = f"The last good checkpoint, of step {run.saved_at}, is kept."
    return TrainingError(
        f"{what} Lower the learning rate (now {run.hyperparameters.learning_rate:g}), or look at the data of "
        f"that step for what is out of the ordinary. {kept}",
        param="hyperparameters.learning_rate",
        code="not_finite",
    )


def write_learning_rates(run: Run, step: int) -> float:
    """Sets every group's rate for this step, anew; returns the job's own."""
    peak, multiplier = run.hyperparameters.learning_rate, run.schedule(step, run.total_steps)
    for group in run.optimizer.param_groups:
        scheduled = 1.0 if group["lr_by"] == "method" else multiplier
        group["lr"] = peak * group["lr_multiplier"] * scheduled * group["lr_factor"]
    return peak * multiplier


def accumulate(run: Run, rows: np.ndarray) -> tuple[Tensor, int]:
    """Gradients of one optimizer batch. Returns (3,) fp64, the sums of loss, hits and margin; and tokens."""
    weight = int(run.data.training.weights[rows].sum())
    batches = batches_of(run, rows)
    sums = torch.zeros(3, dtype=torch.float64, device=run.base.device)
    if run.base.shards > 1:
        run.devices.meet()  # every pass over the base takes all devices
    mine = run.devices.mine([batch.tokens for batch in batches], in_step=run.base.shards > 1)
    for position, counts in mine:
        run.random.begin(run.step + 1, position)
        batch = batches[position].to(run.base.device)
        task = run.loss(run.base.model, batch, run.base.passes, every_logit=run.method.needs_logits)
        penalty = run.method.penalty(
            Outputs(task.logits, batch.labels, task.total / task.weight, repeated=not counts),
            lambda batch=batch: base_logits(run.base, batch),
        )
        loss = task.total / weight
        if penalty is not None:
            loss = loss + penalty / len(batches)
        (loss if counts else 0 * loss).backward()
        if not counts:
            continue
        margin = torch.zeros_like(task.total) if task.margin is None else task.margin
        sums += torch.stack([task.total.detach().double(), task.correct.double(), margin.double()])
    return sums, sum(batch.tokens for batch in batches)


def batches_of(run: Run, rows: np.ndarray) -> list[MicroBatch]:
    return micro_batches(
        run.data.training,
        rows,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        pad_token=run.base.tokenizer.pad_token_id or 0,
    )


def fill_note(run: Run) -> Note:
    """How full the passes of the first steps are."""
    steps = min(FILL_STEPS, run.total_steps)
    batches = [batch for step in range(1, steps + 1) for batch in batches_of(run, run.rows(step))]
    tokens = sum(batch.tokens for batch in batches)
    padded = sum(batch.input_ids.numel() for batch in batches)
    room = sum(max(run.micro_batch_tokens, batch.input_ids.numel()) for batch in batches)
    packing = run.hyperparameters.packing
    return Note(
        "info",
        f"{'Packed' if packing else 'Padded'} passes: {tokens / padded:.0%} of what they compute are the "
        f"examples' tokens, {tokens / room:.0%} of the {run.micro_batch_tokens} they may hold; "
        f"{len(batches) / steps:.1f} a step.",
        {
            "packing": packing,
            "fill": tokens / padded,
            "efficiency": tokens / room,
            "passes": len(batches) / steps,
        },
    )


def need_less(run: Run, step: int, rows: np.ndarray) -> Note:
    """Halves what a pass holds, or checkpoints the blocks when it holds one example already.

    Raises TrainingError when neither is left.
    """
    if run.base.device.type == "cuda":
        torch.cuda.empty_cache()
    batches = batches_of(run, rows)
    largest = max(batch.input_ids.numel() for batch in batches)
    if len(batches) < len(rows):
        run.micro_batch_tokens = max(16, min(run.micro_batch_tokens, largest) // 2)
        done = f"passes hold at most {run.micro_batch_tokens} tokens from here on, and gradients accumulate"
    elif not run.checkpointing and can_checkpoint(run.base.model, run.spec):
        run.checkpointing = True
        set_checkpointing(run.base.model, True)
        done = "blocks are computed once more in the backward from here on"
    else:
        raise no_room(run, step, batches)
    return Note(
        "warn",
        f"Step {step} ran out of memory and begins again: {done}. The result does not change.",
        {"step": step, "micro_batch_tokens": run.micro_batch_tokens, "checkpointing": run.checkpointing},
    )


def no_room(run: Run, step: int, batches: list[MicroBatch]) -> TrainingError:
    largest = max(batch.input_ids.numel() for batch in batches)
    if run.base.shards > 1:
        what, remedy = "with its sharded base", "hyperparameters.micro_batch_tokens, context_length"
    else:
        what, remedy = "not even one example at a time", "hyperparameters.context_length"
    return TrainingError(
        f"Step {step} does not fit into the device's memory, {what} ({largest} tokens). Lower {remedy} or "
        "adapter.rank, or use a larger device.",
        code="out_of_memory",
    )


@torch.no_grad()
def base_logits(base: Base, batch: MicroBatch) -> Tensor:
    """What the base says of a batch: adapters off, eval mode."""
    with adapters_off(base.model), evaluating(base.model):
        return base.passes.logits(base.model, batch)[1]


def peak_memory(device: torch.device) -> int:
    """Bytes: the device's peak, or on a CPU this process's own, which ru_maxrss mixes with its parent's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024


def glance(run: Run) -> tuple[float, float] | None:
    """Loss and accuracy over the first validation rows, at about twenty steps of a run."""
    every = max(1, run.total_steps // SMALL_VALIDATIONS)
    if run.small_validation is None or run.step % every:
        return None
    seen = result_of(evaluation(run, run.small_validation))
    if not math.isfinite(seen[0]):
        raise not_finite(run, f"The validation loss after step {run.step} is {seen[0]}.")
    run.glances.append((run.step, *seen))
    return seen


def evaluate_fully(run: Run) -> Generator[Phase | Evaluated, None, None]:
    """The whole validation file, if there is one."""
    run.evaluated_at = run.step
    if run.data.validation is not None:
        loss, accuracy = yield from evaluation(run, run.data.validation)
        if not math.isfinite(loss):
            raise not_finite(run, f"The validation loss after step {run.step} is {loss}.")
        evaluated = Evaluated(run.step, loss, accuracy)
        run.evaluations.append(evaluated)
        if run.best is evaluated:
            now = adapter_tensors(run.adapters)
            run.best_tensors = {name: tensor.to("cpu", copy=True) for name, tensor in now.items()}
        yield evaluated


def evaluation(run: Run, examples: Examples) -> Generator[Phase, None, tuple[float, float]]:
    return evaluate(
        run.base,
        examples,
        size=run.hyperparameters.micro_batch_size,
        tokens=run.micro_batch_tokens,
        packing=run.hyperparameters.packing,
        loss_of_batch=run.measure,
        devices=run.devices,
    )


# --- checkpoints ---------------------------------------------------------------------------------------


def save(run: Run, folder: Path) -> Saved:
    """Sets the run down in a folder of its own; keeps the newest two, and with early stopping the best."""
    if not all(tensor.isfinite().all() for tensor in adapter_tensors(run.adapters).values()):
        raise not_finite(run, f"The adapter is not finite after step {run.step}.")
    place = folder / "checkpoints" / checkpoint_name(run.step)
    saved = checkpoint.save(place, snapshot(run))
    best_step = run.best.step if run.best else None
    for older in sorted(place.parent.glob("step-*"))[:-LOCAL_CHECKPOINTS]:
        if older.name != checkpoint_name(best_step):
            shutil.rmtree(older)
    run.saved_at = run.step
    return Saved(run.step, saved, checkpoint_metrics(run), best_step)


def checkpoint_name(step: int | None) -> str:
    return f"step-{step or 0:08d}"


def snapshot(run: Run) -> Snapshot:
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
        "glances": run.glances,
        "evaluations": [asdict(evaluated) for evaluated in run.evaluations],
        "evaluated_at": run.evaluated_at,
    }
    tensors = {"adapter": adapter_tensors(run.adapters), "optimizer": moments}
    if run.best_tensors is not None:
        tensors["best"] = run.best_tensors
    return Snapshot(run.identity, state, tensors)


def take_up(run: Run, folder: Path) -> None:
    """`restore` on every device, first on the one that tells what is wrong with a checkpoint."""
    if not run.devices.leads:
        run.devices.meet()
    restore(run, folder)
    if run.devices.leads:
        run.devices.meet()


def restore(run: Run, folder: Path) -> None:
    """Takes the run up where a checkpoint set it down."""
    saved = checkpoint.load(folder, run.identity)
    state, tensors = saved.state, saved.tensors
    try:
        load_adapter_tensors(run.adapters, tensors["adapter"])
        checkpoint.load_optimizer_state(run.optimizer, tensors["optimizer"], state["optimizer"])
        run.method.load_state_dict(state["method"])
        run.step, run.tokens, run.trained_tokens = state["step"], state["tokens"], state["trained_tokens"]
        run.saved_at = run.step
        run.seconds, run.evaluated_at = state["seconds"], state["evaluated_at"]
        run.history = [tuple(entry) for entry in state["history"]]
        run.glances = [tuple(entry) for entry in state["glances"]]
        run.evaluations = [Evaluated(**values) for values in state["evaluations"]]
        run.best_tensors = tensors["best"] if run.best else None
        torch.set_num_threads(state["threads"])
        run.micro_batch_tokens, run.checkpointing = state["micro_batch_tokens"], state["checkpointing"]
        set_checkpointing(run.base.model, run.checkpointing)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"Checkpoint '{folder.name}' does not fit this run: {error}. Start the run anew."
        ) from None


def checkpoint_metrics(run: Run) -> dict[str, float]:
    """What was measured at the newest step, under OpenAI's names."""
    step, loss, accuracy, _ = run.history[-1]
    metrics = {"step": step, "train_loss": loss, "train_mean_token_accuracy": accuracy}
    if run.glances and run.glances[-1][0] == step:
        _, metrics["valid_loss"], metrics["valid_mean_token_accuracy"] = run.glances[-1]
    if run.evaluations and run.evaluations[-1].step == step:
        metrics["full_valid_loss"] = run.evaluations[-1].loss
        metrics["full_valid_mean_token_accuracy"] = run.evaluations[-1].accuracy
    return metrics


# --- the end -------------------------------------------------------------------------------------------


def finish(run: Run, folder: Path) -> Iterator[Note | Phase | Samples | Finished]:
    """Has both models answer, exports the adapter and lets it pass only with a certificate."""
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
    adapter_folder, metrics = folder / "adapter", final_metrics(run)
    yield Phase("exporting", 0, 1)
    shutil.rmtree(adapter_folder, ignore_errors=True)
    losses = [(step, loss) for step, loss, _, _ in run.history]
    story = Story(run.asked, run.spec, run.data.hashes, metrics, losses, samples)
    export_adapter(run.base, run.adapters, adapter_folder, story)
    yield Phase("exporting", 1, 1)
    yield Phase("certifying", 0, 1)
    certificate = certify(run.base, run.adapters, adapter_folder, certificate_rows(run.data))
    kept = ("valid_loss_before", "valid_loss_after", "exported_step")
    certificate |= {name: metrics[name] for name in kept}
    record_certificate(adapter_folder, certificate)
    yield Phase("certifying", 1, 1)
    yield Finished(adapter_folder, certificate, metrics, run.trained_tokens, run.step)


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
