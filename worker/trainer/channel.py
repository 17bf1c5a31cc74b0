"""The trainer's connection to its supervisor, and the deadline of the current job."""

import json
import os
import queue
import threading
import time
from typing import Any

from ..protocol import FENCED, Order, StopRequest, claim_descriptors

WATCH_SECONDS = 0.1


class Channel:
    """Sends messages to the supervisor and receives its messages, in a thread."""

    def __init__(self) -> None:
        self._in, self._out = claim_descriptors()
        self.orders: queue.Queue[Order] = queue.Queue()
        self._lock = threading.Lock()
        self._run: str | None = None
        self._deadline: float | None = None
        self._stop_request: StopRequest | None = None
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        threading.Thread(target=self._watch, name="watch", daemon=True).start()

    def send(self, **message: Any) -> None:
        self._out.write(json.dumps(message).encode() + b"\n")
        self._out.flush()

    def end(self, run: str) -> None:
        """Forgets the deadline of a run that is over."""
        with self._lock:
            if self._run == run:
                self._run = self._deadline = None

    def stop_request(self) -> StopRequest | None:
        """The supervisor's stop request for the current job, if any. Also checks the deadline."""
        self._fence()
        return self._stop_request

    def _listen(self) -> None:
        for line in self._in:
            self._on_message(json.loads(line))
        # The supervisor closed the pipe or is gone; nobody waits for the current job any more.
        os._exit(0)

    def _on_message(self, message: dict[str, Any]) -> None:
        with self._lock:
            if "job" in message:
                order = Order(**message["job"])
                self._run, self._deadline, self._stop_request = order.run, order.deadline, None
                self.orders.put(order)
            elif "lease" in message and message["lease"]["run"] == self._run:
                self._deadline = message["lease"]["deadline"]
            elif "stop" in message and message["stop"]["run"] == self._run:
                self._stop_request = message["stop"]["request"]

    def _watch(self) -> None:
        """Checks during a step too: one may take longer than the lease."""
        while True:
            time.sleep(WATCH_SECONDS)
            self._fence()

    def _fence(self) -> None:
        deadline = self._deadline
        if deadline is not None and time.monotonic() > deadline:
            os.write(2, b"The lease was not renewed in time; the trainer stops.\n")
            os._exit(FENCED)
