"""Training speed on the shapes of published models: ours, PEFT with HF Trainer, published figures; a profile.

    python -m bench.gpu.speed --device cpu --tiny

Bases have random weights (`bench/gpu/shapes.py`), in bf16. Ours is `olora_core.training.train` without its
files: the same start, plan and steps. The peer is PEFT and transformers' Trainer on the same model object,
its base in bf16 under autocast, with fused AdamW, no checkpointing, nothing logged, and the fastest attention
that is installed. Both train rank 16 on all linear layers of the blocks, from rows of random tokens:

- "full": rows of 4,096 tokens, all of them trained, as published figures have them. A step is one pass of 1,
  2 or 4 rows, without accumulation, so the optimizer's share is never hidden. Ours lays them in one packed
  row, the peer in a batch. The first step's loss is the base's, and must be the same for both.
- "mixed": chats of 64 to 4,096 tokens, half of each trained, packed by both into rows; rates count tokens
  without padding.

Two steps warm up. Then about two seconds of steps are timed as a whole, from an idle device to an idle one.
FLOP/s are by `shapes.Work`, to be read beside the matmul rate that the same process measures.
"""

import gc
import time
from dataclasses import asdict

import torch

from olora_core.bases.loading import Base
from olora_core.bases.passes import Passes, head_is_plain
from olora_core.bases.sites import target_sites

from .kernels import profile_shape
from .measuring import (
    RANK,
    START_SECONDS,
    WARM_UP,
    DoesNotFit,
    Measured,
    Section,
    Size,
    finish,
    free_memory,
    measure_ours,
    seconds_of,
)
from .peer import batches_of, measure_peer, packed_batches
from .report import Report, Task, main
from .shapes import SHAPES, Shape, full_rows, mixed_rows, random_base, work_of

PLAN = (
    ("Qwen3-0.6B", ("lora", "profile", "peer")),
    ("Llama-3-8B", ("lora", "profile", "peer", "olora", "mixed")),
    ("Qwen3-0.6B", ("olora", "mixed")),
    ("Qwen3-1.7B", ("lora", "olora")),
    ("Qwen3-4B", ("lora", "olora")),
)
"""The most valuable first: what no longer fits into the section's time is left out."""
MIXED_STEP = 16
"""Examples in a step of the mixed rows."""
EXPECTED_RATE = {"cuda": 1e14, "cpu": 1e9}
"""FLOP/s that the steps are expected to run at until a first measurement tells."""
LOSS_TOLERANCE = 0.02
"""Nats, between two ways through the same base in bf16; as in `bench/train.py`."""
TOP, NAME_LENGTH = 25, 160
SHORT_PASS = 64
"""Tokens of a pass that leaves the device next to nothing to do."""
EXPECTED_RATE = {"cuda": 1e14, "cpu": 1e9}
"""FLOP/s that the steps are expected to run at until a first measurement tells."""
LOSS_TOLERANCE = 0.02
"""Nats, between two ways through the same base in bf16; as in `bench/train.py`."""
TOP, NAME_LENGTH = 25, 160
SHORT_PASS = 64
"""Tokens of a pass that leaves the device next to nothing to do."""
LOSS_TOLERANCE = 0.02
"""Nats, between two ways through the same base in bf16; as in `bench/train.py`."""
TOP, NAME_LENGTH = 25, 160
SHORT_PASS = 64
"""Tokens of a pass that leaves the device next to nothing to do."""

SIZE = Size(length=4096, rows=(1, 2, 4), seconds=2.0, steps=(3, 20), matrix=8192)
TINY = Size(length=128, rows=(1, 2), seconds=0.0, steps=(2, 3), matrix=256)


