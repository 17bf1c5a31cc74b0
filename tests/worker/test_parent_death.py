"""A process ends with its parent, however the parent ends."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.services import wait_until
from tests.worker.service import exists
from worker.parent_death import ORPHANED

ROOT = Path(__file__).resolve().parents[2]
CHILD = """
import sys, time
from worker.parent_death import die_with_parent
die_with_parent(int(sys.argv[1]))
print("alive", flush=True)
time.sleep(600)
"""
PARENT = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}, str(os.getpid())], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a kernel feature of Linux")


def test_a_killed_parent_takes_its_child_along() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "alive\n"
        assert exists(child)
        parent.send_signal(signal.SIGKILL)
        wait_until(lambda: not exists(child), "the end of the child", seconds=20)


def test_a_process_whose_parent_is_gone_already_ends_at_once() -> None:
    somebody_else = 1
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(somebody_else)],
        capture_output=True,
        cwd=ROOT,
        timeout=20,
        check=False,
    )
    assert child.returncode == ORPHANED
    assert child.stdout == b""
