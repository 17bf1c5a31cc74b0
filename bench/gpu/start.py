"""How soon a job starts training: OLoRA's factors for every layer of Llama-3-8B, and a trainer's first step.

python -m bench.gpu.start
python -m bench.gpu.start --device cpu --tiny
"""

import os
import queue
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import materials, olora_init
from bench.materials import SHAPES, Shape
from olora_core.specs import read_spec
from worker.protocol import Ended, Order
from worker.supervisor.trainer_process import TrainerProcess

from .report import Report, Task, main

RANK, REPEATS = 16, 2
TOLERANCE = 2e-5
"""For a factor's numbers, which are 2 at most: some roundings of fp32 in sums over 14,336 rows."""
REALLY_SECONDS = 3.0
"""All layers are built one after another only if that is expected to take less."""
WARM_JOBS, ROWS, STEPS = 2, 100, 2
COLD_SECONDS, WARM_SECONDS = 12.0, 5.0
"""A job is left out when less is left for it."""
STOP_SECONDS = 2.0


def run(task: Task, report: Report) -> None:
    if task.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for the trainer, which takes a GPU where it sees one
    with report.attempt("OLoRA's factors"):
        compare_factors(task, report)
    if task.device == "cuda":
        torch.cuda.empty_cache()
    if report.seconds_left < COLD_SECONDS:
        report.skip("first steps", f"{report.seconds_left:.0f} s are left, a cold start needs more.")
        return
    with report.attempt("first steps"):
        take_first_steps(task, report)


# --- the factors ---------------------------------------------------------------------------------------


def compare_factors(task: Task, report: Report) -> None:
    """Ours against PEFT's, layer shape by layer shape; then ours for the whole model."""
    shape = SHAPES["tiny" if task.tiny else "8b"]
    theirs = ours = 0.0
    for size, count in linear_layers(shape).items():
        if report.seconds_left < COLD_SECONDS + WARM_JOBS * WARM_SECONDS:
            report.skip(
                f"OLoRA's factors from {size[0]}×{size[1]} on", "The rest of the time is for the jobs."
            )
            return
        row = olora_init.measure(size, RANK, REPEATS, device=task.device, dtype=torch.bfloat16)
        report.check(
            f"OLoRA's factors of a {size[0]}×{size[1]} weight are PEFT's",
            max(row.factor_difference, row.product_difference) <= TOLERANCE,
            peft_seconds=row.peft_seconds,
            our_seconds=row.our_seconds,
            ratio=row.ratio,
            factor_difference=row.factor_difference,
            product_difference=row.product_difference,
        )
        theirs += shape.layers * count * row.peft_seconds
        ours += shape.layers * count * row.our_seconds
    weights = shape.layers * linear_layers(shape).total()
    report.figures(
        f"factors of all {weights} weights, by the seconds of each shape",
        peft_seconds=theirs,
        our_seconds=ours,
        ratio=theirs / ours,
    )
    if ours > REALLY_SECONDS:
        report.skip(f"factors of all {weights} weights, built", f"They would take {ours:.0f} s.")
        return
    report.figures(f"factors of all {weights} weights, built", our_seconds=build_all(task, shape))


