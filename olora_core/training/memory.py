"""How much memory a run needs, and how large its micro-batches can be.

Memory in use is read from the device, gradients and moments are counted, and what a forward pass keeps for
its backward is measured on short rows and scaled. So the same code serves every model family, method and
loss.
"""

import resource
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..bases.loading import Base
from ..bases.passes import LOGITS_AT_ONCE, most_positions
from ..data.batches import micro_batches
from ..data.examples import Examples
from ..errors import SpecError, TrainingError
from ..layers.adapter import Adapter
from ..progress import Note
from ..specs import TrainSpec
from .losses import Loss, set_training

PROBE_LENGTHS = (32, 64, 128)
IDEAL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a pass from which on more tokens make a device no faster."""
CPU_TOKENS, CPU_SHARE = 512, 1 / 8
"""On a CPU a pass has more tokens than this only if it takes at most this share of the machine's memory, not
of what is free: so the same job has the same passes again. 2,048 tokens gain a fifth to two fifths."""
USABLE = 0.8
"""Share of the free memory that a plan uses; the rest is for fragmentation and for other processes."""
LOGIT_BYTES = 10
"""For each logit: its value and its gradient in the model's dtype, and one fp32 copy."""
HEAD_BYTES = LOGIT_BYTES * LOGITS_AT_ONCE
CPU_SLACK = 1.25
"""Bytes that glibc takes for each byte requested, measured: it fragments between tensors of many sizes."""
PLAIN = (Tensor, nn.Parameter)
"""Types of tensors that have their own storage."""
MEGABYTE = 2**20
CONTROL_GROUP = Path("/sys/fs/cgroup")
"""The folder of this process's control group, as a container sees it."""


@dataclass(frozen=True)
class Estimate:
    """Memory of one process on one device, in bytes."""

    used: int
    """In use before the first step: the base, the adapters, the libraries."""
    free: int
    """Still available on the device."""
    optimizer: int
    """Gradients and AdamW's two moments."""
    passes: tuple[float, float, float]
    """(a, b, c): a pass of T tokens in rows of length L peaks at a + b T + c T L bytes, without the head."""
    layers: int
    """Number of blocks."""
    layer_input: int
    """Bytes per token that a block keeps under gradient checkpointing."""
    head: int
    """Bytes per token of logits, while the loss holds them."""
    penalty: int
    """Bytes per token that the method's penalty holds."""
    slack: float
    """Bytes that the allocator takes for each byte requested."""
    whole: int
    """The device's memory; on a CPU each process's part of it."""

    def activations(self, tokens: int, length: int, *, checkpointing: bool = False) -> int:
        """Peak of one forward and backward pass of `tokens` in rows of `length`."""
        a, b, c = self.passes
        whole = a + b * tokens + c * tokens * length
        if checkpointing:
            # One block at a time keeps its activations; every block keeps its input.
            whole = whole / max(1, self.layers) + tokens * self.layer_input * self.layers
        return int(self.slack * (whole + min(self.head * tokens, HEAD_BYTES) + self.penalty * tokens))

    def added(self, tokens: int, length: int, *, checkpointing: bool = False) -> int:
        """Peak of a training step, on top of what is in use."""
        return self.optimizer + self.activations(tokens, length, checkpointing=checkpointing)

    def fits(self, tokens: int, length: int, *, checkpointing: bool = False) -> bool:
        return self.added(tokens, length, checkpointing=checkpointing) <= USABLE * self.free


@dataclass(frozen=True)
class Plan:
    """The spec with packing, micro-batches and checkpointing resolved, and the reasons."""

    spec: TrainSpec
    why: list[str]
    notes: list[Note]


