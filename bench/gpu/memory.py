"""The peak of memory that a job predicts against the measured one, and what it does when a pass does not fit.

    python -m bench.gpu.memory --device cpu --tiny

The prediction is the one in the job's own events, before its first step. Then the device is allowed less than
a pass takes: the run must say so, halve its passes and come to the losses that it has with room.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from olora_core.bases.loading import Base, load_base
from olora_core.progress import Finished, Note, Resolved, Step
from olora_core.training.step import forget_peak_memory
from olora_core.training.train import train

from .report import Report, Task, main
from .runs import Parts, each, make_base, spec_for, write_rows

BaseOf = Callable[[str, torch.dtype], Base]
BAND = (0.75, 1.25)
"""Predicted over measured, of what training adds to the memory in use; the band that it keeps on a CPU."""
TOKENS = {"cpu": 2048, "cuda": 16384}
"""Of a step: a full pass, where the device has room for the largest that a job plans."""
STEPS = 3
ROOM = 0.7
"""Share of what a pass takes that the device is left with: too little for a whole one, enough for half."""
SAME = 1e-4
"""Relative difference of two fp32 losses that come by passes of other sizes."""


# --- predicted and measured ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A job whose step is one full pass."""

    dtype: torch.dtype
    length: int
    """Tokens of every row."""
    options: dict[str, Any] = field(default_factory=dict)
    type: str = "supervised"
    model: str = "plain"


SETTINGS = {
    "bf16, packed, short rows": Setting(torch.bfloat16, 64, {"packing": True}),
    "fp32, padded, long rows": Setting(torch.float32, 1024, {"packing": False}),
    "bf16, packed, long rows, blocks checkpointed": Setting(
        torch.bfloat16, 1024, {"packing": True, "gradient_checkpointing": True}
    ),
    "DPO in bf16, packed": Setting(torch.bfloat16, 128, {"packing": True}, type="dpo"),
    "bf16, packed, a large vocabulary": Setting(torch.bfloat16, 256, {"packing": True}, model="large head"),
    "bf16, padded, short rows": Setting(torch.bfloat16, 64, {"packing": False}),
}
MODELS = {
    "plain": {"width": 768, "layers": 12, "heads": 12, "vocabulary": 32_000, "context": 1024},
    "large head": {"width": 768, "layers": 4, "heads": 12, "vocabulary": 151_936, "context": 1024},
}
TINY = {"width": 64, "layers": 2, "heads": 4}


def equal_rows(base: Base, count: int, length: int, type: str) -> Iterator[dict[str, Any]]:
    """Rows of exactly `length` tokens, nearly all of them trained, as the estimate takes them to be."""

    def said(role: str, content: str) -> list[dict[str, str]]:
        return [{"role": role, "content": content}]

    asked = said("user", "the")
    around = len(base.tokenizer.apply_chat_template(asked + said("assistant", "the"))["input_ids"])
    better, worse = (said("assistant", "the" + word * (length - around)) for word in (" the", " of"))
    row: dict[str, Any] = {"messages": asked + better}
    if type == "dpo":
        row = {"input": {"messages": asked}, "preferred_output": better, "non_preferred_output": worse}
    return (row for _ in range(count))


def predicts(report: Report, name: str, setting: Setting, base_of: BaseOf, training: Path) -> None:
    """The estimate in the job's events against the peak of its first steps."""
    base = base_of(setting.model, setting.dtype)
    rows = TOKENS[base.device.type] // (setting.length * (2 if setting.type == "dpo" else 1))
    write_rows(training, equal_rows(base, STEPS * rows, setting.length, setting.type))
    spec = spec_for("olora", base, type=setting.type, batch_size=rows, **setting.options)
    for said in train(spec, base, training, None, training.parent / "run"):
        if isinstance(said, Note) and "peak_bytes" in (said.data or {}):
            predicted = said.data
            forget_peak_memory(base.device)
        elif isinstance(said, Step) and said.step == STEPS:
            measured, tokens = said.memory_bytes, said.tokens
            break
    used = predicted["used_bytes"]
    added = measured - used  # less than nothing where a CPU's heap had room left by the job before
    ratio = (predicted["peak_bytes"] - used) / added if added > 0 else None
    figures = {
        "ratio_of_added": ratio,
        "ratio_of_peaks": predicted["peak_bytes"] / measured,
        "predicted_bytes": predicted["peak_bytes"],
        "measured_bytes": measured,
        "used_bytes": used,
        "tokens_of_a_pass": predicted["tokens"],
        "tokens_of_a_step": tokens,
    }
    if base.device.type == "cuda":
        passed = ratio is not None and BAND[0] <= ratio <= BAND[1]
        report.check(name, passed, band=BAND, **figures)
    else:
        report.figures(name, **figures)


