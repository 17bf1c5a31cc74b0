"""What a run needs of the device's memory, and how large its micro-batches may be.

What is in memory already is read off, gradients and moments are counted, and what a pass keeps for its
backward is measured on short rows and scaled: the same for every family, method and loss.
"""

import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .adapter import Adapter
from .batches import micro_batches
from .errors import SpecError
from .examples import Examples
from .losses import LOGITS_AT_ONCE, Loss, set_training
from .model import Base
from .progress import Note
from .specs import TrainSpec

PROBE_LENGTHS = (32, 64, 128)
IDEAL_TOKENS = {"cpu": 2048, "cuda": 16384}
"""Tokens of a pass beyond which a device gains no more speed."""
USABLE = 0.8
"""Share of the free memory that is planned for; the rest is for fragments and for others."""
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
    saved: tuple[float, float, float]
    """a + b T + c T L bytes are kept for the backward of T tokens in rows of L."""
    layers: int
    layer_input: int
    """Bytes a token: what a checkpointed layer keeps."""
    head: int
    """The piece of logits that the loss holds at a time, at most."""

    def activations(self, tokens: int, length: int, *, checkpointing: bool = False) -> int:
        """Kept for the backward, and what the backward of one layer adds to it."""
        a, b, c = self.saved
        whole = a + b * tokens + c * tokens * length
        layer = whole / max(1, self.layers)
        kept = tokens * self.layer_input * self.layers + layer if checkpointing else whole
        return int(kept + max(self.head, layer))

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
) -> Plan:
    """Chooses packing, the tokens of a pass and gradient checkpointing, as far as they are "auto".

    The base bears the adapters. Raises SpecError for what was asked for and this base cannot do.
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
        estimate = estimate_memory(spec, base, adapters, loss, every_logit)
        one = int(examples.row_tokens.max() if packing else examples.sides * examples.lengths.max())
        length = int(examples.lengths.max())
        if checkpointing == "auto":
            checkpointing = not estimate.fits(one, length) and can_checkpoint(base.model, spec)
            reason = (
                f"the longest example needs {_mb(estimate.added(one, length))}, {_mb(estimate.free)} are free"
            )
            why.append(f"gradient_checkpointing = {str(checkpointing).lower()} ({reason})")
        if tokens == "auto":
            tokens = IDEAL_TOKENS.get(base.device.type, IDEAL_TOKENS["cuda"])
            while tokens > one and not estimate.fits(tokens, length, checkpointing=checkpointing):
                tokens //= 2
            tokens = max(tokens, min(one, 16), 16)
            why.append(f"micro_batch_tokens = {tokens} (what one pass holds, by the memory estimate)")
        notes.append(_note(estimate, max(tokens, one), length, checkpointing))
    hyperparameters = asked.model_copy(
        update={"packing": packing, "micro_batch_tokens": tokens, "gradient_checkpointing": checkpointing}
    )
    return Plan(spec.model_copy(update={"hyperparameters": hyperparameters}), why, notes)


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
    spec: TrainSpec, base: Base, adapters: Mapping[str, Adapter], loss: Loss, every_logit: bool
) -> Estimate:
    """Measures short passes of the base with its adapters, as a step makes them."""
    used, free = memory_of(base.device)
    trained = sum(p.numel() * p.element_size() for a in adapters.values() for p in a.parameters())
    sides = 2 if spec.type == "dpo" else 1
    set_training(base.model, spec)
    points = [
        (sides * length, length, _saved_bytes(spec, base, loss, every_logit, length, sides))
        for length in _probe_lengths(base.model)
    ]
    matrix = np.array([[1, tokens, tokens * length] for tokens, length, _ in points], dtype=float)
    a, b, c = np.linalg.lstsq(matrix, np.array([saved for *_, saved in points], dtype=float), rcond=None)[0]
    config = base.model.config.get_text_config()
    vocabulary = base.model.get_input_embeddings().weight.shape[0]
    return Estimate(
        used=used,
        free=free,
        optimizer=3 * trained,
        saved=(float(max(0.0, a)), float(b), float(max(0.0, c))),
        layers=getattr(config, "num_hidden_layers", None) or 1,
        layer_input=config.hidden_size * base.model.dtype.itemsize,
        head=10 * max(LOGITS_AT_ONCE, vocabulary),  # bytes: logits twice in their dtype, once in fp32
    )


def _probe_lengths(model: PreTrainedModel) -> tuple[int, ...]:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROBE_LENGTHS[-1]
    shrink = max(1, -(-PROBE_LENGTHS[-1] // limit))
    return tuple(max(2, length // shrink) for length in PROBE_LENGTHS)


def _saved_bytes(spec: TrainSpec, base: Base, loss: Loss, every_logit: bool, length: int, sides: int) -> int:
    """What autograd keeps of one forward of `sides` rows of this length, beside the base and adapters."""
    rows = np.arange(1, length + 1, dtype=np.uint32) % base.model.get_input_embeddings().weight.shape[0]
    trained = np.arange(length) >= max(1, length // 2)
    example = Examples(
        np.tile(rows, sides),
        np.tile(trained, sides),
        np.arange(sides + 1, dtype=np.int64) * length,
        np.zeros(1, dtype=np.int64),
        sides,
    )
    (batch,) = micro_batches(example, np.arange(1), size=1, tokens=1, packing=False, pad_token=0)
    known = {t.untyped_storage().data_ptr() for t in (*base.model.parameters(), *base.model.buffers())}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and (place := tensor.untyped_storage().data_ptr()) not in known:
            kept.setdefault(place, tensor)
        return tensor

    on = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices=on), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss(base.model, batch.to(base.device), base.passes, every_logit=every_logit)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


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


# --- gradient checkpointing ----------------------------------------------------------------------------


def can_checkpoint(model: PreTrainedModel, spec: TrainSpec) -> bool:
    """Whether the blocks of this base can be computed once more in the backward."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    # For DPO a block is told that it trains (see `set_training`), and then must not drop anything itself.
    drops = any(isinstance(rate := getattr(block, "dropout", 0), float) and rate for block in blocks)
    return bool(model.supports_gradient_checkpointing and blocks) and not (drops and spec.type == "dpo")


def set_checkpointing(model: PreTrainedModel, wanted: bool) -> None:
    """Whether the blocks keep only their inputs, and are computed once more in the backward."""
    if wanted:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    elif model.is_activation_checkpointing:
        model.activation_checkpointing_disable()
