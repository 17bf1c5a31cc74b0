"""New folders (0700) and files (0600) that only the service's user can read.

Existing ones keep their modes, which somebody may have chosen on purpose.
"""

import os
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600


def make_folder(folder: Path) -> None:
    """Makes a folder and its missing parents; `Path.mkdir` would give the parents the default mode."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


def private(path: str, flags: int) -> int:
    """An opener: `open(path, "xb", opener=private)`."""
    return os.open(path, flags, FILE_MODE)
