"""An exported folder as a zip whose bytes depend only on the files' names and contents, and back."""

import shutil
import zipfile
from pathlib import Path, PurePosixPath

from store.errors import StoreError

MOST_FILES = 1000
MOST_TEXT_BYTES = 100 * 2**20
"""Tokenizers and cards, which compress well."""
_EPOCH = (1980, 1, 1, 0, 0, 0)
_READABLE = 0o644 << 16


def pack(folder: Path, archive: Path) -> None:
    """Zips the folder's files, sorted, without times and owners. Tensors do not compress: they are stored."""
    with zipfile.ZipFile(archive, "w") as target:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
            entry.external_attr = _READABLE
            entry.create_system = 3  # the modes above are Unix's
            tensors = path.suffix == ".safetensors"
            entry.compress_type = zipfile.ZIP_STORED if tensors else zipfile.ZIP_DEFLATED
            with path.open("rb") as source, target.open(entry, "w", force_zip64=True) as written:
                shutil.copyfileobj(source, written, 2**20)


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks a zip into a new folder. Its files are bounded by their packed size, and stay inside.

    Raises StoreError for what is no such zip.
    """
    try:
        with zipfile.ZipFile(archive) as source:
            entries = [entry for entry in source.infolist() if not entry.is_dir()]
            _check(entries, archive.stat().st_size)
            for entry in entries:
                path = folder / PurePosixPath(entry.filename)
                path.parent.mkdir(parents=True, exist_ok=True)
                with source.open(entry) as packed, path.open("wb") as written:
                    shutil.copyfileobj(packed, written, 2**20)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, OSError) as error:
        raise _unusable(str(error)) from None


def _check(entries: list[zipfile.ZipInfo], packed_bytes: int) -> None:
    if len(entries) > MOST_FILES:
        raise _unusable(f"it holds {len(entries)} files, and at most {MOST_FILES} are read")
    allowed = 4 * packed_bytes + MOST_TEXT_BYTES  # tensors hardly compress, texts may
    if sum(entry.file_size for entry in entries) > allowed:
        raise _unusable(f"unpacked it has more than {allowed} bytes")
    for entry in entries:
        parts = PurePosixPath(entry.filename).parts
        if not parts or parts[0] == "/" or ".." in parts or "\\" in entry.filename:
            raise _unusable(f"its file {entry.filename[:80]!r} would lie outside of its folder")


def _unusable(problem: str) -> StoreError:
    return StoreError(f"The adapter's zip cannot be used: {problem}.", param="model", code="invalid_adapter")
