"""The exported files, applied to a pristine base as a server does it, against the trained model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .adapter import Adapter
from .model import Base

BOUND = 1e-4
"""The largest logit difference allowed, as a share of the largest |logit|."""


def certify(
    base: Base, adapters: Mapping[str, Adapter], folder: Path, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compares logits on `rows` (token ids, unpadded, at least one) and returns the certificate.

    Raises CertificateError, with both figures, when the files do not give the trained model's logits.
    """
    raise NotImplementedError
