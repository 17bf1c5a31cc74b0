"""Room on the disk for a base model's files. Needs no torch."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import ModelError

FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDY = "free some space, or set OLORA_HOME to a folder on a larger disk"


def check_room(folder: Path, needed: int) -> None:
    """Raises ModelError unless the folder's disk has `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelError(
            f"The model's files need up to {needed / 1e9:.2f} GB, and the disk has {free / 1e9:.2f} GB free; "
            f"{REMEDY}.",
            code="disk_full",
        )


@contextmanager
def full_disk() -> Iterator[None]:
    """Turns the error of a disk that fills up into a ModelError."""
    try:
        yield
    except Exception as error:
        if getattr(error, "errno", None) in FULL or _says_full(str(error)):
            raise ModelError(f"The disk is full; {REMEDY}.", code="disk_full") from error
        raise


def _says_full(message: str) -> bool:
    """safetensors' error has no number but in its text."""
    return any(f"(os error {number})" in message for number in FULL)
