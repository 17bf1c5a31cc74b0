"""Which learning rate suits a method, and which rule finds it before the first step.

    python -m bench.rates sweep --base shipped --out bench/.rates/rates.jsonl
    python -m bench.rates table bench/.rates/rates.jsonl
    python -m bench.rates table bench/rates/measured.jsonl      # the sweeps of docs/methods.md

A triple is a base, a task and a method at a rank. For each, `sweep` measures the rate as a run with
learning_rate "auto" does, and then the validation loss after whole runs at rates a factor 2 apart.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import torch

from olora_core.bases.loading import Base, load_base
from olora_core.progress import result_of
from olora_core.specs import learning_rate_for
from olora_core.training.data import Data, read_data
from olora_core.training.measured_rate import PEAK

from . import bases, tasks
from .sweep import Kind, curvature, final_loss, measured, sweep, train_spec
from .table import best, details, summary

Adapter = dict[str, Any]

METHODS = ("lora", "olora", "pissa", "ba_lora", "sora", "mora")
RANKS = (8, 32)


def run_sweeps(asked: argparse.Namespace) -> None:
    """Appends one line of JSON for each triple that the file does not have yet."""
    torch.set_num_threads(asked.threads)
    asked.work.mkdir(parents=True, exist_ok=True)
    kind = Kind(asked.type, asked.quantization)
    base = load_base(
        bases.folder(asked.base, asked.work),
        name=asked.base,
        dtype=torch.float32,
        quantization=kind.quantization,
    )
    done = {key(line) for line in read(asked.out)} if asked.out.exists() else set()
    for task in asked.tasks:
        data = data_of(task, kind, base, asked.work)
        for rank, method in product(asked.ranks, asked.methods):
            adapter = {"method": method, "rank": rank}
            if asked.alpha is not None:
                adapter["alpha"] = asked.alpha
            triple = {"base": asked.base, "task": task, **adapter, **other_than_default(kind)}
            if key(triple) in done:
                continue
            line = triple | swept(
                *(adapter, kind, base, data),
                length=asked.steps,
                seeds=asked.seeds,
                with_curvature=asked.curvature,
            )
            with asked.out.open("a") as out:
                out.write(json.dumps(line) + "\n")


def other_than_default(kind: Kind) -> dict[str, str]:
    """What a line says of its kind."""
    return {name: value for name, value in asdict(kind).items() if value != getattr(Kind, name)}


def data_of(task: str, kind: Kind, base: Base, work: Path) -> Data:
    """The task's rows, tokenised for the base; its files are made in `work` where they are missing."""
    files = {role: work / f"{base.name}-{task}-{kind.type}-{role}.jsonl" for role in tasks.ROWS}
    for role, path in files.items():
        if not path.exists():
            system, preferences = bases.SYSTEM.get(base.name), kind.type == "dpo"
            tasks.write(task, role, path, system=system, preferences=preferences)
    spec = train_spec({}, kind)
    return result_of(read_data(spec, base, files["train"], files["valid"], work / "tokens"))


def swept(
    adapter: Adapter,
    kind: Kind,
    base: Base,
    data: Data,
    *,
    length: int,
    seeds: int,
    with_curvature: bool,
) -> dict[str, Any]:
    """The rates that are known beforehand, the losses of a sweep around the measured one, and those of other
    seeds at the best rate."""
    began = time.monotonic()
    table = learning_rate_for(train_spec(adapter, kind).adapter, base.width)
    auto = measured(adapter, kind, base, data)
    print(f"{adapter}: table {table:.2e}, {auto.sentence}", flush=True)

    def loss_at(rate: float) -> float:
        loss = final_loss(adapter, kind, base, data, rate, length)
        print(f"  rate {rate:.2e}: {loss:.4f}", flush=True)
        return loss

    found = {
        "steps": length,
        "width": base.width,
        "table": table,
        "measured": auto.rate,
        "peak": PEAK,
        "trials": auto.trials,
        "losses": list(sweep(loss_at, auto.rate).items()),
    }
    rate = best(found)[0]
    found["others"] = [final_loss(adapter, kind, base, data, rate, length, seed + 1) for seed in range(seeds)]
    if with_curvature:
        found["curvature"] = curvature(adapter, kind, base, data)
    return found | {"seconds": round(time.monotonic() - began)}


def print_table(asked: argparse.Namespace) -> None:
    """Every triple, then how each rule does on each base."""
    lines = [line for path in asked.files for line in read(path)]
    rules = {
        "former table": lambda line: line["table"],
        "table": table_rate,
        "measured": lambda line: line["measured"] / line["peak"] * PEAK,
        "auto": lambda line: math.sqrt(table_rate(line) * line["measured"] / line["peak"] * PEAK),
    }
    print(*details(lines, rules), *summary(lines, rules), sep="\n")


def table_rate(line: dict[str, Any]) -> float:
    """The table's rate now, which may have changed since the sweep."""
    adapter = {name: line[name] for name in ("method", "rank", "alpha") if name in line}
    return learning_rate_for(train_spec(adapter).adapter, line["width"])


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def key(line: dict[str, Any]) -> tuple[Any, ...]:
    names = ("base", "task", "method", "rank", "alpha", "type", "quantization")
    return tuple(line.get(name) for name in names)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True)
    sweeps = commands.add_parser("sweep")
    sweeps.add_argument("--base", choices=bases.BASES, default="shipped")
    sweeps.add_argument("--tasks", nargs="+", choices=tasks.TASKS, default=tasks.TASKS)
    sweeps.add_argument("--methods", nargs="+", default=METHODS)
    sweeps.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    sweeps.add_argument("--alpha", type=float, help="instead of each method's default")
    sweeps.add_argument("--type", choices=["supervised", "dpo"], default="supervised")
    sweeps.add_argument("--quantization", default="none", help="of the base, as in the spec")
    sweeps.add_argument("--steps", type=int, default=60)
    sweeps.add_argument("--seeds", type=int, default=0, help="further seeds at the best rate")
    sweeps.add_argument("--curvature", action="store_true")
    sweeps.add_argument("--threads", type=int, default=1)
    sweeps.add_argument("--work", type=Path, default=Path("bench/.rates"))
    sweeps.add_argument("--out", type=Path, default=Path("bench/.rates/rates.jsonl"))
    sweeps.set_defaults(run=run_sweeps)
    table = commands.add_parser("table")
    table.add_argument("files", nargs="+", type=Path)
    table.set_defaults(run=print_table)
    asked = parser.parse_args(arguments)
    asked.run(asked)


if __name__ == "__main__":
    main()
