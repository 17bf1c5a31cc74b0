"""One step of ours under torch's profiler: its kernels, its waits for the device, and what launches cost."""

import re
import warnings
from collections import Counter
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from olora_core.bases.loading import Base
from olora_core.data.batches import micro_batches
from olora_core.training.run import Run

from .measuring import START_SECONDS, WARM_UP, Section, finish, free_memory, one_step, prepared, seconds_of
from .shapes import Shape, full_rows

TOP, NAME_LENGTH = 25, 160
SHORT_PASS = 64
"""Tokens of a pass that leaves the device next to nothing to do."""


def profile_shape(section: Section, base: Base, shape: Shape) -> None:
    """One step of LoRA at its best: kernels, operators, waits for the device, and what launches cost."""
    report, size, device = section.report, section.size, section.task.device
    best = section.best(shape, "lora")
    name = f"{shape.name}: profile"
    if best is None:
        report.skip(name, "No configuration of it has run.")
        return
    if not section.has_time(name, 0.0, START_SECONDS["profile"]):
        return
    examples = full_rows(shape, size.length, best.rows * (WARM_UP + 2))
    with prepared(base, "lora", examples, best.rows, best.rows * size.length) as (started, _):
        for _ in range(WARM_UP):
            one_step(started)
        finish(device)
        waits = waits_of(started, device)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
        with profile(activities=activities, record_shapes=True) as recorded:
            one_step(started)
            finish(device)
        launches = launch_seconds(started, shape)
    free_memory(device)
    kernels, operators = tables(recorded, device)
    busy = sum(kernel["us"] for kernel in kernels) / 1e6
    report.figures(
        name,
        rows=best.rows,
        seconds_per_step=best.seconds_per_step,
        device_seconds=busy,
        busy=busy / best.seconds_per_step,
        launches=sum(kernel["calls"] for kernel in kernels),
        launch_seconds_per_pass=launches,
        is_launch_bound=launches > 0.9 * best.seconds_per_step,
        by_kind=shares(kernels),
        waits=waits,
        kernels=kernels[:TOP],
        operators=operators[:TOP],
    )


def waits_of(started: Run, device: str) -> dict[str, int]:
    """Where one step waits for the device, and how often: `file:line`. Only a GPU tells."""
    if device != "cuda":
        one_step(started)
        return {}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one_step(started)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = [w for w in caught if "called a synchronizing" in str(w.message)]
    return dict(Counter(f"{'/'.join(w.filename.split('/')[-2:])}:{w.lineno}" for w in lines))


def launch_seconds(started: Run, shape: Shape) -> float:
    """Of a forward and backward over a few tokens: what the CPU needs to launch the kernels of any pass.

    The device's own time is little then. The head's loss has fewer pieces than for many tokens.
    """
    examples = full_rows(shape, SHORT_PASS, 1)
    (batch,) = micro_batches(examples, np.arange(1), size=1, tokens=SHORT_PASS, packing=True, pad_token=0)
    model, passes = started.base.model, started.base.passes
    if passes.packing is None:
        (batch,) = micro_batches(
            examples, np.arange(1), size=1, tokens=SHORT_PASS, packing=False, pad_token=0
        )
    batch = batch.to(started.base.device)

    def one_pass() -> None:
        started.loss(model, batch, passes).total.backward()

    seconds = seconds_of(one_pass, started.base.device.type, rounds=5)
    started.optimizer.zero_grad(set_to_none=True)
    return seconds


def tables(recorded: profile, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The device's kernels, and torch's operators by the shapes of their inputs; the longest first.

    On a CPU there are no kernels: both are operators, by their own CPU time.
    """
    averages = recorded.key_averages(group_by_input_shape=True)
    own = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    on_cpu = [event for event in averages if event.device_type == DeviceType.CPU]
    on_device = [event for event in averages if event.device_type != DeviceType.CPU]
    kernels: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in on_device if device == "cuda" else on_cpu:
        if not event.is_user_annotation:
            kernels[short(event.key)] += getattr(event, own)
            calls[short(event.key)] += event.count
    total = sum(kernels.values()) or 1.0
    operators = [
        {
            "name": event.key,
            "shapes": str(event.input_shapes)[:NAME_LENGTH],
            "us": round(getattr(event, own), 1),
            "cpu_us": round(event.self_cpu_time_total, 1),
            "calls": event.count,
        }
        for event in sorted(on_cpu, key=lambda event: -getattr(event, own))
        if getattr(event, own) > 0
    ]
    named = [
        {"name": name, "us": round(us, 1), "calls": calls[name], "share": us / total}
        for name, us in kernels.most_common()
    ]
    return named, operators


def short(kernel: str) -> str:
    """A kernel's name without what all have."""
    return re.sub(r"^void |at::native::|c10::|\(anonymous namespace\)::|at::cuda::", "", kernel)[:NAME_LENGTH]


KINDS = {
    "attention": r"flash|fmha|attention|sdpa",
    "gemm": r"gemm|gemv|nvjet|cutlass|cublas|splitk|::mm\b|addmm|bmm|linear|matmul",
    "reduction": r"reduce|softmax|_norm|sum|mean|argmax|max\b",
    "elementwise": r"elementwise|copy|cat|fill|mul|add|sub|div|silu|exp|rsqrt|pow|neg|index|gather|scatter",
}
"""Patterns of kernels' names, tried in this order; the rest is "other"."""


def kind_of(kernel: str) -> str:
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, kernel, re.IGNORECASE))
    return next(found, "other")


def shares(kernels: list[dict[str, Any]]) -> dict[str, float]:
    """Of the device's time, by kind."""
    total = sum(kernel["us"] for kernel in kernels) or 1.0
    by_kind: Counter[str] = Counter()
    for kernel in kernels:
        by_kind[kind_of(kernel["name"])] += kernel["us"] / total
    return dict(by_kind.most_common())
