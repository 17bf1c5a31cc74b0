"""The state of a run between two steps, and its setup."""

import hashlib
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..bases import attention
from ..bases.loading import Base
from ..bases.precision import DTYPES
from ..data.batches import epoch_order, steps_per_epoch
from ..data.examples import Examples
from ..devices import Devices
from ..errors import SpecError, TrainingError
from ..export.manifest import Link, RunRecord
from ..layers.adapter import Adapter, Site, adapter_tensors, detach
from ..methods import METHODS, Method
from ..methods.base import Schedule, build_adapters_with_progress
from ..progress import Evaluated, Phase
from ..specs import Hyperparameters, RunFacts, TrainSpec
from ..specs.identity import identity_text
from .data import Data, context_length
from .early_stopping import best_of
from .former import Chain, Former, build_former, goes_on, put_under
from .losses import Loss, loss_of
from .memory import Plan, plan_passes, set_checkpointing
from .neftune import with_noise
from .randomness import Randomness
from .schedule import schedule_of

QUICK_EVALUATION_ROWS = 16


def check_dtype(spec: TrainSpec, base: Base) -> None:
    """Raises SpecError unless the loaded base has the dtype that the spec asks for."""
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
    """Raises SpecError unless the loaded base is sharded over these devices, or whole, as the spec asks."""
    asked = spec.hyperparameters.sharding
    fitting = (1, devices.count) if asked == "auto" else (devices.count if asked == "full" else 1,)
    if base.shards not in fitting:
        raise SpecError(
            f"hyperparameters.sharding = '{asked}' on {devices.count} devices, and the base model has "
            f"{base.shards} shard(s); load it as is_sharded(spec, folder, device, devices) says.",
            param="hyperparameters.sharding",
        )


def run_facts(base: Base, data: Data, devices: Devices) -> RunFacts:
    dtype = "bfloat16" if base.dtype == torch.bfloat16 else "float32"
    return RunFacts(
        len(data.training), base.width, context_length(base), dtype, devices.count, sharded=base.shards > 1
    )


@contextmanager
def restored_afterwards(base: Base) -> Iterator[None]:
    """Inside, the base may get adapters and be set up for a run; afterwards it is as before."""
    threads, attention_before = torch.get_num_threads(), base.model.config._attn_implementation
    try:
        yield
    finally:
        detach(base.model)
        set_checkpointing(base.model, False)
        attention.set_attention(base.model, attention_before)
        base.model.eval()
        torch.set_num_threads(threads)


