"""The worker's end of a tracker's process: starts it, exchanges messages, kills it."""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from store.settings import Settings

from ..launch import MACHINE, inherited

logger = logging.getLogger(__name__)
LISTEN_SECONDS = 0.2
LOST = "its client ended unexpectedly"
_NETWORK = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")
NETWORK = (*_NETWORK, *(name.lower() for name in _NETWORK), "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


class TrackerError(Exception):
    """A tracker's client is missing, fails or does not answer. The message has neither keys nor addresses."""


class TrackerProcess:
    """A running `worker.tracking.trackers`. Leaving the block kills it and every process that it started."""

    def __init__(
        self, tracker: str, environment: dict[str, str], keeps_waiting: Callable[[float], bool]
    ) -> None:
        self._keeps_waiting = keeps_waiting
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.tracking.trackers", tracker, "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        self._answers: queue.Queue[dict[str, Any] | None] = queue.Queue()
        threading.Thread(target=self._listen, name=f"listen to {tracker}", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> "TrackerProcess":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            logger.debug("The tracker's process %d had ended already.", self._process.pid)
        self._process.wait()
        assert self._process.stdin is not None
        try:
            self._process.stdin.close()
        except BrokenPipeError:
            logger.debug("The tracker's process %d had not read everything.", self._process.pid)

    def ask(self, **message: Any) -> dict[str, Any]:
        """Sends one message and returns its answer. Raises TrackerError.

        The write does not block: the process has answered every earlier message, so the pipe is empty.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise TrackerError(LOST) from None
        answer = self._answer(time.monotonic())
        if error := answer.get("error"):
            logger.debug("The tracker's client failed: %s", error["detail"])
            if error["missing"]:
                raise TrackerError("its client is not installed on the worker; ask its operator")
            raise TrackerError(f"it cannot be reached or refuses the run ({error['kind']})")
        return answer

    def _answer(self, asked_at: float) -> dict[str, Any]:
        while self._keeps_waiting(asked_at):
            try:
                answer = self._answers.get(timeout=LISTEN_SECONDS)
            except queue.Empty:
                continue
            if answer is None:
                raise TrackerError(LOST)
            return answer
        raise TrackerError(f"its client did not answer for {time.monotonic() - asked_at:.0f} s")

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._answers.put(json.loads(line))
        self._answers.put(None)


def tracker_environment(
    tracker: str, environment: Mapping[str, str], settings: Settings, folder: Path
) -> dict[str, str]:
    """A client's environment: the machine's variables, the proxies, and the account of this tracker only."""
    chosen = inherited(environment, (*MACHINE, *NETWORK), ("LC_",))
    account = wandb_account(settings, folder) if tracker == "wandb" else mlflow_account(settings)
    return chosen | {"DO_NOT_TRACK": "true"} | account


def wandb_account(settings: Settings, folder: Path) -> dict[str, str]:
    account = {f"WANDB_{name}_DIR": str(folder / name.lower()) for name in ("CACHE", "CONFIG", "DATA")}
    account |= {"WANDB_MODE": settings.wandb_mode, "WANDB_ERROR_REPORTING": "false"}
    if settings.wandb_api_key is not None and settings.wandb_mode == "online":
        account["WANDB_API_KEY"] = settings.wandb_api_key.get_secret_value()
    if settings.wandb_base_url is not None:
        account["WANDB_BASE_URL"] = settings.wandb_base_url
    return account


def mlflow_account(settings: Settings) -> dict[str, str]:
    """User and password move from the address to variables of their own."""
    uri = settings.mlflow_tracking_uri or ""
    parts = urlsplit(uri)
    account = {
        "MLFLOW_TRACKING_URI": uri,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    }
    if parts.username:
        account["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        account["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
        account["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    if settings.mlflow_token is not None:
        account["MLFLOW_TRACKING_TOKEN"] = settings.mlflow_token.get_secret_value()
    return account
