"""A cache of folders, each named after the input it was computed from.

An entry appears complete or not at all; when the cache is full, the least recently used are removed.
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
"""Entries that have not been used for this long are removed, whatever their size."""
PART, LOCK = ".part-", "lock"


@contextmanager
def new_entry(cache: Path) -> Iterator[Path]:
    """A folder to work in, removed afterwards unless `keep` published it. While locked, it is in use."""
    cache.mkdir(parents=True, exist_ok=True)
    while True:
        folder = Path(tempfile.mkdtemp(prefix=PART, dir=cache))
        try:
            lock = (folder / LOCK).open("w")
        except FileNotFoundError:  # removed as abandoned before it was locked
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
    """Publishes a finished folder as `entry`, replacing an older one. Of two processes, one wins."""
    (folder / LOCK).unlink()
    shutil.rmtree(entry, ignore_errors=True)
    try:
        folder.rename(entry)
    except OSError:
        if not entry.is_dir():
            raise


def use(entry: Path) -> None:
    """Marks an entry as used now, so that others are removed before it."""
    with suppress(OSError):  # it may just have been removed
        os.utime(entry)


def trim(caches: Iterable[Path], limit_bytes: int = CACHE_BYTES) -> list[Path]:
    """Removes abandoned folders, old entries, and the least recently used ones until `limit_bytes` is met.

    A run that has mapped a removed entry can still read it. Returns what was removed.
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
        return _used_at(part) < time.time() - 60  # just being created or published
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
