"""The whole service on the device: `olora serve`, two jobs by the official client, an adapter back in PEFT.

python -m bench.gpu.service
python -m bench.gpu.service --device cpu --tiny
"""

import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI

from examples import peft_adapter, quickstart, service
from store.settings import Settings, read_settings

from .report import Report, Task, main

ENDED = ("succeeded", "failed", "cancelled")
READY = re.compile(r"Trainer \d+ is ready on (.+)\.$", re.MULTILINE)
"""What the worker's log says of the trainer's device."""
LOOK_SECONDS, LATER_LOOK_SECONDS = 0.01, 0.2
STOP_SECONDS, PEFT_SECONDS = 12.0, 10.0
"""What stopping the service and loading the adapter may take."""
TINY_STOP_SECONDS = 60.0
"""Of a smoke test, whose machine does other things too."""
CHECKED_ROWS = 8
ROWS, STEPS, SAMPLES = 1500, 200, 2
WARM_ROWS, WARM_STEPS = 400, 20
TINY_ROWS, TINY_STEPS, HELD_OUT = 40, 3, 12


def run(task: Task, report: Report) -> None:
    for name in [name for name in os.environ if name.startswith("OLORA_")]:
        del os.environ[name]
    os.environ |= {"OLORA_HOME": str(task.scratch / "home"), "OLORA_PORT": "0"}
    if task.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a worker takes the GPUs that it sees
    settings = read_settings()
    adapter = None
    with report.attempt("the service"):
        adapter = serve(task, report, settings)
    worker_log = settings.home / "logs" / "worker.log"
    if report.failed and worker_log.exists():
        report.figures("the worker's log", end=worker_log.read_text(errors="replace")[-3000:])
    if adapter is None:
        report.skip("the adapter in PEFT", "No job has made one.")
        return
    with report.attempt("the adapter in PEFT"):
        load(task, report, adapter)


# --- the service ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Seconds after the POST of a job."""

    first_step: float
    of_which_the_step: float
    whole: float


def serve(task: Task, report: Report, settings: Settings) -> Path:
    """Two jobs on a service that ends with this function. Returns the first one's adapter folder."""
    rows, warm_rows = (TINY_ROWS, TINY_ROWS) if task.tiny else (ROWS, WARM_ROWS)
    steps, warm_steps = (TINY_STEPS, TINY_STEPS) if task.tiny else (STEPS, WARM_STEPS)
    samples = 1 if task.tiny else SAMPLES
    lines = quickstart.TRAINING.read_text().splitlines(keepends=True)
    held_out = quickstart.VALIDATION.read_text().splitlines(keepends=True)
    validation = write(task.scratch / "valid.jsonl", held_out[: HELD_OUT if task.tiny else None])
    training = write(task.scratch / "train.jsonl", lines[:rows])
    other = write(task.scratch / "other.jsonl", lines[::-1][:warm_rows])  # which no job has tokenised

    began = time.monotonic()
    # What begins late must still be stopped, and its adapter looked at, within the section's limit.
    until = began + report.seconds_left - STOP_SECONDS - PEFT_SECONDS
    stop_seconds = TINY_STOP_SECONDS if task.tiny else STOP_SECONDS
    with service.service(settings, until - began, stop_seconds) as url:
        report.figures("olora serve answers", seconds=time.monotonic() - began)
        client = OpenAI(base_url=f"{url}/v1", api_key=service.key_of(settings))
        job, cold = train(client, training, validation, until, max_steps=steps, samples=samples)
        adapter = service.download(client, job, task.scratch / job.id)
        report_job(report, "the quickstart's job, cold", job, adapter, cold)
        report_device(task, report, settings)
        if until - time.monotonic() < cold.whole - cold.first_step:
            report.skip("a second job, warm", f"{report.seconds_left:.0f} s are left.")
        else:
            job, warm = train(client, other, validation, until, max_steps=warm_steps, samples=1)
            second = service.download(client, job, task.scratch / job.id)
            report_job(report, "a second job, warm", job, second, warm)
            report.figures(
                "from the POST to the first step",
                cold_seconds=cold.first_step,
                warm_seconds=warm.first_step,
                ratio=cold.first_step / warm.first_step,
            )
        began = time.monotonic()
    took = time.monotonic() - began
    report.check("the service stops when it is asked to", took < stop_seconds, seconds=took)
    return adapter


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(lines))
    return path


