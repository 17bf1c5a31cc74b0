"""What a trial says of a family that breaks."""

import os
import signal
import time
from pathlib import Path

from tests.families.trials import trial


def crash(kind: str, folder: Path, facts: Path) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hang(kind: str, folder: Path, facts: Path) -> None:
    time.sleep(600)


def test_a_crash_is_a_result() -> None:
    assert trial("llama", work=crash) == {"outcome": "failed", "reason": "the process ended with -11"}


def test_a_trial_that_never_ends_is_a_result() -> None:
    assert trial("llama", seconds=0.2, work=hang) == {
        "outcome": "failed",
        "reason": "no end after 0.2 seconds",
    }


def test_a_family_that_transformers_does_not_know_is_a_result() -> None:
    facts = trial("no_such_family")
    assert facts["outcome"] == "failed"
    assert "no_such_family" in facts["reason"]
