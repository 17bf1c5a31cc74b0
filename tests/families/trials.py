"""Trials of families, each in a process of its own, so that one that crashes or never ends is one result."""

import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.families.trial import write_facts

SECONDS = 60
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["tests.families.trial"])
"""Torch and transformers are imported once; every trial starts as a copy of the process that has."""


def trial(
    kind: str, seconds: float = SECONDS, work: Callable[[str, Path, Path], None] = write_facts
) -> dict[str, Any]:
    """The facts about a family: {"outcome": "trained" | "refused" | "failed", …}, others with a reason."""
    with tempfile.TemporaryDirectory() as folder:
        facts = Path(folder) / "facts.json"
        process = PROCESSES.Process(target=work, args=(kind, Path(folder), facts))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return {"outcome": "failed", "reason": f"no end after {seconds:g} seconds"}
        if not facts.exists():
            return {"outcome": "failed", "reason": f"the process ended with {process.exitcode}"}
        result: dict[str, Any] = json.loads(facts.read_text(encoding="utf-8"))
        return result
