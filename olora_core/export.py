"""A trained adapter as a folder that everything can load: plain LoRA against the untouched base."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .model import Base
from .specs import TrainSpec


@dataclass(frozen=True)
class Story:
    """What the manifest and the model card tell beside the tensors."""

    asked: TrainSpec
    resolved: TrainSpec
    data: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each data file by its role: `training`, `validation`."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()
    """(step, training loss), for the curve."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    rank: int
    target_modules: list[str]
    energy_kept: float
    """Share of the squared Frobenius norm of all ΔW that the files hold; 1 unless truncated."""


def export_adapter(base: Base, adapters: Mapping[str, Adapter], folder: Path, story: Story) -> Export:
    """Writes the adapter's folder: exact, or truncated when the spec asks for an `export_rank`.

    `folder` must not exist yet; it appears complete or not at all.
    """
    raise NotImplementedError


def record_certificate(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Adds the certificate to the manifest and the model card of an exported folder."""
    raise NotImplementedError
