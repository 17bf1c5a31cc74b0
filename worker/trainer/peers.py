"""The trainer's peers: one process for each further device of a job, started for that job only.

They belong to the trainer's process group and die with it. A peer that exits early ends the attempt.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from olora_core.specs import TrainSpec

from ..protocol import Ended, Order

GRACE_SECONDS = 5.0
"""How long peers may take to exit after the run."""


class Peers:
    """Ranks 1 to n − 1 of a run whose rank 0 is this process.

    When one exits early, `on_loss` is called in a thread with its message, `{"failed": …}` or
    `{"crashed": …}`.
    """

    def __init__(
        self, order: Order, spec: TrainSpec, *, threads: int, on_loss: Callable[[dict[str, Any]], None]
    ) -> None:
        """`spec` has dtype and sharding resolved, so that peers do not probe again."""
        folder = tempfile.mkdtemp(prefix="meeting-", dir=Path(order.folder).parent)
        self.meeting_file = Path(folder) / "meeting"
        self._on_loss = on_loss
        self._over = False
        message = asdict(replace(order, spec=spec.model_dump(mode="json")))
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        self._processes = [
            subprocess.Popen(
                [
                    *(sys.executable, "-m", "worker.trainer.peer", "--parent", str(os.getpid())),
                    *("--rank", str(rank), "--meeting-file", str(self.meeting_file)),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
            )
            for rank in range(1, order.devices)
        ]
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def __enter__(self) -> "Peers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> None:
        """Waits for the peers to exit after the run, and kills those that do not."""
        self._over = True
        until = time.monotonic() + GRACE_SECONDS
        for process in self._processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _watch(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        message = process.stdout.read()
        code = process.wait()
        process.stdin.close()
        process.stdout.close()
        if code != 0 and not self._over:
            ended = Ended(code).sentence.replace("training process", "training process of one device")
            self._on_loss(json.loads(message) if message else {"crashed": {"message": ended}})