def train(client: OpenAI, training: Path, validation: Path, until: float, **asked: int) -> tuple[Any, Times]:
    """The quickstart's job on these rows. Raises RuntimeError when it does not succeed in time."""
    job = quickstart.create_job(client, training, validation, **asked)
    posted, first_step, steps = time.monotonic(), 0.0, []
    seen: set[str] = set()
    while time.monotonic() < until:
        events = service.new_events(client, job.id, seen)
        steps += [event.data for event in events if event.type == "metrics"]
        if steps and not first_step:
            first_step = time.monotonic() - posted
        job = client.fine_tuning.jobs.retrieve(job.id)
        if job.status in ENDED:
            break
        time.sleep(LATER_LOOK_SECONDS if first_step else LOOK_SECONDS)
    whole = time.monotonic() - posted
    if job.status != "succeeded" or not steps:
        why = job.error.message if job.error else "no reason was given"
        raise RuntimeError(f"The job is {job.status} after {whole:.0f} s and {len(steps)} steps: {why}.")
    return job, Times(first_step, steps[0]["seconds"], whole)


def report_job(report: Report, name: str, job: Any, adapter: Path, times: Times) -> None:
    manifest = json.loads((adapter / "manifest.json").read_text())
    certificate = manifest["certificate"]
    report.check(
        f"{name}: succeeded, its certificate passed",
        job.status == "succeeded" and certificate["passed"],
        first_step_seconds=times.first_step,
        of_which_the_step=times.of_which_the_step,
        whole_job_seconds=times.whole,
        max_abs_logit_diff=certificate["max_abs_logit_diff"],
        bound=certificate["bound"],
        valid_loss_before=certificate["valid_loss_before"],
        valid_loss_after=certificate["valid_loss_after"],
    )


def report_device(task: Task, report: Report, settings: Settings) -> None:
    """Where the job was trained, by the worker's log: neither the job nor its manifest tells."""
    found = READY.findall((settings.home / "logs" / "worker.log").read_text())
    if task.device == "cpu":
        expected = "cpu"
    else:
        import torch

        expected = torch.cuda.get_device_name()
    report.check("the service's trainer runs on the device", found == [expected], devices=found)


# --- its user ------------------------------------------------------------------------------------------


def load(task: Task, report: Report, adapter: Path) -> None:
    """Loads the adapter in PEFT, on the untouched base in fp32, and compares its logits with the trained."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    began = time.monotonic()
    certificate = json.loads((adapter / "manifest.json").read_text())["certificate"]
    lines = quickstart.VALIDATION.read_text().splitlines()[:CHECKED_ROWS]
    rows = [json.loads(line) for line in lines]
    tokenizer = AutoTokenizer.from_pretrained(quickstart.BASE)
    base = AutoModelForCausalLM.from_pretrained(quickstart.BASE, dtype=torch.float32).to(task.device)
    untrained = peft_adapter.logits(base, tokenizer, rows)
    trained = peft_adapter.trained_logits(base, adapter, tokenizer, rows)
    served = peft_adapter.logits(PeftModel.from_pretrained(base, adapter).eval(), tokenizer, rows)
    difference, largest, allowed = peft_adapter.compared(served, trained, certificate)
    learned = float((trained - untrained).abs().max())
    report.check(
        "the adapter in PEFT gives the trained logits",
        difference <= allowed < learned,
        difference=difference,
        allowed=allowed,
        largest_logit=largest,
        moved_by_training=learned,
        seconds=time.monotonic() - began,
    )


if __name__ == "__main__":
    main(run)
