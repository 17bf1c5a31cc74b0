"""LoRA+ (arXiv 2402.12354): B learns faster than A, `lr_B = ratio lr_A`.

B reaches the output through no further factor, A only through B; with one rate for both, a wide model's
features hardly move. A keeps the job's rate.
"""

from collections.abc import Iterable
from typing import Any, Protocol

from torch import nn

from .base import Method


class Factors(Protocol):
    """An adapter that trains `A` (r×in) and `B` (out×r)."""

    A: nn.Parameter
    B: nn.Parameter


def factor_groups(method: Method[Any], adapters: Iterable[Factors], ratio: float) -> list[dict[str, Any]]:
    """Optimizer groups of all A and of all B; a single one, in the adapters' order, where the ratio is 1."""
    pairs = [(adapter.A, adapter.B) for adapter in adapters]
    if ratio == 1:
        return [method.group(factor for pair in pairs for factor in pair)]
    return [
        method.group(A for A, _ in pairs),
        method.group((B for _, B in pairs), lr_multiplier=ratio),
    ]
