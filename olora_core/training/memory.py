"""What a run needs of the device's memory, and how large its micro-batches may be.

What is in memory already is read off, gradients and moments are counted, and what a pass keeps for its
backward is measured on short rows and scaled: the same for every family, method and loss.
"""

import resource
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..bases.loading import Base
from ..bases.passes import LOGITS_AT_ONCE
from ..data.batches import micro_batches
from ..data.examples import Examples
from ..errors import SpecError, TrainingError
from ..layers.adapter import Adapter
from ..progress import Note
from ..specs import TrainSpec
from .losses import Loss, set_training

PROBE_LENGTHS = (32, 64, 128)
IDEAL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a pass beyond which a device gains no more speed."""
CPU_TOKENS, CPU_BYTES = 512, 192 * 2**20
"""From so many tokens on, a CPU gains a few per cent by more: no pass is larger that takes more bytes."""
USABLE = 0.8
"""Share of the free memory that is planned for; the rest is for fragments and for others."""
LOGIT_BYTES = 10
"""A logit in its own dtype, its gradient likewise, and once in fp32."""
HEAD_BYTES = LOGIT_BYTES * LOGITS_AT_ONCE
CPU_SLACK = 1.25
"""glibc keeps pieces between tensors of many sizes; measured."""
PLAIN = (Tensor, nn.Parameter)
"""Tensors with a storage of their own."""
MEGABYTE = 2**20


@dataclass(frozen=True)
class Estimate:
    """Bytes of one process on one device."""

    used: int
    """By everything that is there before the first step: the base, the adapters, the libraries."""
    free: int
    """What the device could still give."""
    optimizer: int
    """Gradients and AdamW's two moments."""
    passes: tuple[float, float, float]
    """A pass of T tokens in rows of L takes a + b T + c T L bytes at its peak, beside the head's."""
    layers: int
    layer_input: int
    """Bytes a token: what a checkpointed layer keeps."""
    head: int
    """Bytes a token of logits while the loss holds them."""
    penalty: int
    """Bytes a token of what the method's penalty holds."""
    slack: float
    """What the allocator takes for a byte that is asked for."""

    def activations(self, tokens: int, length: int, *, checkpointing: bool = False) -> int:
        """The peak of one forward and backward."""
        a, b, c = self.passes
        whole = a + b * tokens + c * tokens * length
        if checkpointing:
            whole = whole / max(1, self.layers) + tokens * self.layer_input * self.layers
        return int(self.slack * (whole + min(self.head * tokens, HEAD_BYTES) + self.penalty * tokens))

    def added(self, tokens: int, length: int, *, checkpointing: bool = False) -> int:
        """By training, to what is used."""
        return self.optimizer + self.activations(tokens, length, checkpointing=checkpointing)

    def fits(self, tokens: int, length: int, *, checkpointing: bool = False) -> bool:
        return self.added(tokens, length, checkpointing=checkpointing) <= USABLE * self.free


@dataclass(frozen=True)
class Plan:
    """A spec in which every "auto" about passes is a value, and why."""

    spec: TrainSpec
    why: list[str]
    notes: list[Note]


