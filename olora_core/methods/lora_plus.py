"""LoRA+ (arXiv 2402.12354): B learns faster than A, `lr_B = ratio lr_A`.

B reaches the output through no further factor, A only through B; with one rate for both, a wide model's
features hardly move. A keeps the job's rate.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

from ..layers.adapter import Adapter
from ..specs import FactorsSpec
from .base import Method

FactorsSpecT = TypeVar("FactorsSpecT", bound=FactorsSpec)


class FactorsAdapter(Adapter):
    """An adapter that trains two factors: A (r×in) and B (out×r), or a stack of such pairs."""

    A: nn.Parameter
    B: nn.Parameter


FactorsT = TypeVar("FactorsT", bound=FactorsAdapter)


class FactorsMethod(Method[FactorsSpecT, FactorsT]):
    """A method that trains two plain factors, and so can give each a learning rate of its own."""

    def param_groups(self, adapters: Mapping[str, FactorsT]) -> list[dict[str, Any]]:
        """One group for all A and one for all B; with ratio 1 a single one, in the adapters' order."""
        pairs, ratio = [(adapter.A, adapter.B) for adapter in adapters.values()], self.spec.lora_plus_ratio
        if ratio == 1:
            return [self.group(factor for pair in pairs for factor in pair)]
        return [
            self.group(A for A, _ in pairs),
            self.group((B for _, B in pairs), lr_multiplier=ratio),
        ]
