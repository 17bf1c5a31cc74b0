"""Adding a base model to the home: written aside and renamed, so that its folder is complete or not there."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path

from olora_core.bases.room import check_room, full_disk
from olora_core.errors import ModelError

from .bases import HUB_FILES, check_new_name, what_is_missing
from .home import FILE_MODE, make_folder
from .settings import Settings

LOCK = ".lock"
ASIDE = ".adding"


@contextmanager
def adding(settings: Settings) -> Iterator[Path]:
    """An empty folder on the disk of the added base models, for one command at a time; removed at the end.

    What a killed command has left is removed as well. Raises ModelError while another command adds a model.
    """
    make_folder(settings.added_models_folder)
    with (settings.added_models_folder / LOCK).open("ab") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ModelError(
                "Another `olora models add` is running on this home; try again when it has ended."
            ) from None
        aside = settings.added_models_folder / ASIDE
        shutil.rmtree(aside, ignore_errors=True)
        make_folder(aside)
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def publish(settings: Settings, made: Path, name: str) -> Path:
    """Moves a finished folder, made inside `adding`, to its place. Raises ModelError if the name is taken."""
    for path in made.iterdir():
        path.chmod(FILE_MODE)
        _sync(path)
    _sync(made)
    check_new_name(settings, name)
    folder = settings.added_models_folder / name
    made.rename(folder)
    _sync(folder.parent)
    return folder


def copy_model(source: Path, target: Path) -> None:
    """Copies a model's configuration, safetensors and tokenizer into `target`, and never code or pickles.

    Raises ModelError for a folder that is no base model, and for a disk that is too small.
    """
    if problem := what_is_missing(source):
        raise ModelError(f"{source} cannot be used as a base model: {problem}")
    files = [path for path in sorted(source.iterdir()) if path.is_file() and is_model_file(path.name)]
    check_room(target, sum(path.stat().st_size for path in files))
    with full_disk():
        for path in files:
            shutil.copyfile(path, target / path.name)


def is_model_file(name: str) -> bool:
    """Whether a base model's folder may hold a file of this name."""
    return any(fnmatchcase(name, pattern) for pattern in HUB_FILES)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