def plan_passes(
    spec: TrainSpec,
    base: Base,
    adapters: Mapping[str, Adapter],
    examples: Examples,
    loss: Loss,
    *,
    needs_logits: bool,
    penalty_copies: int = 0,
    processes: int = 1,
) -> Plan:
    """Chooses packing, the tokens of a pass and gradient checkpointing where they are "auto".

    The adapters must be attached to the base. `processes` is the number that train this job; on a CPU they
    share its memory. Raises SpecError for an option that this base does not support.
    """
    asked, why, notes = spec.hyperparameters, [], []
    packing = _checked_packing(spec, base)
    if asked.packing == "auto":
        reason = "keeps packed examples apart" if packing else "would let packed examples see each other"
        why.append(f"packing = {str(packing).lower()} (auto: this base model {reason})")
    tokens, checkpointing = asked.micro_batch_tokens, asked.gradient_checkpointing
    if tokens == "auto" or checkpointing == "auto":
        estimate = estimate_memory(
            spec,
            base,
            adapters,
            loss,
            needs_logits=needs_logits,
            penalty_copies=penalty_copies,
            processes=processes,
        )
        one = int(
            examples.row_tokens.max() if packing else examples.rows_per_example * examples.lengths.max()
        )
        length = int(examples.lengths.max())
        if checkpointing == "auto":
            checkpointing = not estimate.fits(one, length) and can_checkpoint(base.model, spec)
            needed, free = _mb(estimate.added(one, length)), _mb(estimate.free)
            why.append(
                f"gradient_checkpointing = {str(checkpointing).lower()} (auto: the longest example needs "
                f"{needed}, {free} are free)"
            )
        if tokens == "auto":
            tokens = _tokens_of_a_pass(estimate, one, length, base.device.type, checkpointing)
            why.append(f"micro_batch_tokens = {tokens} (auto: from the memory estimate)")
        notes.append(_note(estimate, max(tokens, one), length, checkpointing))
    hyperparameters = asked.model_copy(
        update={"packing": packing, "micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    )
    return Plan(spec.model_copy(update={"hyperparameters": hyperparameters}), why, notes)


def _checked_packing(spec: TrainSpec, base: Base) -> bool:
    """Whether examples are packed. Raises SpecError for an option that this base does not support."""
    asked, can_pack = spec.hyperparameters, base.passes.packing is not None
    packing = can_pack if asked.packing == "auto" else asked.packing
    if packing and not can_pack:
        raise SpecError(
            "hyperparameters.packing: this base model lets packed examples see each other; set it to false.",
            param="hyperparameters.packing",
        )
    if asked.gradient_checkpointing is True and not can_checkpoint(base.model, spec):
        raise SpecError(
            "hyperparameters.gradient_checkpointing: this base model does not offer it; set it to false.",
            param="hyperparameters.gradient_checkpointing",
        )
    return packing


def _tokens_of_a_pass(estimate: Estimate, one: int, length: int, device: str, checkpointing: bool) -> int:
    """The most tokens that are fast and fit; those of the longest example (`one`) have to."""

    def is_too_large(tokens: int) -> bool:
        if not estimate.fits(tokens, length, checkpointing=checkpointing):
            return tokens > one
        taken = estimate.activations(tokens, length, checkpointing=checkpointing)
        return device == "cpu" and tokens > CPU_TOKENS and taken > CPU_SHARE * estimate.whole

    tokens = IDEAL_TOKENS.get(device, IDEAL_TOKENS["cuda"])
    while is_too_large(tokens) and tokens > 16:
        tokens //= 2
    return tokens


def _note(estimate: Estimate, tokens: int, length: int, checkpointing: bool) -> Note:
    """The estimate as an event of the job."""
    activations = estimate.activations(tokens, length, checkpointing=checkpointing)
    data = {
        "used_bytes": estimate.used,
        "free_bytes": estimate.free,
        "optimizer_bytes": estimate.optimizer,
        "activation_bytes": activations,
        "peak_bytes": estimate.used + estimate.optimizer + activations,
        "tokens": tokens,
    }
    sentence = (
        f"Estimated peak memory {_mb(data['peak_bytes'])}: {_mb(estimate.used)} in use now, "
        f"{_mb(estimate.optimizer)} for gradients and moments, {_mb(activations)} for a pass of {tokens} "
        f"tokens; {_mb(estimate.free)} are free."
    )
    if estimate.fits(tokens, length, checkpointing=checkpointing):
        return Note("info", sentence, data)
    return Note("warn", f"{sentence} That may not be enough; lower context_length or adapter.rank.", data)


def _mb(number: float) -> str:
    return f"{number / MEGABYTE:,.0f} MB"


# --- the estimate --------------------------------------------------------------------------------------


def estimate_memory(
    spec: TrainSpec,
    base: Base,
    adapters: Mapping[str, Adapter],
    loss: Loss,
    *,
    needs_logits: bool,
    penalty_copies: int = 0,
    processes: int = 1,
) -> Estimate:
    """Estimates a step's memory; the first call for a base and method measures three short passes."""
    trained = sum(p.numel() * p.element_size() for a in adapters.values() for p in a.parameters())
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    fused = base.passes.plain_head and not needs_logits and spec.type != "dpo"
    head = LOGIT_BYTES * vocabulary if fused else 0
    how = (spec.adapter.model_dump_json(), spec.type, needs_logits, base.model.config._attn_implementation)
    if how not in base.pass_bytes:
        base.pass_bytes[how] = _measured(spec, base, loss, needs_logits, head)
    used, free, whole = memory_of(base.device)  # after the passes, for which the libraries allocate too
    shared_by = processes if base.device.type == "cpu" else 1
    config = base.model.config.get_text_config()
    return Estimate(
        used=used,
        free=free // shared_by,
        optimizer=3 * trained,
        passes=base.pass_bytes[how],
        layers=getattr(config, "num_hidden_layers", None) or 1,
        layer_input=base.width * base.model.dtype.itemsize,
        head=head,
        penalty=penalty_copies * vocabulary * base.model.dtype.itemsize,
        slack=CPU_SLACK if base.device.type == "cpu" else 1.1,
        whole=whole // shared_by,
    )


def _measured(
    spec: TrainSpec, base: Base, loss: Loss, needs_logits: bool, head: int
) -> tuple[float, float, float]:
    """`Estimate.passes`, fitted to short passes as in a step, without the head's `head` bytes per token."""
    sides = 2 if spec.type == "dpo" else 1
    set_training(base.model, spec)
    rows, peaks = [], []
    for length in _probe_lengths(base.model):
        tokens = sides * length
        rows.append([1, tokens, tokens * length])
        try:
            peak = _peak_of_a_pass(base, loss, needs_logits, length, sides)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"A forward pass of only {tokens} tokens does not fit into the device's memory beside base "
                "and adapter. Lower adapter.rank, or use a larger device or a smaller base.",
                code="out_of_memory",
            ) from None
        peaks.append(max(0, peak - min(head * tokens, HEAD_BYTES)))
    return fitted(np.array(rows, dtype=float), np.array(peaks, dtype=float))


def fitted(rows: np.ndarray, peaks: np.ndarray) -> tuple[float, float, float]:
    """a, b and c of `a + b T + c T L`, by least squares; a and c are not negative.

    `rows` (n, 3) holds (1, T, T L) of each pass of T tokens in rows of L, `peaks` (n,) its bytes.
    """
    a, b, c = np.linalg.lstsq(rows, peaks, rcond=None)[0]
    if c < 0:  # nothing grows with T L; cut off alone, it would leave b too steep
        (a, b), c = np.linalg.lstsq(rows[:, :2], peaks, rcond=None)[0], 0.0
    return float(max(0.0, a)), float(b), float(c)


def _probe_lengths(model: PreTrainedModel) -> tuple[int, ...]:
    limit = most_positions(model) or PROBE_LENGTHS[-1]
    shrink = max(1, -(-PROBE_LENGTHS[-1] // limit))
    return tuple(max(2, length // shrink) for length in PROBE_LENGTHS)


def _peak_of_a_pass(base: Base, loss: Loss, needs_logits: bool, length: int, sides: int) -> int:
    """Bytes at the peak of one forward and backward of an example with `sides` rows of this length."""
    model, cuda = base.model, base.device.type == "cuda"
    trained = np.arange(length) > 0  # every token that can be
    example = Examples(
        np.tile(np.arange(length, dtype=np.uint32) % model.get_input_embeddings().weight.shape[0], sides),
        np.tile(trained, sides),
        np.arange(sides + 1, dtype=np.int64) * length,
        np.zeros(1, dtype=np.int64),
        sides,
    )
    (batch,) = micro_batches(example, np.arange(1), size=1, tokens=1, packing=False, pad_token=0)
    if cuda:
        torch.cuda.reset_peak_memory_stats(base.device)
        before = torch.cuda.memory_allocated(base.device)
    live = LiveBytes()
    with torch.random.fork_rng(devices=[base.device] if cuda else []), live:
        loss(model, batch.to(base.device), base.passes, needs_logits=needs_logits).total.backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(base.device) - before if cuda else live.peak


class LiveBytes(TorchDispatchMode):
    """Measures the peak of the bytes of tensors made inside, which torch does not do for a CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        made = operation(*args, **kwargs)
        new = {id(storage): storage for storage in _storages(made) if id(storage) not in self._seen}
        if new:
            given = {id(storage) for storage in _storages([*args, *kwargs.values()])}
            for place, storage in new.items():
                if place not in given:  # it is no view of what was there before
                    self._seen.add(place)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._freed, place, storage.nbytes())
        return made

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def _storages(value: Any) -> Iterator[torch.UntypedStorage]:
    """Those of the tensors in what an operation takes or makes, which has no more than lists of them."""
    if type(value) in PLAIN:
        yield value.untyped_storage()
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _storages(item)


def memory_of(device: torch.device) -> tuple[int, int, int]:
    """Bytes that this process uses, bytes still available to it, and the size of the device's memory."""
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        return allocated, free + torch.cuda.memory_reserved(device) - allocated, whole
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, whole = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, rest = _control_group()
    return pages * resource.getpagesize(), min(free, rest), min(whole, limit)


def _control_group() -> tuple[int, int]:
    """The limit of this process's control group and what is left of it; 2^62 each without one."""
    try:
        limit, now = ((CONTROL_GROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return 2**62, 2**62
    return (int(limit), max(0, int(limit) - int(now))) if limit.isdigit() else (2**62, 2**62)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a GPU or on a CPU, whose allocator raises a RuntimeError."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# --- gradient checkpointing ----------------------------------------------------------------------------


def can_checkpoint(model: PreTrainedModel, spec: TrainSpec) -> bool:
    """Whether this base supports gradient checkpointing for this type of training."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # In DPO a checkpointed block is set to training mode (see `set_training`), so it must have no dropout.
    drops = any(isinstance(rate := getattr(block, "dropout", 0), float) and rate for block in blocks)
    return bool(model.supports_gradient_checkpointing and blocks) and not (drops and spec.type == "dpo")


def set_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Turns gradient checkpointing on or off: blocks then keep only their inputs and recompute the rest."""
    # What transformers called "gradient checkpointing" is "activation checkpointing" in its later versions.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{name}_checkpointing"):
        getattr(model, f"{name}_checkpointing_disable")()
