"""The trainer's channel: nothing else can write to it, and the trainer exits when it closes."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worker.protocol import FENCED, Order

ROOT = Path(__file__).resolve().parents[2]
LONG_STEP = """
import time
from worker.trainer.trainer import Channel
channel = Channel()
order = channel.orders.get()
channel.send(accepted={"run": order.run})
time.sleep(600)
"""
NOISY = """
import os, sys
from worker.trainer.trainer import Channel
channel = Channel()
print("a library prints")
os.write(1, b"a C library prints")
os.system("echo a child prints")
channel.send(read=sys.stdin.read())
"""


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=ROOT,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def send(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message).encode() + b"\n")
    process.stdin.flush()


def receive(process: subprocess.Popen[bytes]) -> Any:
    assert process.stdout is not None
    return json.loads(process.stdout.readline())


def order(run: str, seconds: float) -> Order:
    return Order(
        run=run,
        spec={},
        base="",
        training="",
        validation=None,
        folder="",
        resume=None,
        checkpoint_seconds=60,
        deadline=time.monotonic() + seconds,
    )


def test_nothing_that_is_printed_reaches_the_supervisor() -> None:
    with running(NOISY) as process:
        assert receive(process) == {"read": ""}
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read() == b""
        printed = process.stderr.read()
    for noise in (b"a library prints", b"a C library prints", b"a child prints"):
        assert noise in printed


def test_a_step_longer_than_the_lease_is_cut_short() -> None:
    with running(LONG_STEP) as process:
        send(process, order("job-1", seconds=0.5).as_message())
        receive(process)
        assert process.wait(5) == FENCED


def test_a_renewal_holds_off_the_end() -> None:
    with running(LONG_STEP) as process:
        send(process, order("job-1", seconds=0.5).as_message())
        receive(process)
        send(process, {"lease": {"run": "job-1", "deadline": time.monotonic() + 60}})
        time.sleep(1)
        assert process.poll() is None


def test_a_renewal_of_an_earlier_attempt_does_not() -> None:
    with running(LONG_STEP) as process:
        send(process, order("job-2", seconds=0.5).as_message())
        receive(process)
        send(process, {"lease": {"run": "job-1", "deadline": time.monotonic() + 60}})
        assert process.wait(5) == FENCED


def test_a_closed_pipe_ends_the_trainer_in_the_middle_of_a_step() -> None:
    with running(LONG_STEP) as process:
        send(process, order("job-1", seconds=60).as_message())
        receive(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(5) == 0
