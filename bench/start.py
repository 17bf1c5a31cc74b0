"""Time to a job's first step: on a fresh worker, and on one that has the base model loaded.

    python -m bench.start
    python -m bench.start --models shipped 100m --rounds 5 --warm 3

Each round starts `olora serve` with a new home on a free port of 127.0.0.1. The first job is cold; the
others are warm: the same base, each with a new training file. The time is from the POST of the job to the
first response of the API that has a step, and is shown with and without the step's own time. Medians.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import httpx

ROOT = Path(__file__).parents[1]
SERVES = re.compile(r"serves at (http://127\.0\.0\.1:\d+/v1)")
START_SECONDS, JOB_SECONDS = 90.0, 600.0
POLL_SECONDS = 0.01
ENDED = ("succeeded", "failed", "cancelled")


@contextmanager
def service(home: Path, models: Path) -> Iterator[httpx.Client]:
    """A client of an `olora serve` that runs until the block ends."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLORA_")}
    settings = {"OLORA_HOME": str(home), "OLORA_MODELS_DIR": str(models), "OLORA_MIN_EXAMPLES": "1"}
    log = home / "serve.log"
    home.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--port", "0"],
            cwd=ROOT,
            env={**inherited, "COLUMNS": "200", **settings},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        url = address(process, log)
        key = (home / "api_key").read_text().strip()
        with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as client:
            yield client
    finally:
        process.terminate()
        process.wait(60)


def address(process: "subprocess.Popen[bytes]", log: Path) -> str:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        if found := SERVES.search(log.read_text()):
            return found[1]
        time.sleep(0.05)
    raise SystemExit(f"The service did not start:\n{log.read_text()}")


def upload(client: httpx.Client, lines: Sequence[str]) -> str:
    rows = "".join(f"{line}\n" for line in lines).encode()
    return answer(client.post("/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)}))[
        "id"
    ]


def answer(response: httpx.Response) -> dict:
    if response.is_error:
        raise SystemExit(f"{response.request.url} answered {response.status_code}: {response.text}")
    return response.json()


def first_step(
    client: httpx.Client, model: str, training: str, validation: str | None
) -> tuple[float, float]:
    """Posts a job of two steps and waits for its end. Returns the seconds to the first step, and its own."""
    body = {
        "model": model,
        "training_file": training,
        "validation_file": validation,
        "method": {
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 1, "batch_size": 4, "max_steps": 2}},
        },
    }
    began = time.monotonic()
    job = answer(client.post("/fine_tuning/jobs", json=body))["id"]
    stepped = None
    while time.monotonic() < began + JOB_SECONDS:
        events = answer(client.get(f"/fine_tuning/jobs/{job}/events", params={"limit": 100}))["data"]
        steps = [event["data"]["seconds"] for event in events if event["type"] == "metrics"]
        if stepped is None and steps:
            stepped = time.monotonic() - began, steps[-1]  # newest first
        status = answer(client.get(f"/fine_tuning/jobs/{job}"))
        if status["status"] in ENDED:
            if status["status"] != "succeeded" or stepped is None:
                raise SystemExit(f"The job did not succeed: {json.dumps(status['error'])}")
            return stepped
        time.sleep(POLL_SECONDS if stepped is None else 0.1)
    raise SystemExit(f"The job did not end within {JOB_SECONDS:g} s.")


Times = list[tuple[float, float]]


def measure(
    folder: Path, model: str, *, rounds: int, warm: int, rows: int, validate: bool
) -> tuple[Times, Times]:
    """`first_step` of the cold jobs, one per round, and of the warm ones."""
    models = folder / "models"
    make = [sys.executable, "-m", "bench.materials", str(folder / model), "--model", model]
    # A separate process frees its memory; "docstrings" gives every base the same rows.
    subprocess.run([*make, "--data", "docstrings", "--rows", str(rows * (warm + 1))], cwd=ROOT, check=True)
    models.mkdir(exist_ok=True)
    name = f"bench-{model}"
    (models / name).symlink_to(folder / model / "base")
    lines = (folder / model / "train.jsonl").read_text().splitlines()
    held_out = (folder / model / "valid.jsonl").read_text().splitlines()
    times: tuple[Times, Times] = ([], [])
    for round_number in range(rounds):
        with service(folder / f"{model}-{round_number}", models) as client:
            validation = upload(client, held_out) if validate else None
            files = [upload(client, lines[i * rows : (i + 1) * rows]) for i in range(warm + 1)]
            for i, training in enumerate(files):
                times[min(i, 1)].append(first_step(client, name, training, validation))
    return times


def row(model: str, cold: Times, warm: Times) -> str:
    """One line of the table."""
    cells = [model]
    for begun in (True, False):
        of_cold, of_warm = ([seconds - begun * step for seconds, step in times] for times in (cold, warm))
        ratio = statistics.median(of_cold) / statistics.median(of_warm)
        cells += [shown(of_cold), shown(of_warm), f"{ratio:.1f}"]
    return f"| {' | '.join(cells)} |"


def shown(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f} ({min(seconds):.2f}–{max(seconds):.2f})"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["shipped", "100m", "smollm2"])
    parser.add_argument("--rounds", type=int, default=5, help="fresh services, each with one cold job")
    parser.add_argument("--warm", type=int, default=3, help="warm jobs in each round")
    parser.add_argument("--rows", type=int, default=300, help="rows of each training file")
    parser.add_argument("--validation", action="store_true", help="jobs with a validation file of 64 rows")
    asked = parser.parse_args(arguments)
    print(
        f"From POST to the first step, seconds, median (range) of {asked.rounds} cold and "
        f"{asked.rounds * asked.warm} warm jobs of {asked.rows} rows"
        f"{', 64 of validation' if asked.validation else ''}; torch {version('torch')}, "
        f"{os.cpu_count()} CPU cores, {', '.join(f'{load:.1f}' for load in os.getloadavg())} load before\n"
    )
    print("| base | cold, until step 1 | warm | cold / warm | cold, step 1 included | warm | cold / warm |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for model in asked.models:
            cold, warm = measure(
                Path(scratch),
                model,
                rounds=asked.rounds,
                warm=asked.warm,
                rows=asked.rows,
                validate=asked.validation,
            )
            print(row(model, cold, warm), flush=True)


if __name__ == "__main__":
    main()