def linear_layers(shape: Shape) -> Counter[tuple[int, int]]:
    """(out, in) of a block's linear layers, and how many of each a block has."""
    keys = shape.kv_heads * (shape.width // shape.heads)
    attention = [
        (shape.width, shape.width),
        (keys, shape.width),
        (keys, shape.width),
        (shape.width, shape.width),
    ]
    mlp = [(shape.inner, shape.width), (shape.inner, shape.width), (shape.width, shape.inner)]
    return Counter(attention + mlp)


def build_all(task: Task, shape: Shape) -> float:
    """Seconds for an adapter on every weight of the model, of which each has numbers of its own."""
    random = torch.Generator(task.device).manual_seed(0)
    builders = [
        olora_init.our_init(
            torch.randn(size, generator=random, device=task.device, dtype=torch.bfloat16), RANK
        )
        for _ in range(shape.layers)
        for size, count in linear_layers(shape).items()
        for _ in range(count)
    ]
    seconds, _ = olora_init.timed(lambda: [build() for build in builders], task.device)
    return seconds


# --- the first step ------------------------------------------------------------------------------------


@dataclass
class Job:
    """What a trainer said of one job, and how many seconds after it was ordered."""

    phases: dict[str, float] = field(default_factory=dict)
    """When each began; "ready" and "accepted" among them."""
    device: str = ""
    """Of the trainer; it says so before its first job."""
    first_step: float = 0.0
    step_seconds: float = 0.0
    memory_bytes: int = 0
    certified: bool = False
    whole: float = 0.0

    def figures(self) -> dict[str, Any]:
        return {
            "first_step_seconds": self.first_step,
            "of_which_the_step": self.step_seconds,
            "whole_job_seconds": self.whole,
            "peak_gb": self.memory_bytes / 1e9,
            "began": {name: round(seconds, 2) for name, seconds in self.phases.items()},
        }


def take_first_steps(task: Task, report: Report) -> None:
    """One trainer process, as the worker starts it: a job while it starts, then jobs on its warm base."""
    model = "tiny" if task.tiny else "0.5b"
    began = time.monotonic()
    materials.make(
        task.scratch, model=model, data="docstrings", rows=ROWS * (1 + WARM_JOBS), device=task.device
    )
    report.figures(f"a base of the shape {model}, made and saved", seconds=time.monotonic() - began)
    lines = (task.scratch / "train.jsonl").read_text().splitlines(keepends=True)
    until = time.monotonic() + report.seconds_left - STOP_SECONDS
    began = time.monotonic()
    trainer = TrainerProcess("default")
    try:
        cold = follow(trainer, order(task, 0, lines[:ROWS]), began, until)
        report.check(f"cold start on {model}", cold.certified, **cold.figures())
        expected = torch.cuda.get_device_name() if task.device == "cuda" else "cpu"
        report.check("the trainer runs on the device", cold.device == expected, device=cold.device)
        warm: list[Job] = []
        for number in range(1, 1 + WARM_JOBS):
            if until - time.monotonic() < WARM_SECONDS:
                report.skip(f"warm start {number}", "Too little time is left.")
                break
            rows = lines[number * ROWS : (number + 1) * ROWS]
            job = follow(trainer, order(task, number, rows), time.monotonic(), until)
            passed = job.certified and "loading" not in job.phases
            report.check(
                f"warm start {number}: certified, on the base that is loaded", passed, **job.figures()
            )
            warm.append(job)
        if warm:
            usual = statistics.median(job.first_step for job in warm)
            report.figures(
                "from the order to the first step",
                cold_seconds=cold.first_step,
                warm_seconds=usual,
                ratio=cold.first_step / usual,
            )
    finally:
        trainer.kill()


def order(task: Task, number: int, rows: Sequence[str]) -> Order:
    """A job of a few steps on these rows."""
    training, folder = task.scratch / f"{number}.jsonl", task.scratch / f"job-{number}"
    training.write_text("".join(rows))
    folder.mkdir()
    spec = read_spec(
        model="bench", hyperparameters={"batch_size": 4, "n_epochs": 1, "max_steps": STEPS, "samples": 0}
    )
    return Order(
        run=str(number),
        spec=spec.model_dump(mode="json"),
        base=str(task.scratch / "base"),
        training=str(training),
        validation=None,
        folder=str(folder),
        resume=None,
        checkpoint_seconds=3600,
        deadline=time.monotonic() + 3600,
        tokens=str(folder / "tokens"),
    )


def follow(trainer: TrainerProcess, order: Order, began: float, until: float) -> Job:
    """Orders a job and listens to its end. Raises RuntimeError when it has none in time, or a bad one."""
    trainer.send(order.as_message())
    job = Job()
    while True:
        try:
            message = trainer.messages.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            raise RuntimeError(f"The job did not end in time; it had got to {job.figures()}.") from None
        if isinstance(message, Ended):
            raise RuntimeError(message.sentence)
        now = time.monotonic() - began
        match message:
            case {"ready": {"device": device}}:
                job.device = device
                job.phases["ready"] = now
            case {"accepted": _}:
                job.phases["accepted"] = now
            case {"progress": {"kind": "Phase", "name": name}}:
                job.phases.setdefault(name, now)
            case {"progress": {"kind": "Step", "seconds": seconds, "memory_bytes": memory_bytes}}:
                job.memory_bytes = memory_bytes
                if not job.first_step:
                    job.first_step, job.step_seconds = now, seconds
            case {"progress": {"kind": "Finished", "certificate": certificate, "folder": folder}}:
                job.certified = certificate["passed"] and Path(folder, "adapter_model.safetensors").is_file()
                job.whole = now
                return job
            case {"failed": said} | {"crashed": said}:
                raise RuntimeError(said["message"])


if __name__ == "__main__":
    main(run)
