"""Folders of finished work under the name of what it was made from, so that it is done once.

A folder appears whole or not at all; those that are not used go first when there are too many.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CACHE_BYTES = 10 * 2**30
KEPT_SECONDS = 7 * 86400.0
"""What nobody has used for so long goes, however small it is."""
PART, LOCK = ".part-", "lock"


@contextmanager
def new_entry(cache: Path) -> Iterator[Path]:
    """A folder to work in, gone afterwards unless it was kept. Its lock says that somebody is at work."""
    cache.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PART, dir=cache))
        try:
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:  # taken for abandoned before it was locked
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (folder / LOCK).exists():
            break
        lock.close()
    with lock:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def keep(folder: Path, entry: Path) -> None:
    """Publishes a finished folder. Whatever was there before is replaced; of two at once, one stays."""
    (folder / LOCK).unlink()
    shutil.rmtree(entry, ignore_errors=True)
    try:
        folder.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def use(entry: Path) -> None:
    """Notes that an entry is wanted, so that others go before it."""
    with suppress(OSError):  # it may just have been removed
        os.utime(entry)


def trim(caches: Iterable[Path], limit_bytes: int = CACHE_BYTES) -> list[Path]:
    """Removes what died half done, what is old, and the least recently used until the rest fits.

    An entry that a run has mapped stays readable for that run. Returns what was removed.
    """
    removed, aged = [], []
    for path in [path for cache in caches if cache.is_dir() for path in cache.iterdir() if path.is_dir()]:
        if path.name.startswith(PART):
            removed += [path] if _is_abandoned(path) else []
        else:
            aged.append((_used_at(path), path))
    room = limit_bytes
    for used_at, path in sorted(aged, reverse=True):
        room -= sum(_size(file) for file in path.glob("*"))
        if room < 0 or used_at < time.time() - KEPT_SECONDS:
            removed.append(path)
    for path in removed:
        shutil.rmtree(path, ignore_errors=True)
    return removed


def _is_abandoned(part: Path) -> bool:
    try:
        with (part / LOCK).open("r") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return _used_at(part) < time.time() - 60  # it is being made, or being kept
    except OSError:
        return False
    return True


def _used_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