def run(task: Task, report: Report) -> None:
    """All parts, in the order of PLAN."""
    gc.freeze()  # what was imported stays, and need not be looked through after every configuration
    if task.tiny:
        torch.set_num_threads(1)
    section = Section(task, report, TINY if task.tiny else SIZE, EXPECTED_RATE[task.device])
    with report.attempt("machine's own rates"):
        rates = machine_rates(section)
        section.ceiling = rates["matmul_tflops"] * 1e12
        report.figures("machine's own rates", **rates)
    for name, parts in PLAN:
        shape = SHAPES[name].tiny if task.tiny else SHAPES[name]
        with report.attempt(name):
            measure_shape(section, shape, parts)
        free_memory(task.device)


def machine_rates(section: Section) -> dict[str, float]:
    """Of a large bf16 matmul on random data, in TFLOP/s, and of a copy, in TB/s read and written."""
    side, device = section.size.matrix, section.task.device
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    out = torch.empty_like(a)
    product = seconds_of(lambda: torch.mm(a, b, out=out), device)
    copy = seconds_of(lambda: out.copy_(a), device)
    return {
        "side": side,
        "matmul_tflops": 2 * side**3 / product / 1e12,
        "copy_tb_per_second": 2 * a.nbytes / copy / 1e12,
    }


def measure_shape(section: Section, shape: Shape, parts: tuple[str, ...]) -> None:
    """All `parts` on one base, which is freed with the last of them."""
    report, began = section.report, time.perf_counter()
    base = random_base(shape, section.task.device)
    finish(section.task.device)
    built = time.perf_counter() - began
    passes = passes_or_padded(base, report)
    report.figures(
        f"{shape.name}: base",
        parameters=base.model.num_parameters(),
        built_seconds=built,
        attention=base.model.config._attn_implementation,
        packing=passes.packing,
        plain_head=passes.plain_head,
    )
    measure = {
        "lora": lambda: measure_rows(section, base, shape, "lora", section.size.rows),
        "olora": lambda: measure_rows(section, base, shape, "olora", best_rows(section, shape)),
        "peer": lambda: measure_rows(section, base, shape, "peer", section.size.rows),
        "profile": lambda: profile_shape(section, base, shape),
        "mixed": lambda: measure_mixed(section, base, shape),
    }
    for part in parts:
        with report.attempt(f"{shape.name}: {part}"):
            measure[part]()
    compare(section, shape)


def passes_or_padded(base: Base, report: Report) -> Passes:
    """What the base can do. If asking fails, the check is failed, and the base is used without packing."""
    try:
        passes = base.passes
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        report.check(f"{base.name}: packed rows are attended segment by segment", False, error=why)
        base.passes = Passes(head_is_plain(base.model), None, 0)
        return base.passes
    report.check(
        f"{base.name}: packed rows are attended segment by segment",
        passes.packing == "segments",
        packing=passes.packing,
    )
    return passes


def best_rows(section: Section, shape: Shape) -> tuple[int, ...]:
    """The rows of a pass with which LoRA was the fastest."""
    lora = section.best(shape, "lora")
    return (lora.rows if lora else section.size.rows[0],)


def measure_rows(section: Section, base: Base, shape: Shape, part: str, rows: tuple[int, ...]) -> None:
    """Measures a method of ours, or the peer, on full rows, `rows` of them per pass; keeps the fastest."""
    size, report = section.size, section.report
    sites = target_sites(base.model, "auto")
    work = work_of(shape, sites, sum(RANK * (site.in_features + site.out_features) for site in sites))
    for count in rows:
        name = f"{shape.name}: {part}, full rows, {count} a pass"
        tokens = count * size.length
        operations = work.operations(tokens, tokens, count * size.length**2)
        steps = WARM_UP + max(size.steps[0], 1)
        beside = START_SECONDS["peer" if part == "peer" else "ours"] + size.seconds
        if not section.has_time(name, steps * operations, beside):
            continue
        examples = full_rows(shape, size.length, count * (WARM_UP + size.steps[1]))
        with report.attempt(name):
            try:
                if part == "peer":
                    measured = measure_peer(section, base, batches_of(examples, count), work, count)
                else:
                    measured = measure_ours(section, base, part, examples, count, count, work)
            except DoesNotFit as error:
                report.skip(name, f"It does not fit into the device's memory. {error}")
                return  # nor do more rows
            finally:
                free_memory(section.task.device)
            report.figures(name, **asdict(measured))
            section.found.setdefault((shape.name, part), []).append(measured)
            section.rate = 0.7 * measured.tflops * 1e12  # other sizes may be slower
            if part == "peer":
                check_same_loss(section, shape, measured)


