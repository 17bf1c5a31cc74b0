"""An exported folder as a zip whose bytes depend only on the files' names and contents."""

import shutil
import zipfile
from pathlib import Path

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
