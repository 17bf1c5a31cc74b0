"""Several methods on the same data, each at its best learning rate, as a generator like `train`."""

from collections.abc import Generator
from pathlib import Path

from .model import Base
from .progress import Compared, ComparedStep, ComparisonProgress, Note, Phase, RunFinished, Saved
from .specs import ComparisonSpec

__all__ = [
    "Compared",
    "ComparedStep",
    "ComparisonProgress",
    "Note",
    "Phase",
    "RunFinished",
    "Saved",
    "compare",
]

PAGE, REPORT = "comparison.html", "comparison.json"


def compare(
    spec: ComparisonSpec,
    base: Base,
    training: Path,
    validation: Path,
    folder: Path,
    *,
    resume: Path | None = None,
    checkpoint_seconds: float = 60.0,
    cache: Path | None = None,
) -> Generator[ComparisonProgress, str | None, None]:
    """Finds each method's learning rate on rows held out of `training`, then trains it with several seeds.

    The last thing said is Compared: `folder` then holds `comparison.html` and `comparison.json`. `base` is
    loaded in `compute_dtype(spec.training, …)`, as for `train`, and is as it was when the loop is left.
    Sending "save" at a ComparedStep makes a Saved the next thing said. With `resume`, such a folder, the
    comparison goes on exactly there. Tokenised files are kept in `cache`, else in `folder`.

    Raises OloraErrors for expected trouble. A method that diverges or does not fit is told of in the report.
    """
    raise NotImplementedError
    yield
