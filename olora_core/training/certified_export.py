"""An exported and certified folder, of a run that ends or of a checkpoint."""

import shutil
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bases.loading import Base
from ..export.adapter import export_adapter, record_certificate
from ..export.certificate import certify, certify_merged
from ..export.manifest import RunRecord
from ..export.merged import Merged, export_merged
from ..layers.adapter import Adapter
from ..progress import Note, Phase

ROUNDING_WORTH_A_WARNING = 0.01
Exported = tuple[Path, dict[str, Any]]


def export_certified(
    base: Base,
    adapters: Mapping[str, Adapter],
    folder: Path,
    record: RunRecord,
    rows: Sequence[Sequence[int]],
    figures: Mapping[str, Any],
) -> Generator[Note | Phase, None, Exported]:
    """Writes `folder / "adapter"`, or `folder / "model"` for merged weights. Returns it and its certificate.

    `base.model` has the adapters attached. `rows` are token ids to compare logits on, `figures` are added to
    the certificate. Raises CertificateError.
    """
    merges = record.resolved.adapter.export == "merged"
    exported = folder / ("model" if merges else "adapter")
    yield Phase("exporting", 0, 1)
    shutil.rmtree(exported, ignore_errors=True)
    if merges:
        yield rounding_note(export_merged(base, adapters, exported, record))
    else:
        export_adapter(base, adapters, exported, record)
    yield Phase("exporting", 1, 1)
    yield Phase("certifying", 0, 1)
    certified = certify_merged if merges else certify
    certificate = certified(base, adapters, exported, rows) | dict(figures)
    record_certificate(exported, certificate)
    yield Phase("certifying", 1, 1)
    return exported, certificate


def rounding_note(merged: Merged) -> Note:
    """How much of the update is lost by rounding to the weights' dtype; in bf16 this can be a large share."""
    level = "warn" if merged.rounding_loss > ROUNDING_WORTH_A_WARNING else "info"
    sentence = (
        f"Merged and rounded to {merged.dtype}, the weights lose {merged.rounding_loss:.2%} of the update."
    )
    if level == "warn":
        sentence += " An adapter (adapter.export = 'adapter') loses nothing."
    return Note(level, sentence, {"rounding_loss": merged.rounding_loss})
