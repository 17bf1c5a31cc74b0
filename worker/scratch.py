"""Scratch folders: one for each attempt, locked while its worker is alive."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from store.home import make_folder

LOCK = "lock"


@contextmanager
def scratch_folder(parent: Path, name: str) -> Iterator[Path]:
    """A fresh folder, removed afterwards. Its lock shows `remove_orphans` that it is in use."""
    with _lock(parent):
        folder = parent / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        lock = (folder / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def remove_orphans(parent: Path) -> list[str]:
    """Removes the folders whose worker died; returns their names."""
    with _lock(parent):
        orphans = [entry for entry in sorted(parent.iterdir()) if entry.is_dir() and _is_orphan(entry)]
        for folder in orphans:
            shutil.rmtree(folder, ignore_errors=True)
    return [folder.name for folder in orphans]


def _is_orphan(folder: Path) -> bool:
    try:
        lock = (folder / LOCK).open("r+")
    except FileNotFoundError:
        return True
    with lock:
        return _acquire(lock)


def _acquire(lock: IO[str]) -> bool:
    """Takes the lock unless a living process holds it; returns whether it did."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _lock(parent: Path) -> Iterator[None]:
    """Serialises making and removing folders, so that none is seen before it is locked."""
    make_folder(parent)
    with (parent / ".turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        yield