def check_same_loss(section: Section, shape: Shape, peer: Measured) -> None:
    """The gate of a comparison: before the first step, both find the base's own loss on the same rows."""
    for ours in section.found.get((shape.name, "lora"), []):
        if ours.rows == peer.rows:
            section.report.check(
                f"{shape.name}: ours and the peer begin with the same loss, {peer.rows} a pass",
                abs(ours.first_loss - peer.first_loss) <= LOSS_TOLERANCE,
                ours=ours.first_loss,
                peer=peer.first_loss,
            )


def compare(section: Section, shape: Shape) -> None:
    """Ours against the peer and the published figure, each at its best."""
    ours, peer, olora = (section.best(shape, part) for part in ("lora", "peer", "olora"))
    if ours is None:
        return
    is_comparable = section.task.device == "cuda" and not section.task.tiny
    section.report.figures(
        f"{shape.name}: ours against others",
        tokens_per_second=ours.tokens_per_second,
        peer_tokens_per_second=peer and peer.tokens_per_second,
        ratio_to_peer=peer and ours.tokens_per_second / peer.tokens_per_second,
        memory_ratio_to_peer=peer and ours.peak_gib / peer.peak_gib,
        olora_ratio_to_lora=olora and olora.tokens_per_second / ours.tokens_per_second,
        published_tokens_per_second=shape.published,
        published_by=shape.source,
        ratio_to_published=ours.tokens_per_second / shape.published if is_comparable else None,
    )


def measure_mixed(section: Section, base: Base, shape: Shape) -> None:
    """Ours and the peer on chats of mixed lengths, each with as many tokens a pass as was its best."""
    size, report = section.size, section.report
    sites = target_sites(base.model, "auto")
    work = work_of(shape, sites, sum(RANK * (site.in_features + site.out_features) for site in sites))
    examples = mixed_rows(shape, size.length, MIXED_STEP * (WARM_UP + size.steps[1]))
    mean = float(examples.lengths.mean())
    operations = work.operations(MIXED_STEP * mean, MIXED_STEP * mean / 2, MIXED_STEP * mean**2)
    for part in ("lora", "peer"):
        name = f"{shape.name}: {part}, mixed rows"
        best = section.best(shape, part)
        if best is None:
            report.skip(name, "It has not run on full rows.")
            continue
        steps = WARM_UP + size.steps[0]
        beside = START_SECONDS["peer" if part == "peer" else "ours"] + size.seconds
        if not section.has_time(name, steps * operations, beside):
            continue
        with report.attempt(name):
            try:
                if part == "peer":
                    packed = packed_batches(examples, best.rows, size.length)
                    measured = measure_peer(section, base, packed, work, best.rows)
                else:
                    measured = measure_ours(section, base, part, examples, MIXED_STEP, best.rows, work)
                section.found[shape.name, f"{part} mixed"] = [measured]
                report.figures(name, **asdict(measured))
            except DoesNotFit as error:
                report.skip(name, f"It does not fit into the device's memory. {error}")
            finally:
                free_memory(section.task.device)
    ours, peer = (section.best(shape, f"{part} mixed") for part in ("lora", "peer"))
    if ours and peer:
        report.figures(
            f"{shape.name}: ours against the peer, mixed rows",
            ratio_to_peer=ours.tokens_per_second / peer.tokens_per_second,
            memory_ratio_to_peer=ours.peak_gib / peer.peak_gib,
        )


if __name__ == "__main__":
    main(run)
