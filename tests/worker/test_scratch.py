"""Scratch folders: gone after use, and removed for those who could not."""

import subprocess
import sys
from pathlib import Path

import pytest

from worker.scratch import remove_orphans, scratch_folder

ROOT = Path(__file__).resolve().parents[2]
OWNER = """
import sys, time
from pathlib import Path
from worker.scratch import scratch_folder
with scratch_folder(Path(sys.argv[1]), "ftjob-a-1") as folder:
    (folder / "base.bin").write_bytes(bytes(10))
    print("working", flush=True)
    time.sleep(600)
"""


def test_a_scratch_folder_is_fresh_and_gone_afterwards(tmp_path: Path) -> None:
    (tmp_path / "ftjob-a-1" / "old").mkdir(parents=True)
    with scratch_folder(tmp_path, "ftjob-a-1") as folder:
        assert not (folder / "old").exists()
        (folder / "new").touch()
    assert not folder.exists()


def test_a_scratch_folder_goes_with_an_error_too(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), scratch_folder(tmp_path, "ftjob-a-1") as folder:
        raise RuntimeError
    assert not folder.exists()


def test_only_folders_of_dead_workers_are_orphans(tmp_path: Path) -> None:
    (tmp_path / "ftjob-unlocked-1").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    ) as owner:
        assert owner.stdout is not None
        owner.stdout.readline()
        assert remove_orphans(tmp_path) == ["ftjob-unlocked-1"]
        owner.kill()
    assert remove_orphans(tmp_path) == ["ftjob-a-1"]
    assert remove_orphans(tmp_path) == []


def test_a_home_without_scratch_has_no_orphans(tmp_path: Path) -> None:
    assert remove_orphans(tmp_path / "scratch") == []
