"""What the service keeps is its owner's alone: a new folder is made 0700, a new file 0600.

The modes of what is there already stay, for whoever made it may have had reasons.
"""

import os
from pathlib import Path

FOLDER_MODE = 0o700
FILE_MODE = 0o600


def make_folder(folder: Path) -> None:
    """Makes a folder and those above it that are missing; `Path.mkdir` would leave the latter open to all."""
    if not folder.parent.is_dir():
        make_folder(folder.parent)
    folder.mkdir(mode=FOLDER_MODE, exist_ok=True)


def private(path: str, flags: int) -> int:
    """An opener: `open(path, "xb", opener=private)`."""
    return os.open(path, flags, FILE_MODE)
