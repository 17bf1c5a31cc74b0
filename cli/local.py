"""What `olora train` and `olora compare` do alike: look at files and folders before anything is loaded, and
hear the signals that stop a run.
"""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from olora_core.errors import SpecError

console = Console(stderr=True)
STOPPED = 130
"""Exit code of a run that was stopped and can go on."""


def existing_file(path: Path, name: str) -> Path:
    if not path.is_file():
        raise SpecError(f"{name}: {path} is not a file.", param=name)
    return path


def check_data(training: Path, validation: Path | None, type: str) -> None:
    """Raises DataError with the first bad line, before anything is loaded."""
    from olora_core.formats import check_for_training, validate

    with training.open("rb") as stream:
        report = validate(stream)
    trouble = check_for_training(report, role="training", minimum_rows=1, type=type)
    if trouble is None and validation is not None:
        with validation.open("rb") as stream:
            other = validate(stream)
        trouble = check_for_training(
            other, role="validation", minimum_rows=1, training_format=report.format, type=type
        )
    if trouble is not None:
        raise trouble


def base_folder(model: str, here: Path) -> Path:
    """A folder, beside the spec file or as the service knows it. Raises ModelError for an unknown name."""
    from store.bases import fetch_base, find_base
    from store.settings import get_settings

    folder = here / Path(model).expanduser()
    if folder.is_dir():
        return folder
    settings = get_settings()
    return fetch_base(find_base(settings, model), settings)


def make_output(output: Path) -> None:
    """The output folder. Raises SpecError when it cannot be made, or nothing can be written there."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        writable = os.access(output, os.W_OK | os.X_OK)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        reason = getattr(error, "strerror", None) or error
        raise SpecError(
            f"output: {output} cannot be made: {reason}. Name another folder.", param="output"
        ) from None
    if not writable:
        raise SpecError(f"output: nothing can be written to {output}. Name another folder.", param="output")


def newest_checkpoint(output: Path) -> Path | None:
    folders = sorted(path for path in (output / "checkpoints").glob("step-*") if path.is_dir())
    return folders[-1] if folders else None


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second one ends the process at once."""
    received: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        console.print("Stopping at the next step, with a checkpoint; once more to stop at once.")

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
