"""A pair of factors with a trained gate for each component: `delta(x) = c B (g ∘ A x)`."""

import torch
from torch import Tensor, nn

from ..layers.adapter import LowRank, autocast_dtype
from ..layers.products import fused_product
from .lora import LoRAAdapter


class GatedAdapter(LoRAAdapter):
    """A (r×in), B (out×r) and the gates g (r) are trained. A component whose gate is 0 is not exported."""

    def __init__(self, A: Tensor, g: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(A, B, scale=scale, dropout=dropout)
        self.g = nn.Parameter(g)

    def _product(self, x: Tensor, *frozen: Tensor | None) -> Tensor:
        # All components take part, so that a gate of 0 has a gradient and may come back.
        dtype, gated = autocast_dtype(x), self.B * self.g
        with torch.no_grad():
            L, R = (self.scale * gated).to(dtype), self.A.to(dtype)
        return fused_product(x.to(dtype), self.A, gated, L, R, self.scale, *frozen)

    def pair(self) -> LowRank:
        """`c B[:, S] diag(g_S) A[S]` over the components S whose gate is not 0."""
        live = self.g != 0
        return LowRank((self.scale * self.B * self.g)[:, live], self.A[live])
