"""`make quickstart` succeeds, and leaves nothing running when it fails or is stopped."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from examples import peft_adapter, quickstart
from examples.service import QuickstartError
from store.settings import get_settings
from tests.cli.running import ROOT, ROWS, descendants, environment, lives, wait_for


@pytest.fixture
def taken_port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The service's port, taken by another socket."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = int(other.getsockname()[1])
        monkeypatch.setenv("OLORA_PORT", str(port))
        get_settings.cache_clear()
        yield port


def test_it_can_run_twice_and_checks_its_adapters(
    taken_port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, rows in (("TRAINING", slice(24)), ("VALIDATION", slice(24, 34))):
        path = tmp_path / f"{name.lower()}.jsonl"
        path.write_text("".join(ROWS.read_text().splitlines(keepends=True)[rows]))
        monkeypatch.setattr(quickstart, name, path)
    before = set(descendants(os.getpid()))
    for _ in range(2):
        assert quickstart.main() == 0
        shown = capsys.readouterr().out
        assert f"Port {taken_port} is taken; using " in shown
        assert "step 3/3" in shown
        assert "Checked here in PEFT" in shown
        assert "before" in shown
        assert set(descendants(os.getpid())) == before
    folders = list((get_settings().home / "quickstart").iterdir())
    assert len(folders) == 2
    for folder in folders:
        assert (folder / "adapter" / "adapter_model.safetensors").is_file()
        assert (folder / "metrics.csv").read_text().startswith("step,")


def test_an_adapter_that_differs_from_the_trained_one_is_noticed() -> None:
    import torch

    certificate = {"bound": 1e-3, "max_abs_logit": 10.0, "max_abs_logit_diff": 0.0}
    logits = torch.linspace(-10, 10, 50)
    peft_adapter.check(logits + 5e-4, logits, certificate)
    with pytest.raises(QuickstartError):
        peft_adapter.check(logits + 2e-3, logits, certificate)
    with pytest.raises(QuickstartError):
        peft_adapter.check(logits + float("nan"), logits, certificate)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_stopping_it_stops_the_service(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "quickstart.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "examples.quickstart"],
            cwd=ROOT,
            env=environment(tmp_path / "home", port="0"),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # As at a terminal: a test run in the background ignores SIGINT, and its children inherit that.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    try:
        wait_for(lambda: b"job started" in log.read_bytes() or process.poll() is not None, 120, "the job")
        below = descendants(process.pid)
        assert len(below) >= 2, log.read_text()
        process.send_signal(number)
        process.wait(150)
        wait_for(lambda: not any(map(lives, below)), 20, "the end of its processes")
    finally:
        process.kill()
    if number == signal.SIGINT:
        assert process.returncode == 130
        assert "Traceback" not in log.read_text()


def test_a_service_that_does_not_start_is_reported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OLORA_DATABASE_URL", "postgresql://u:p@127.0.0.1:9/none")
    get_settings.cache_clear()
    assert quickstart.main() == 1
    assert "OLORA_DATABASE_URL" in capsys.readouterr().out
