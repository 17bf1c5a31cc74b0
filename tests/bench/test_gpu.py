"""The GPU benchmark: green on the CPU in small, and no section can take the others with it."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bench.gpu import __main__ as gpu

ROOT = Path(__file__).parents[2]
PROGRAMS = {
    "fine": "report.check('two and two', 2 + 2 == 4, sum=4)",
    "broken": "report.check('a promise', False, difference=0.5)",
    "raises": "raise RuntimeError('out of luck')",
    "crashes": "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)",
    "hangs": (
        "import subprocess, time; "
        "child = subprocess.Popen(['sleep', '600']); report.figures('child', pid=child.pid); time.sleep(600)"
    ),
    "cut": "task.scratch.mkdir(exist_ok=True); report.out.open('a').write('{\"section\": \"cu')",
}
"""Sections whose `run` is this line."""


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PROGRAMS in the place of the real sections, each with a second or, the last, with three."""
    folder = tmp_path / "bench" / "gpu"
    folder.mkdir(parents=True)
    for name, line in PROGRAMS.items():
        text = f"from bench.gpu.report import main\n\n\ndef run(task, report):\n    {line}\n\n\nmain(run)\n"
        (folder / f"{name}.py").write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu, "SECTIONS", dict.fromkeys(PROGRAMS, 10))
    monkeypatch.setattr(gpu, "GRACE_SECONDS", 0.5)


def run(out: Path, *arguments: str) -> tuple[int, list[dict[str, Any]]]:
    """Exit status and records of a run on the CPU."""
    before = len(gpu.records(out))
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--device", "cpu", "--tiny", "--out", str(out), *arguments])
    return int(ended.value.code or 0), gpu.records(out)[before:]


@pytest.mark.usefixtures("sections")
def test_what_fails_costs_one_section(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    names = ["raises", "crashes", "broken", "cut", "fine"]
    status, found = run(tmp_path / "out", "--sections", ",".join(names))
    assert status == 1
    verdicts = [(record["section"], record.get("passed")) for record in found[1:]]
    assert verdicts == [("raises", False), ("crashes", False), ("broken", False), ("fine", True)]
    assert found[2]["figures"] == {"why": "exit status -11"}
    printed = capfd.readouterr().out
    assert "| broken | a promise: FAILED · difference 0.5 |" in printed
    assert "1 checks passed, 3 failed, 0 skipped" in printed


@pytest.mark.usefixtures("sections")
def test_a_hanging_section_is_ended_with_its_children_and_the_next_one_runs(tmp_path: Path) -> None:
    began = time.monotonic()
    status, found = run(tmp_path / "out", "--sections", "hangs,fine", "--budget-seconds", "8")
    assert status == 1
    assert time.monotonic() - began < 20
    child, end, fine = found[1:]
    assert end["figures"]["why"] == "killed at its limit of 4 s"
    assert fine["passed"] is True
    assert not Path(f"/proc/{child['figures']['pid']}").exists() or "zombie" in (
        Path(f"/proc/{child['figures']['pid']}/status").read_text()
    )


@pytest.mark.usefixtures("sections")
def test_a_run_adds_to_what_the_file_holds(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(out, "--sections", "broken")[0] == 1
    assert run(out, "--sections", "fine")[0] == 0  # the exit status and the table are this run's alone
    assert [record["section"] for record in gpu.records(out)] == ["machine", "broken", "machine", "fine"]
    assert "1 checks passed, 0 failed, 0 skipped" in capfd.readouterr().out


def test_an_unknown_section_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path / "out", "--sections", "speed,sped") == (2, [])
    assert "no section sped; there are promises, speed," in capsys.readouterr().err


def test_a_folder_without_wheels_is_named(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"holds no wheel: collect them with bench/gpu_wheels\.sh"):
        gpu.main(["--device", "cpu", "--wheels", str(tmp_path), "--out", str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_a_section_is_green_on_the_cpu(section: str, tmp_path: Path) -> None:
    """As a user runs it, from another folder and with nothing but the checkout on the path."""
    out = tmp_path / "out"
    command = ["-m", "bench.gpu", "--sections", section, "--tiny", "--device", "cpu", "--out", str(out)]
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stdout[-4000:] + ended.stderr[-2000:]
    checks = [record for record in map(json.loads, out.read_text().splitlines()) if "passed" in record]
    assert all(record["passed"] for record in checks)
