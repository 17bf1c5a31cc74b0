"""The supervisor's end of a trainer process: starts it, exchanges messages, reports how it ended."""

import json
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from typing import Any

from ..launch import MACHINE, inherited
from ..protocol import Ended

logger = logging.getLogger(__name__)
CLOSE_SECONDS = 5.0
MOST_TOKENIZER_THREADS = 32
_INHERITED_PREFIXES = (
    *("LC_", "CUDA_", "NVIDIA_", "NCCL_", "TORCH", "PYTORCH_", "TRITON_", "HIP_", "ROCR_", "HSA_"),
    *("OMP_", "MKL_", "KMP_", "OPENBLAS_", "GOMP_", "ATEN_", "RAYON_"),
)


class TrainerProcess:
    """A running trainer. Messages from it are in `messages`; the last one is `Ended`."""

    def __init__(self, project_id: str) -> None:
        self.project_id = project_id
        """The only project whose data it may see."""
        self._process = subprocess.Popen(
            [sys.executable, "-m", "worker.trainer.trainer", "--parent", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=trainer_environment(os.environ),
            start_new_session=True,
        )
        self.messages: queue.Queue[dict[str, Any] | Ended] = queue.Queue()
        self._lock = threading.Lock()
        threading.Thread(target=self._listen, name="trainer", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def send(self, message: dict[str, Any]) -> None:
        """Sends one message. Nothing happens if the trainer is gone: then `messages` ends with `Ended`."""
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.write(json.dumps(message).encode() + b"\n")
                self._process.stdin.flush()
            except (BrokenPipeError, ValueError):
                logger.debug("The trainer %d no longer listens.", self.pid)

    def kill(self) -> None:
        """Kills the trainer and every process that it started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            logger.debug("The trainer %d had ended already.", self.pid)
        self._process.wait()

    def close(self) -> None:
        """Ends an idle trainer, which exits when its input is closed."""
        assert self._process.stdin is not None
        with self._lock:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                logger.debug("The trainer %d had ended already.", self.pid)
        try:
            self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.messages.put(json.loads(line))
        try:
            code = self._process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            code = self._process.wait()
        self._process.stdout.close()
        self.messages.put(Ended(code))


def tokenizer_threads() -> int:
    """One for each core of this process, up to the number beyond which more do not help."""
    return min(MOST_TOKENIZER_THREADS, len(os.sched_getaffinity(0)))


def trainer_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """A trainer's environment: the machine's variables, and none of the service's addresses and keys."""
    chosen = inherited(environment, MACHINE, _INHERITED_PREFIXES)
    return chosen | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        # Set explicitly: keeps tokenizers parallel and silences its fork warning (we never fork).
        "TOKENIZERS_PARALLELISM": "true",
        "RAYON_NUM_THREADS": chosen.get("RAYON_NUM_THREADS", str(tokenizer_threads())),
        "PYTHONUNBUFFERED": "1",
        # Waiting threads sleep: on cores shared with anything else, spinning made a step seven times slower.
        "OMP_WAIT_POLICY": chosen.get("OMP_WAIT_POLICY", "PASSIVE"),
    }
