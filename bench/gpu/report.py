"""What a section of `bench.gpu` is given, and how it reports: each result is printed and appended at once.

    python -m bench.gpu.promises --device cpu --tiny

Each section's module has a `run(task, report)` and ends with `main(run)`, so that it is a program of its own.
"""

import argparse
import json
import math
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TRACEBACK_LINES = 12
LISTED = 3
"""Numbers of a list that a printed line shows; the JSON has them all."""


@dataclass(frozen=True)
class Task:
    """How a section is to run."""

    device: str
    """"cuda" or "cpu"."""
    tiny: bool
    """A smoke test: the smallest shapes and the fewest steps that still walk every path."""
    scratch: Path
    """A folder for this section's files, removed after it."""


@dataclass
class Report:
    """The results of one section. With `out` they are appended to that file as they come."""

    section: str
    out: Path | None = None
    until: float = math.inf
    """When the section must be over, by `time.monotonic`, which all processes of a machine share."""
    failed: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        """What is left of the limit; a section leaves out what no longer fits, and says so with `skip`."""
        return self.until - time.monotonic()

    def figures(self, name: str, **figures: Any) -> None:
        """What was measured. No verdict."""
        self._write({"name": name, "figures": figures})

    def check(self, name: str, passed: bool, **figures: Any) -> bool:
        """A promise, and whether it was kept, with the numbers that say so."""
        self.failed += not passed
        self._write({"name": name, "passed": bool(passed), "figures": figures})
        return bool(passed)

    def skip(self, name: str, reason: str) -> None:
        """What was not run, and why, in a sentence."""
        self._write({"name": name, "skipped": reason})

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """An exception inside counts as one failed check of this name; the section goes on."""
        try:
            yield
        except Exception as error:
            lines = traceback.format_exc().splitlines()[-TRACEBACK_LINES:]
            self.check(name, False, error=f"{type(error).__name__}: {error}"[:2000], traceback=lines)

    def _write(self, record: dict[str, Any]) -> None:
        record = {"section": self.section, **record, "after_seconds": round(time.monotonic() - self.began, 1)}
        print(f"  {record['after_seconds']:6.1f} s  {line_of(record)}", flush=True)
        append(self.out, record)


def append(out: Path | None, record: dict[str, Any]) -> None:
    """Adds one JSON line, after whatever line a killed process left unfinished."""
    if out is None:
        return
    with out.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, default=str).encode() + b"\n")


def line_of(record: dict[str, Any]) -> str:
    """A record in one line."""
    if "skipped" in record:
        return f"{record['name']}: skipped. {record['skipped']}"
    verdict = {True: ": ok", False: ": FAILED", None: ""}[record.get("passed")]
    figures = {name: value for name, value in record.get("figures", {}).items() if name != "traceback"}
    shown = ", ".join(f"{name} {_shown(value)}" for name, value in figures.items())
    return f"{record['name']}{verdict}{' · ' if shown else ''}{shown}"


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        more = f", … {len(value)} in all" if len(value) > LISTED else ""
        return f"[{', '.join(_shown(item) for item in value[:LISTED])}{more}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_shown(item)}" for key, item in value.items()) + "}"
    return str(value)


def main(run: Callable[[Task, Report], None]) -> None:
    """A section as a program; exit status 1 when a check failed."""
    module = sys.modules[run.__module__]
    parser = argparse.ArgumentParser(description=module.__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smoke test with the smallest shapes")
    parser.add_argument("--out", type=Path, help="file to append JSON lines to")
    limit = parser.add_mutually_exclusive_group()
    limit.add_argument("--seconds", type=float, default=math.inf, help="limit that the section keeps to")
    limit.add_argument("--until", type=float, help="the same as a time of the machine's monotonic clock")
    asked = parser.parse_args()
    until = asked.until or time.monotonic() + asked.seconds
    report = Report(Path(str(module.__file__)).stem, asked.out, until)
    with tempfile.TemporaryDirectory(prefix="bench-gpu-") as scratch:
        run(Task(asked.device, asked.tiny, Path(scratch)), report)
    raise SystemExit(1 if report.failed else 0)
