"""Training speed and peak memory: ours against PEFT with HF Trainer and with TRL, on the same tokens.

    python -m bench.train
    python -m bench.train --models 100m --data mixed --arms ours ours-padded ours-every-logit
    python -m bench.train --device cuda --models 8b --data mixed --batch-size 24 --arms ours trainer

The arms (described in `bench/arms.py`) run in turn, each in its own process, round after round; the first
one is the reference. Each is told on stderr as it ends, and the table follows. Rates count tokens without
padding, over the steps after the warm-up; the table has medians over the rounds, and the range of ratios. A
ratio is printed only if both arms have learned the same: in each step if their batches are the same, else on
held-out rows.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DEFAULT_ARMS = ("ours", "trainer", "trl", "trl-packed", "trl-tuned")
STEP_TOLERANCE, HELD_OUT_TOLERANCE = 0.02, 0.05
"""Nats. In bf16, two arms on the same batches differ by up to 0.002 per step on these models."""
GIB = 2**30


def run_child(arguments: Sequence[str], asked: argparse.Namespace) -> dict[str, Any]:
    """The JSON in a child's last line. Raises SystemExit with the end of its stderr if it fails."""
    environment = {
        "OMP_WAIT_POLICY": "PASSIVE",  # as for the service's trainer
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **os.environ,
        "OMP_NUM_THREADS": str(asked.threads),
    }
    child = subprocess.run(
        [sys.executable, "-m", *arguments, "--device", asked.device],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if child.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{child.stderr[-4000:]}")
    lines = child.stdout.splitlines()
    printed: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return printed


def measure(asked: argparse.Namespace, model: str, data: str) -> dict[str, Any]:
    """All rounds of all arms on one model and one data set."""
    with tempfile.TemporaryDirectory(dir=asked.scratch) as folder:
        rows = str(asked.steps * asked.batch_size)
        run_child(["bench.materials", folder, "--model", model, "--data", data, "--rows", rows], asked)
        sizes = ["--steps", str(asked.steps), "--warm-up", str(asked.warm_up)]
        sizes += ["--batch-size", str(asked.batch_size)]
        facts = run_child(["bench.arms", "prepare", folder, *sizes], asked)
        results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in asked.arms}
        for number in range(1, asked.rounds + 1):
            for arm, of_arm in results.items():
                of_arm.append(run_child(["bench.arms", arm, folder, *sizes], asked))
                rate, dtype = of_arm[-1]["tokens_per_second"], of_arm[-1]["dtype"]
                told = (
                    f"{model}, {data}, round {number} of {asked.rounds}: {arm} {rate:.0f} tokens/s in {dtype}"
                )
                print(told, file=sys.stderr, flush=True)
    return {"model": model, "data": data, "facts": facts, "results": results}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float | None, float]:
    """Largest |Δloss| of a step (None if the batches differ by design), and |Δloss| on the held-out rows."""
    held_out = abs(ours["held_out"] - theirs["held_out"])
    if not (ours["same_batches"] and theirs["same_batches"]):
        return None, held_out
    return max(abs(a - b) for a, b in zip(ours["losses"], theirs["losses"], strict=True)), held_out


def row(name: str, reference: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    """One line of the table."""
    rates = [result["tokens_per_second"] for result in results]
    peak = statistics.median(result["peak_bytes"] for result in results)
    cells = [name, results[0]["dtype"], spread(rates, "{:.0f}")]
    if results is reference:
        return line([*cells, "1", "1", f"{peak / GIB:.2f}", "1", "", ""])
    pairs = list(zip(reference, results, strict=True))
    steps, held_out = zip(*(differences(ours, theirs) for ours, theirs in pairs), strict=True)
    step = max((value for value in steps if value is not None), default=None)
    equal = (step is None or step <= STEP_TOLERANCE) and max(held_out) <= HELD_OUT_TOLERANCE
    by_clock = [ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs]
    by_work = [ours["tokens_per_cpu_second"] / theirs["tokens_per_cpu_second"] for ours, theirs in pairs]
    memory = statistics.median(ours["peak_bytes"] for ours in reference) / peak
    ratios = [spread(by_clock), spread(by_work)] if equal else ["losses differ", "losses differ"]
    return line(
        [
            *cells,
            *ratios,
            f"{peak / GIB:.2f}",
            f"{memory:.2f}" if equal else "losses differ",
            "other batches" if step is None else f"{step:.1e}",
            f"{max(held_out):.1e}",
        ]
    )


def spread(values: Sequence[float], form: str = "{:.2f}") -> str:
    low, middle, high = (form.format(f(values)) for f in (min, statistics.median, max))
    return f"{middle} ({low}–{high})"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def heading(asked: argparse.Namespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    load = ", ".join(f"{load:.1f}" for load in os.getloadavg())
    return (
        f"Training on {asked.device}, {asked.threads} threads of {os.cpu_count()} cores, load before {load}; "
        f"{packages}.\n{asked.batch_size} examples a step, {asked.steps} steps of which {asked.warm_up} warm "
        f"up, {asked.rounds} rounds in turn. Median (range).\n"
        f"Gates: |Δloss| of a step {STEP_TOLERANCE}, of the held-out rows {HELD_OUT_TOLERANCE} nats."
    )


def table(measured: dict[str, Any]) -> str:
    facts, results = measured["facts"], measured["results"]
    low, median, mean, high = facts["lengths"]
    reference_name, reference = next(iter(results.items()))
    lines = [
        f"\n{measured['model']} ({facts['parameters'] / 1e6:.1f} M parameters), {measured['data']}: "
        f"{low}–{high} tokens an example, median {median:.0f}, mean {mean:.0f}, "
        f"{facts['trained']:.0%} of them trained\n",
        line(
            [
                *("arm", "dtype", "tokens/s", f"{reference_name} / it", "per CPU second", "peak, GiB"),
                *(f"{reference_name}'s peak / its", "max Δloss", "Δ held-out"),
            ]
        ),
        "|---|---|---|---|---|---|---|---|---|",
        *(row(name, reference, of_arm) for name, of_arm in results.items()),
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["shipped", "100m", "smollm2"])
    parser.add_argument("--data", nargs="+", default=["docstrings", "mixed"])
    parser.add_argument("--arms", nargs="+", default=DEFAULT_ARMS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8, help="examples in an optimizer step")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--scratch", type=Path, help="folder for the random models; default: the system's")
    parser.add_argument("--json", type=Path, help="file for all numbers of all runs")
    asked = parser.parse_args(arguments)
    print(heading(asked), flush=True)
    everything = []
    for model in asked.models:
        for data in asked.data:
            everything.append(measure(asked, model, data))
            print(table(everything[-1]), flush=True)
    if asked.json:
        asked.json.write_text(json.dumps(everything))


if __name__ == "__main__":
    main()