def plan_passes(
    spec: TrainSpec,
    base: Base,
    adapters: Mapping[str, Adapter],
    examples: Examples,
    loss: Loss,
    every_logit: bool,
    penalty_copies: int = 0,
    processes: int = 1,
) -> Plan:
    """Chooses packing, the tokens of a pass and gradient checkpointing, as far as they are "auto".

    The base bears the adapters. `processes` train this job together; on a CPU they share its memory.
    Raises SpecError for what was asked for and this base cannot do.
    """
    asked, why, notes = spec.hyperparameters, [], []
    packing = base.passes.packing is not None if asked.packing == "auto" else asked.packing
    if packing and base.passes.packing is None:
        raise SpecError(
            "hyperparameters.packing: this base model lets packed examples see each other; set it to false.",
            param="hyperparameters.packing",
        )
    if asked.gradient_checkpointing is True and not can_checkpoint(base.model, spec):
        raise SpecError(
            "hyperparameters.gradient_checkpointing: this base model does not offer it; set it to false.",
            param="hyperparameters.gradient_checkpointing",
        )
    if asked.packing == "auto":
        reason = "attention keeps them apart" if packing else "in this base model they would see each other"
        why.append(f"packing = {str(packing).lower()} (examples of one row: {reason})")
    tokens, checkpointing = asked.micro_batch_tokens, asked.gradient_checkpointing
    if tokens == "auto" or checkpointing == "auto":
        estimate = estimate_memory(spec, base, adapters, loss, every_logit, penalty_copies, processes)
        one = int(examples.row_tokens.max() if packing else examples.sides * examples.lengths.max())
        length = int(examples.lengths.max())
        if checkpointing == "auto":
            checkpointing = not estimate.fits(one, length) and can_checkpoint(base.model, spec)
            reason = (
                f"the longest example needs {_mb(estimate.added(one, length))}, {_mb(estimate.free)} are free"
            )
            why.append(f"gradient_checkpointing = {str(checkpointing).lower()} ({reason})")
        if tokens == "auto":
            tokens = _tokens_of_a_pass(estimate, one, length, base.device.type, checkpointing)
            why.append(f"micro_batch_tokens = {tokens} (what one pass holds, by the memory estimate)")
        notes.append(_note(estimate, max(tokens, one), length, checkpointing))
    hyperparameters = asked.model_copy(
        update={"packing": packing, "micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    )
    return Plan(spec.model_copy(update={"hyperparameters": hyperparameters}), why, notes)


def _tokens_of_a_pass(estimate: Estimate, one: int, length: int, device: str, checkpointing: bool) -> int:
    """As many as are fast and fit; `one` are those of the longest example, which has to."""

    def is_too_large(tokens: int) -> bool:
        if not estimate.fits(tokens, length, checkpointing=checkpointing):
            return tokens > one
        taken = estimate.activations(tokens, length, checkpointing=checkpointing)
        return device == "cpu" and tokens > CPU_TOKENS and taken > CPU_BYTES

    tokens = IDEAL_TOKENS.get(device, IDEAL_TOKENS["cuda"])
    while is_too_large(tokens) and tokens > 16:
        tokens //= 2
    return tokens


def _note(estimate: Estimate, tokens: int, length: int, checkpointing: bool) -> Note:
    """The estimate, for the job's events."""
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
    return Note(
        "warn", f"{sentence} That may not be enough: a smaller context_length or rank needs less.", data
    )


def _mb(number: float) -> str:
    return f"{number / MEGABYTE:,.0f} MB"


# --- the estimate --------------------------------------------------------------------------------------


def estimate_memory(
    spec: TrainSpec,
    base: Base,
    adapters: Mapping[str, Adapter],
    loss: Loss,
    every_logit: bool,
    penalty_copies: int = 0,
    processes: int = 1,
) -> Estimate:
    """Counts what is there, and adds what short passes of the base with its adapters take."""
    trained = sum(p.numel() * p.element_size() for a in adapters.values() for p in a.parameters())
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    fused = base.passes.plain_head and not every_logit and spec.type != "dpo"
    head = LOGIT_BYTES * vocabulary if fused else 0
    how = (spec.adapter.model_dump_json(), spec.type, every_logit, base.model.config._attn_implementation)
    if how not in base.pass_bytes:
        base.pass_bytes[how] = _measured(spec, base, loss, every_logit, head)
    used, free = memory_of(base.device)  # with what the libraries took for their first passes
    config = base.model.config.get_text_config()
    return Estimate(
        used=used,
        free=free // processes if base.device.type == "cpu" else free,
        optimizer=3 * trained,
        passes=base.pass_bytes[how],
        layers=getattr(config, "num_hidden_layers", None) or 1,
        layer_input=config.hidden_size * base.model.dtype.itemsize,
        head=head,
        penalty=penalty_copies * vocabulary * base.model.dtype.itemsize,
        slack=CPU_SLACK if base.device.type == "cpu" else 1.1,
    )


def _measured(
    spec: TrainSpec, base: Base, loss: Loss, every_logit: bool, head: int
) -> tuple[float, float, float]:
    """`Estimate.passes`, from short passes as a step makes them, without the `head` bytes a token."""
    sides = 2 if spec.type == "dpo" else 1
    set_training(base.model, spec)
    rows, peaks = [], []
    for length in _probe_lengths(base.model):
        tokens = sides * length
        rows.append([1, tokens, tokens * length])
        try:
            peak = _peak_of_a_pass(base, loss, every_logit, length, sides)
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise TrainingError(
                f"Not even {tokens} tokens of a pass fit into the device's memory beside base and adapter. "
                "Lower adapter.rank, or use a larger device or a smaller base.",
                code="out_of_memory",
            ) from None
        peaks.append(max(0, peak - min(head * tokens, HEAD_BYTES)))
    a, b, c = np.linalg.lstsq(np.array(rows, dtype=float), np.array(peaks, dtype=float), rcond=None)[0]
    return float(max(0.0, a)), float(b), float(max(0.0, c))


def _probe_lengths(model: PreTrainedModel) -> tuple[int, ...]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_LENGTHS[-1]
    shrink = max(1, -(-PROBE_LENGTHS[-1] // limit))
    return tuple(max(2, length // shrink) for length in PROBE_LENGTHS)


def _peak_of_a_pass(base: Base, loss: Loss, every_logit: bool, length: int, sides: int) -> int:
    """Bytes that one forward and backward of `sides` rows of this length holds at most."""
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
        loss(model, batch.to(base.device), base.passes, every_logit=every_logit).total.backward()
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated(base.device) - before if cuda else live.peak


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive at once; a CPU keeps no such count."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(t.untyped_storage()) for t in tree_leaves((args, kwargs)) if type(t) in PLAIN}
        made = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if type(tensor) in PLAIN and id(storage := tensor.untyped_storage()) not in known | self._seen:
                self._seen.add(id(storage))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        return made

    def _freed(self, place: int, size: int) -> None:
        self._seen.discard(place)
        self.now -= size


def memory_of(device: torch.device) -> tuple[int, int]:
    """Bytes in use by this process, and bytes that it could still have."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        allocated = torch.cuda.memory_allocated(device)
        return allocated, free + torch.cuda.memory_reserved(device) - allocated
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    return pages * resource.getpagesize(), min(free, *_control_group_rest())


def _control_group_rest() -> list[int]:
    """What this process's control group may still take, where it has a limit."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, now = ((folder / f"memory.{name}").read_text().strip() for name in ("max", "current"))
    except OSError:
        return [2**62]
    return [max(0, int(limit) - int(now))] if limit.isdigit() else [2**62]


def is_out_of_memory(error: BaseException) -> bool:
    """Also as a CPU says it."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


# --- gradient checkpointing ----------------------------------------------------------------------------


def can_checkpoint(model: PreTrainedModel, spec: TrainSpec) -> bool:
    """Whether the blocks of this base can be computed once more in the backward."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # For DPO a block is told that it trains (see `set_training`), and then must not drop anything itself.
    drops = any(isinstance(rate := getattr(block, "dropout", 0), float) and rate for block in blocks)
    return bool(model.supports_gradient_checkpointing and blocks) and not (drops and spec.type == "dpo")


def set_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Whether the blocks keep only their inputs, and are computed once more in the backward."""
    # What transformers called "gradient checkpointing" is "activation checkpointing" in its later versions.
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if wanted:
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": False})
    elif getattr(model, f"is_{name}_checkpointing"):
        getattr(model, f"{name}_checkpointing_disable")()
