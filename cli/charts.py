"""The curves of one run of `olora train`: its TensorBoard file, and the trackers that its spec file names."""

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
    """Takes in what the run says. `step` is the checkpoint that it goes on from, 0 for none.

    The run's id is in the event file's name: a later start goes on with the same run of each tracker.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        integrations: Sequence[Integration],
        settings: Settings,
        say: Callable[[str], None],
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
                warn=say,
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

    def hear(self, news: object) -> None:
        match news:
            case Resolved():
                self._config = {"run": self.run, **news.spec.model_dump(mode="json")}
            case Step():
                self._add(news.step, curves(named(asdict(news))))
            case Evaluated() if news.step:
                measured = {"full_valid_loss": news.loss, "full_valid_accuracy": news.accuracy}
                self._add(news.step, curves(named(measured)))
            case Finished():
                summary = {"trained_tokens": news.trained_tokens, "certificate": news.certificate}
                self._end("succeeded", {**summary, "adapter_sha256": _digest(news.folder)})

    def _add(self, step: int, points: Curves) -> None:
        """An evaluation at a checkpoint may be done again by a run that goes on from there."""
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
    """SHA-256 of the adapter's tensors; None for an export that has none of its own."""
    tensors = adapter / "adapter_model.safetensors"
    if not tensors.exists():
        return None
    with tensors.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
