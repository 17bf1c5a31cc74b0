"""Steps of our own training loop, timed: what `bench.gpu.speed` and its profile are made of."""

import gc
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bench.olora_init import finish
from olora_core.bases.loading import Base
from olora_core.bases.sites import target_sites
from olora_core.data.examples import Examples
from olora_core.devices import SINGLE
from olora_core.errors import TrainingError
from olora_core.progress import Step, result_of
from olora_core.specs import read_spec, resolve
from olora_core.training.data import Data
from olora_core.training.memory import is_out_of_memory
from olora_core.training.run import Run, restored_afterwards, run_facts, start
from olora_core.training.step import forget_peak_memory, peak_memory, take_step

from .report import Report, Task
from .shapes import SEED, Shape, Work

RANK, ALPHA, LEARNING_RATE = 16, 32, 1e-4
WARM_UP = 2
START_SECONDS = {"ours": 3.0, "peer": 6.0, "profile": 10.0}
"""Of the section's time: what a part takes beside its steps, on the cautious side."""
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """How much is run; the smoke test has less of everything."""

    length: int
    """Tokens of a full row."""
    rows: tuple[int, ...]
    """Rows of a pass that are tried."""
    seconds: float
    """Of timed steps, about."""
    steps: tuple[int, int]
    """Timed steps, at least and at most."""
    matrix: int
    """Side of the matrices that the machine's own rate is measured with."""


@dataclass(frozen=True)
class Measured:
    """One configuration."""

    rows: int
    """Rows of a pass, of 4,096 tokens each."""
    steps: int
    tokens_per_second: float
    seconds_per_step: float
    tflops: float
    """Of `Work`, without what is computed for padding."""
    of_ceiling: float | None
    """`tflops` over the matmul rate measured in this process."""
    peak_gib: float
    start_seconds: float
    """To make the adapters, the plan and the optimizer; of the peer also its first steps."""
    first_loss: float
    """Nats a trained token, before anything is learned."""


class DoesNotFit(Exception):
    """The configuration needs more memory than the device has."""


@dataclass
class Section:
    """What its parts share."""

    task: Task
    report: Report
    size: Size
    rate: float
    """FLOP/s that the next steps are expected to run at."""
    ceiling: float | None = None
    """FLOP/s of a large matmul."""
    found: dict[tuple[str, str], list[Measured]] = field(default_factory=dict)
    """What was measured of each shape and part."""

    def best(self, shape: Shape, part: str) -> Measured | None:
        """The fastest configuration, if any has run."""
        found = self.found.get((shape.name, part), [])
        return max(found, key=lambda measured: measured.tokens_per_second, default=None)

    def has_time(self, name: str, operations: float, beside: float) -> bool:
        """Whether `operations` and `beside` seconds still fit; if not, the report says so."""
        needed = (beside if self.task.device == "cuda" and not self.task.tiny else 0) + operations / self.rate
        left = self.report.seconds_left
        if needed > left:
            self.report.skip(name, f"It would take about {needed:.0f} s, and {left:.0f} s are left.")
        return needed <= left


def seconds_of(work: Callable[[], Any], device: str, rounds: int = 20) -> float:
    """Of one call, the mean over some, after a warm-up."""
    for _ in range(3):
        work()
    finish(device)
    began = time.perf_counter()
    for _ in range(rounds):
        work()
    finish(device)
    return (time.perf_counter() - began) / rounds


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@contextmanager
def prepared(
    base: Base, method: str, examples: Examples, batch_size: int, pass_tokens: int
) -> Iterator[tuple[Run, float]]:
    """A run as `train` starts it, and the seconds that took. Afterwards the base is bare again."""
    hyperparameters = {
        "n_epochs": 1,
        "batch_size": batch_size,
        "learning_rate": LEARNING_RATE,
        "schedule": "constant",
        "warmup_ratio": 0.0,
        "micro_batch_tokens": pass_tokens,
        "gradient_checkpointing": False,
    }
    adapter = {"method": method, "rank": RANK, "alpha": ALPHA}
    asked = read_spec(model=base.name, hyperparameters=hyperparameters, adapter=adapter, seed=SEED)
    data = Data(examples, None, {}, [])
    spec, _ = resolve(asked, run_facts(base, data, SINGLE))
    sites = target_sites(base.model, asked.adapter.target_modules)
    with restored_afterwards(base):
        began = time.perf_counter()
        started, _ = result_of(start(asked, spec, base, data, sites, SINGLE))
        finish(base.device.type)
        yield started, time.perf_counter() - began


def one_step(started: Run) -> Step:
    """The next step. Raises DoesNotFit where it would have gone on with smaller passes."""
    steps = take_step(started)
    try:
        note = next(steps)
    except StopIteration as end:
        step: Step = end.value
        return step
    except (TrainingError, torch.OutOfMemoryError, MemoryError) as error:
        if is_out_of_memory(error) or getattr(error, "code", None) == "out_of_memory":
            raise DoesNotFit(first_sentence(error)) from None
        raise
    raise DoesNotFit(note.message)


def first_sentence(error: BaseException) -> str:
    return f"{str(error).split('. ')[0]}."


def measure_ours(
    section: Section, base: Base, method: str, examples: Examples, batch_size: int, rows: int, work: Work
) -> Measured:
    """Times steps of `batch_size` examples, in passes that hold `rows` full rows."""
    size, device = section.size, section.task.device
    forget_peak_memory(base.device)
    with prepared(base, method, examples, batch_size, rows * size.length) as (started, start_seconds):
        first = one_step(started)
        finish(device)
        began = time.perf_counter()
        for _ in range(WARM_UP - 1):
            one_step(started)
        finish(device)
        count = steps_to_time(size, (time.perf_counter() - began) / max(1, WARM_UP - 1))
        count = min(count, started.total_steps - WARM_UP)
        seen = np.concatenate([started.rows(WARM_UP + 1 + i) for i in range(count)])
        began = time.perf_counter()
        for _ in range(count):
            one_step(started)
        finish(device)
        seconds = time.perf_counter() - began
    lengths = examples.lengths[seen].astype(float)
    operations = work.operations(
        lengths.sum(), float(examples.trained_lengths[seen].sum()), (lengths**2).sum()
    )
    return measured_of(section, rows, count, seconds, lengths.sum(), operations, start_seconds, first.loss)


def steps_to_time(size: Size, seconds: float) -> int:
    """As many as take about `size.seconds`, by the seconds of one."""
    least, most = size.steps
    return max(least, min(most, round(size.seconds / seconds)))


def measured_of(
    section: Section,
    rows: int,
    steps: int,
    seconds: float,
    tokens: float,
    operations: float,
    start_seconds: float,
    first_loss: float,
) -> Measured:
    if not math.isfinite(first_loss):
        raise ValueError(f"The first loss is {first_loss}.")
    rate = operations / seconds
    return Measured(
        rows=rows,
        steps=steps,
        tokens_per_second=float(tokens / seconds),
        seconds_per_step=seconds / steps,
        tflops=float(rate / 1e12),
        of_ceiling=None if section.ceiling is None else float(rate / section.ceiling),
        peak_gib=peak_memory(torch.device(section.task.device)) / GIB,
        start_seconds=start_seconds,
        first_loss=first_loss,
    )
