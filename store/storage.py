"""The bytes of stored files.

Bytes are written to a temporary file, synced and renamed, so that a key holds either all of them or nothing.
Keys are built from ids only; a name that a client sent never becomes a path.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from .errors import StorageDamaged, StorageError, StorageFull, TooLarge
from .home import make_folder, private
from .settings import Settings

MANIFEST = "stored.json"
"""Written last in a stored folder: its files with sizes and SHA-256."""
INCOMING = ".incoming"
PART = ".part"
_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,199}")
_CHUNK = 2**20


class Writer:
    """Counts and hashes what is written; publishes it under its key when the block ends without an error."""

    def __init__(self, target: Path, incoming: Path, max_bytes: int | None) -> None:
        self.bytes = 0
        self._target = target
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self._part, self._file = _new_part(incoming)

    @property
    def sha256(self) -> str:
        """SHA-256 of what has been written so far, in hexadecimal."""
        return self._hash.hexdigest()

    def write(self, chunk: bytes) -> int:
        """Raises TooLarge beyond the allowed size and StorageFull if the disk is full."""
        if self._max_bytes is not None and self.bytes + len(chunk) > self._max_bytes:
            raise TooLarge(f"The file is larger than the {self._max_bytes} bytes allowed.")
        with _disk_errors():
            self._file.write(chunk)
        self.bytes += len(chunk)
        self._hash.update(chunk)
        return len(chunk)

    def reread(self) -> BinaryIO:
        """A stream of what has been written so far, before it is published."""
        with _disk_errors():
            self._file.flush()
            return self._part.open("rb")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.publish()
        else:
            self.discard()

    def publish(self) -> None:
        """Makes what was written visible under its key, or discards it. Raises StorageError."""
        try:
            self._sync_and_rename()
        finally:
            self.discard()

    def discard(self) -> None:
        """Closes the file and removes what was not published."""
        with contextlib.suppress(OSError):  # its buffer may not fit on the disk either
            self._file.close()
        self._part.unlink(missing_ok=True)

    def _sync_and_rename(self) -> None:
        with _disk_errors():
            self._file.flush()
            os.fsync(self._file.fileno())
            make_folder(self._target.parent)
            os.rename(self._part, self._target)
            _sync_folder(self._target.parent)


class Storage:
    """Bytes under keys such as `files/file-abc`, in a local folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.realpath(root))
        with _disk_errors():
            make_folder(self.root / INCOMING)

    def writer(self, key: str, *, max_bytes: int | None = None) -> Writer:
        """`with storage.writer(key) as writer: writer.write(chunk)`; nothing is visible before the end."""
        with _disk_errors():
            return Writer(self._path(key), self.root / INCOMING, max_bytes)

    def put(self, key: str, path: Path) -> tuple[int, str]:
        """Stores a local file. Returns its size and SHA-256."""
        with path.open("rb") as source, self.writer(key) as writer:
            while chunk := source.read(_CHUNK):
                writer.write(chunk)
        return writer.bytes, writer.sha256

    def put_folder(self, prefix: str, folder: Path) -> None:
        """Stores a folder's files, then the manifest that makes it complete."""
        self.delete_folder(prefix)
        listed = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink()):
            name = path.relative_to(folder).as_posix()
            size, sha256 = self.put(f"{prefix}/{name}", path)
            listed[name] = {"bytes": size, "sha256": sha256}
        with self.writer(f"{prefix}/{MANIFEST}") as writer:
            writer.write(json.dumps({"files": listed}, indent=1).encode())

    def open(self, key: str) -> BinaryIO:
        """A stream of the stored bytes. Raises StorageError if there are none."""
        with _disk_errors(key):
            return os.fdopen(os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW), "rb")

    def size(self, key: str) -> int:
        with _disk_errors(key):
            return self._path(key).lstat().st_size

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def fetch(self, key: str, to: Path) -> str:
        """Copies the bytes to a local path. Returns their SHA-256."""
        digest = hashlib.sha256()
        with self.open(key) as source, _disk_errors(key):
            to.parent.mkdir(parents=True, exist_ok=True)
            with to.open("wb") as target:
                while chunk := source.read(_CHUNK):
                    digest.update(chunk)
                    target.write(chunk)
        return digest.hexdigest()

    def fetch_folder(self, prefix: str, to: Path) -> None:
        """Copies a stored folder and verifies every file against the manifest.

        `to` appears only when everything is right. Raises StorageDamaged when a file differs and StorageError
        when the folder is incomplete.
        """
        aside = to.with_name(f"{to.name}.{uuid.uuid4().hex}{PART}")
        try:
            for name, listed in self._manifest(prefix).items():
                target = aside / name
                digest = self.fetch(f"{prefix}/{name}", target)
                if (target.stat().st_size, digest) != listed:
                    raise StorageDamaged(
                        f"{prefix}/{name} is damaged: its bytes differ from what was stored."
                    )
            with _disk_errors(prefix):
                aside.mkdir(parents=True, exist_ok=True)
                os.rename(aside, to)
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def list(self, prefix: str) -> Sequence[str]:
        """The keys below a prefix, sorted."""
        folder = self._path(prefix)
        return sorted(
            p.relative_to(self.root).as_posix()
            for p in folder.rglob("*")
            if p.is_file() and not p.is_symlink()
        )

    def delete(self, key: str) -> None:
        """Removes the bytes, if there are any."""
        with _disk_errors(key):
            self._path(key).unlink(missing_ok=True)

    def delete_folder(self, prefix: str) -> None:
        """Removes everything below a prefix, if there is anything, the manifest first."""
        self.delete(f"{prefix}/{MANIFEST}")
        shutil.rmtree(self._path(prefix), ignore_errors=True)

    def remove_part_leftovers(self) -> int:
        """Removes half-written files whose writer has died; a live one holds a lock. Returns how many."""
        parts = list((self.root / INCOMING).glob(f"*{PART}"))
        return sum(_remove_if_abandoned(part) for part in parts)

    def _manifest(self, prefix: str) -> dict[str, tuple[int, str]]:
        """Size and SHA-256 of each file of a stored folder."""
        try:
            with self.open(f"{prefix}/{MANIFEST}") as file:
                listed = json.load(file)["files"]
            files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise StorageDamaged(f"{prefix} is damaged: its manifest cannot be read.") from None
        for name in files:
            _check_key(name)
        return files

    def _path(self, key: str) -> Path:
        """Where a key's bytes are: inside the root, on a path without symbolic links."""
        _check_key(key)
        path = self.root / key
        if os.path.realpath(path) != str(path):
            raise StorageError(f"{key!r} leads out of the storage.")
        return path