# --- out of memory -------------------------------------------------------------------------------------


def runs_out(report: Report, name: str, base_of: BaseOf, training: Path) -> None:
    """The same run with room for its passes and without."""
    base = base_of("plain", torch.float32)
    tokens, length, folder = TOKENS[base.device.type], 128, training.parent / "run"
    write_rows(training, equal_rows(base, STEPS * tokens // length, length, "supervised"))
    given = {"micro_batch_tokens": tokens, "packing": True, "gradient_checkpointing": False}
    spec = spec_for("lora", base, batch_size=tokens // length, **given)
    expected: list[float] = []
    for said in train(spec, base, training, None, folder):
        if isinstance(said, Resolved):
            forget_peak_memory(base.device)
            used = allocated(base.device)
        elif isinstance(said, Step):
            expected.append(said.loss)
            pass_bytes = said.memory_bytes - used
            if said.step == STEPS:
                break
    losses, warnings = [], []
    with ExitStack() as limits:
        for said in train(spec, base, training, None, folder):
            if isinstance(said, Resolved):
                limits.callback(limited(base, pass_bytes, tokens))
            elif isinstance(said, Note) and "ran out of memory" in said.message:
                warnings.append(said)
            elif isinstance(said, Step):
                losses.append(said.loss)
                if said.step == STEPS:
                    limits.close()  # the certificate takes memory of its own
            elif isinstance(said, Finished):
                certified = said.certificate["passed"]
    apart = [abs(a - b) / b for a, b in zip(losses, expected, strict=True)]
    halved = [note.data["micro_batch_tokens"] for note in warnings]
    passed = len(warnings) > 0 and halved[0] <= tokens // 2 and max(apart) <= SAME and certified
    figures = {"tokens_of_a_pass": [tokens, *halved], "largest_relative_loss_difference": max(apart)}
    report.check(name, passed, **figures, pass_bytes=pass_bytes, said=[note.message for note in warnings])


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a GPU; a CPU's are not asked for."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def limited(base: Base, pass_bytes: int, tokens: int) -> Callable[[], None]:
    """From here on a whole pass does not fit, until what is returned is called.

    A GPU's allocator gets a limit. On a CPU, where the system would end the process, the first norm refuses.
    """
    if base.device.type == "cuda":
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved(base.device) + ROOM * pass_bytes
        whole = torch.cuda.get_device_properties(base.device).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / whole, base.device)
        return partial(torch.cuda.set_per_process_memory_fraction, 1.0, base.device)

    def refuse(module: nn.Module, inputs: tuple[Tensor]) -> None:
        if inputs[0].shape[:-1].numel() > ROOM * tokens and torch.is_grad_enabled():
            raise MemoryError("the device is full")

    return base.model.model.layers[0].input_layernorm.register_forward_pre_hook(refuse).remove


# --- the section ---------------------------------------------------------------------------------------


def run(task: Task, report: Report) -> None:
    rows = task.scratch / "rows.jsonl"

    @cache
    def base_of(model: str, dtype: torch.dtype) -> Base:
        folder = task.scratch / f"{model} in {dtype}"
        sizes = dict(MODELS[model])
        if task.tiny:
            sizes |= TINY | {"vocabulary": sizes["vocabulary"] // 4}
        make_base(folder, "llama", torch.bfloat16, task.device, **sizes)
        return load_base(folder, name="bench", device=task.device, dtype=dtype)

    def parts() -> Parts:
        for name, setting in SETTINGS.items():
            yield name, predicts, setting, base_of, rows
            if setting.dtype == torch.float32:  # two losses are compared
                yield "a pass that does not fit", runs_out, base_of, rows

    each(report, parts())


if __name__ == "__main__":
    main(run)