@dataclass
class Run:
    """The state of a run between two steps."""

    asked: TrainSpec
    spec: TrainSpec
    base: Base
    data: Data
    method: Method[Any, Any]
    adapters: dict[str, Adapter]
    """The trained ones, by site."""
    former: Former | None
    """The model that is trained on, if it is not the base."""
    chain: Chain
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    total_steps: int
    micro_batch_tokens: int
    """Most tokens in a pass; less than the spec's after the device ran out of memory."""
    checkpointing: bool
    """Whether gradient checkpointing is on."""
    random: Randomness
    devices: Devices
    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0
    """Time spent in steps, without evaluations and checkpoints."""
    history: list[tuple[int, float, float, int]] = field(default_factory=list)
    """(step, loss, accuracy, trained tokens or pairs) of each step."""
    quick_evaluations: list[tuple[int, float, float]] = field(default_factory=list)
    """(step, loss, accuracy) of each quick evaluation."""
    evaluations: list[Evaluated] = field(default_factory=list)
    evaluated_at: int = -1
    """Step of the last full evaluation, counting those that were due without a validation file."""
    saved_at: int | None = None
    """Step of the newest checkpoint."""
    best_tensors: dict[str, Tensor] | None = None
    """With early stopping: the adapter's tensors at the lowest validation loss, on the CPU."""
    order: tuple[int, np.ndarray] | None = None
    """An epoch and the order of its examples (examples,), computed at its first step."""

    @property
    def hyperparameters(self) -> Hyperparameters:
        return self.spec.hyperparameters

    @property
    def best(self) -> Evaluated | None:
        """With early stopping: the evaluation of the adapter that is exported."""
        return best_of(self.evaluations) if self.hyperparameters.early_stopping_patience else None

    @cached_property
    def loss(self) -> Loss:
        return with_noise(loss_of(self.spec), self.hyperparameters.neftune_alpha)

    @cached_property
    def measure(self) -> Loss:
        """The loss for evaluations."""
        return loss_of(self.spec, evaluating=True)

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    @property
    def exported(self) -> dict[str, Adapter]:
        """The whole update by site: the trained adapters with the frozen ones of earlier runs."""
        return self.chain.exported(self.adapters)

    @property
    def links(self) -> list[Link]:
        """The adapters that the exported one is the sum of."""
        return [*self.chain.links, Link(self.spec.adapter, self.spec.seed, self.total_steps)]

    def record(self, **measured: Any) -> RunRecord:
        """What an export says of the run; `measured` are further fields."""
        held_out = self.data.held_out
        return RunRecord(
            asked=self.asked,
            resolved=self.spec,
            data=self.data.hashes,
            day=self.data.day,
            held_out=None if held_out is None else asdict(held_out),
            links=self.links,
            former=self.former and self.former.digest,
            **measured,
        )

    @cached_property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(len(self.data.training), self.hyperparameters.batch_size)

    @cached_property
    def quick_examples(self) -> Examples | None:
        held_out = self.data.validation
        return None if held_out is None else held_out.first(QUICK_EVALUATION_ROWS)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a checkpoint must have in common with the run that resumes from it."""
        held_out = self.data.validation
        return {
            "spec": hashlib.sha256(identity_text(self.spec).encode()).hexdigest(),
            "training data": self.data.training.digest,
            "validation data": None if held_out is None else held_out.digest,
            "base model": self.base.fingerprint,
            "dtype": str(self.base.dtype),
            **({"model to train on from": self.former.digest} if self.former else {}),
        }

    def rows(self, step: int) -> np.ndarray:
        """The examples of an optimizer step, (batch size,); fewer in the last step of an epoch."""
        epoch, index = divmod(step - 1, self.steps_per_epoch)
        if self.order is None or self.order[0] != epoch:
            self.order = epoch, epoch_order(len(self.data.training), seed=self.spec.seed, epoch=epoch)
        size = self.hyperparameters.batch_size
        return self.order[1][index * size : (index + 1) * size]


def steps_of(hyperparameters: Hyperparameters, examples: int) -> int:
    """Optimizer steps of a run over this number of examples, with resolved hyperparameters."""
    whole = hyperparameters.n_epochs * steps_per_epoch(examples, hyperparameters.batch_size)
    return min(whole, hyperparameters.max_steps or whole)


def start(
    asked: TrainSpec,
    spec: TrainSpec,
    base: Base,
    data: Data,
    sites: list[Site],
    devices: Devices,
    former: Former | None = None,
) -> Generator[Phase, None, tuple[Run, Plan]]:
    """Attaches the adapters, plans the passes and makes the optimizer."""
    devices.barrier()
    built = (yield from build_former(former, base, devices)) if former else {}
    going_on = former is not None and goes_on(former, spec, sites, base.model)
    hyperparameters = spec.hyperparameters
    total_steps = steps_of(hyperparameters, len(data.training))
    schedule = schedule_of(hyperparameters)
    method = method_of(spec, total_steps, schedule, devices)
    packing = base.passes.packing  # before the adapters are attached, since it looks at the bare model
    adapters = yield from build_adapters_with_progress(method, base.model, sites, devices)
    chain = put_under(base.model, former, built, adapters, going_on=going_on) if former else Chain()
    # Devices of different kinds may round an adapter's start differently; now all have the same bits.
    devices.broadcast(adapter_tensors(adapters).values())
    if packing == "segments":
        attention.set_attention(base.model, attention.NAME)
    own_plan = plan_passes(
        spec,
        base,
        adapters,
        data.training,
        loss_of(spec),
        needs_logits=method.needs_logits,
        penalty_copies=method.penalty_copies,
        processes=devices.count,
    )
    plan = devices.broadcast_object(own_plan)
    passes = plan.spec.hyperparameters
    set_checkpointing(base.model, passes.gradient_checkpointing)
    run = Run(
        asked=asked,
        spec=plan.spec,
        base=base,
        data=data,
        method=method,
        adapters=adapters,
        former=former,
        chain=chain,
        optimizer=optimizer_of(method.param_groups(adapters), hyperparameters.learning_rate),
        schedule=schedule,
        total_steps=total_steps,
        micro_batch_tokens=passes.micro_batch_tokens,
        checkpointing=passes.gradient_checkpointing,
        random=Randomness(spec.seed, base.device),
        devices=devices,
    )
    return run, plan


def method_of(spec: TrainSpec, total_steps: int, schedule: Schedule, devices: Devices) -> Method:
    return METHODS[spec.adapter.method](
        spec.adapter,
        seed=spec.seed,
        total_steps=total_steps,
        schedule=schedule,
        weight_decay=spec.hyperparameters.weight_decay,
        devices=devices,
    )


def optimizer_of(groups: list[dict[str, Any]], learning_rate: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=True)


def not_finite(run: Run, what: str) -> TrainingError:
    """An error that says what is not finite, what may help and which checkpoint is left."""
    kept = "There is no checkpoint yet."
    if run.saved_at is not None:
        kept = f"The checkpoint of step {run.saved_at} is kept."
    return TrainingError(
        f"{what} Lower the learning rate (now {run.hyperparameters.learning_rate:g}), or check the data of "
        f"that step for unusual rows. {kept}",
        param="hyperparameters.learning_rate",
        code="not_finite",
    )