def storage(settings: Settings) -> Storage:
    """The storage that the settings name."""
    return Storage(settings.storage_folder)


def _check_key(key: str) -> None:
    if len(key) > 512 or not all(_SEGMENT.fullmatch(segment) for segment in key.split("/")):
        raise StorageError(f"{key[:100]!r} is not a valid storage key.")


def _new_part(incoming: Path) -> tuple[Path, BinaryIO]:
    """A new file to write to, locked: a lock that has ended with its process marks the file as abandoned."""
    while True:
        part = incoming / f"{uuid.uuid4().hex}{PART}"
        file = open(part, "xb", opener=private)
        fcntl.flock(file, fcntl.LOCK_EX)
        # Between open and lock it may have been removed as abandoned.
        with contextlib.suppress(FileNotFoundError):
            if part.stat().st_ino == os.fstat(file.fileno()).st_ino:
                return part, file
        file.close()


def _remove_if_abandoned(part: Path) -> bool:
    try:
        with part.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Under the lock: a writer that was about to use it checks again, and makes another.
            part.unlink(missing_ok=True)
    except OSError:  # gone, or held by its writer
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _disk_errors(key: str = "") -> Iterator[None]:
    """Turns the operating system's errors into StorageErrors."""
    try:
        yield
    except FileNotFoundError:
        raise StorageError(f"Nothing is stored under {key!r}.", code="not_stored") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageFull("No space is left where files are stored; free some and try again.") from None
        raise StorageError(f"The storage failed: {error.strerror}.") from error
