"""The curves of one run of `olora train`: its TensorBoard file, and the trackers named in its spec file."""

import hashlib
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from olora_core.progress import Evaluated, Finished, Resolved, Step
from store.integrations import Integration
from store.progress import named
from store.settings import Settings
from worker.tracking.curves import Curves, curves, go_on, run_in
from worker.tracking.follower import Follower, RunUpdate, with_runs


class Charts:
    """Records the updates of a run. `step` is the checkpoint from which it resumes, 0 without one.

    The run's id is part of the event file's name, so that a resumed run continues in every tracker.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        integrations: Sequence[Integration],
        settings: Settings,
        warn: Callable[[str], None],
    ) -> None:
        self.run = run_in(folder) or f"olora-{secrets.token_hex(6)}"
        self.file, self._points = go_on(folder, self.run, step)
        self._config: dict[str, Any] = {}
        self._status: str | None = None
        self._summary: dict[str, Any] = {}
        self._turn = threading.Lock()
        self._followers = [
            Follower(
                integration,
                run=run,
                name=f"{run}-{integration.type}",
                source=self,
                settings=settings,
                warn=warn,
            )
            for integration, run in with_runs(integrations, self.run)
        ]

    def __enter__(self) -> "Charts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.file.__exit__()
        if isinstance(error, Exception):
            self._end("failed", {"error": str(error)})
        for follower in self._followers:
            follower.stop(hurry=isinstance(error, KeyboardInterrupt))
        for follower in self._followers:
            follower.join()

    def record(self, update: object) -> None:
        match update:
            case Resolved():
                self._config = {"run": self.run, **update.spec.model_dump(mode="json")}
            case Step():
                self._add(update.step, curves(named(asdict(update))))
            case Evaluated() if update.step:
                measured = {"full_valid_loss": update.loss, "full_valid_accuracy": update.accuracy}
                self._add(update.step, curves(named(measured)))
            case Finished():
                summary = {"trained_tokens": update.trained_tokens, "certificate": update.certificate}
                self._end("succeeded", {**summary, "adapter_sha256": _digest(update.folder)})

    def _add(self, step: int, points: Curves) -> None:
        """Points that are known already are dropped: a resumed run may repeat its checkpoint's evaluation."""
        with self._turn:
            known = self._points.setdefault(step, {})
            new = {chart: number for chart, number in points.items() if chart not in known}
            known.update(new)
        self.file.add(step, new, time.time())

    def _end(self, status: str, summary: dict[str, Any]) -> None:
        with self._turn:
            self._status, self._summary = status, summary

    def update(self, after: int) -> RunUpdate:
        """As the followers ask for it."""
        with self._turn:
            rows = [(step, dict(points)) for step, points in sorted(self._points.items()) if step > after]
            return RunUpdate(self._config, rows, self._status, self._summary)


def _digest(adapter: Path) -> str | None:
    """SHA-256 of the adapter's tensors; None for a merged model."""
    tensors = adapter / "adapter_model.safetensors"
    if not tensors.exists():
        return None
    with tensors.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
