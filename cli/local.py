"""What `olora train` and `olora compare` share: early checks, and stopping by a signal."""

import os
import signal
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console

from olora_core.errors import SpecError

if TYPE_CHECKING:
    from olora_core.formats import Report

console = Console(stderr=True)
STOPPED = 130
"""Exit code of a run that was stopped and can be resumed."""


def existing_file(path: Path, name: str) -> Path:
    if not path.is_file():
        raise SpecError(f"{name}: {path} is not a file.", param=name)
    return path


def check_data(
    training: Path,
    validation: Path | None,
    type: str,
    columns: Mapping[str, str] | None = None,
    *,
    literal: bool = False,
) -> list[str]:
    """How each file is read, in words. With `literal`, control tokens in messages are ordinary text.

    Raises DataError for the first bad line.
    """
    from olora_core.formats import check_for_training

    report, words = _validated(training, columns)
    read = [words]
    trouble = check_for_training(report, role="training", minimum_rows=1, type=type, literal=literal)
    if trouble is None and validation is not None:
        other, words = _validated(validation, columns)
        read.append(words)
        trouble = check_for_training(
            other,
            role="validation",
            minimum_rows=1,
            training_format=report.format,
            type=type,
            literal=literal,
        )
    if trouble is not None:
        raise trouble
    return read


def _validated(path: Path, columns: Mapping[str, str] | None) -> "tuple[Report, str]":
    from olora_core.formats import validate

    with path.open("rb") as stream:
        report = validate(stream, columns)
    examples = "1 example" if report.rows == 1 else f"{report.rows:,} examples"
    return report, f"{path.name}: {report.detected}, {examples}"


def print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def base_folder(model: str, here: Path) -> Path:
    """The folder of `model`: a path relative to `here`, or a name the service knows. Raises ModelError."""
    from store.bases import fetch_base, find_base
    from store.settings import get_settings

    folder = here / Path(model).expanduser()
    if folder.is_dir():
        return folder
    settings = get_settings()
    return fetch_base(find_base(settings, model), settings)


def make_output(output: Path) -> None:
    """Creates the output folder. Raises SpecError if it cannot be created or written to."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"output: cannot create {output}: {reason}. Choose another folder.", param="output"
        ) from None
    if not writable:
        raise SpecError(f"output: {output} is not writable. Choose another folder.", param="output")


def newest_checkpoint(output: Path) -> Path | None:
    folders = sorted(path for path in (output / "checkpoints").glob("step-*") if path.is_dir())
    return folders[-1] if folders else None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one raises KeyboardInterrupt."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        console.print("Stopping after this step, with a checkpoint. Press Ctrl-C again to stop at once.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
