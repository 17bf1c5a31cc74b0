"""OLoRA (arXiv 2406.01775): `delta(x) = s (B A x − B0 A0 x)`, B0 = Q_r and A0 = R_r from the QR of W.

The paper subtracts `s B0 A0` from W; here it is subtracted inside delta, so that W stays as it is. Delta is
evaluated as `s (B0 (A−A0) x + (B−B0) A x)`: the same function, but it does not cancel in low precision and
is exactly 0 at the start, in any dtype.
"""

from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from ..layers.adapter import LowRank, Site, full_precision
from ..specs import OLoRASpec
from .base import Method
from .lora import LoRAAdapter
from .lora_plus import FactorsMethod


class OLoRAAdapter(LoRAAdapter):
    """A (r×in) and B (out×r) are trained; A0 and B0, where they started, are frozen buffers."""

    A0: Tensor
    B0: Tensor

    def __init__(self, A0: Tensor, B0: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(A0.clone(), B0.clone(), scale=scale, dropout=dropout)
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)

    def pair(self) -> LowRank:
        """`[s B0 | s (B−B0)] [A−A0 ; A]`, k = 2r, differences of the fp32 masters."""
        B = torch.cat([self.B0, self.B - self.B0], dim=1) * self.scale
        return LowRank(B, torch.cat([self.A - self.A0, self.A]))


class OLoRA(FactorsMethod[OLoRASpec, OLoRAAdapter]):
    """Plain: beside `adapter`, only rates of their own for A and B, where asked for (LoRA+)."""

    def __init__(self, spec: OLoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        warn_of_decay(self, "OLoRA")

    def adapter(self, weight: Tensor, site: Site) -> OLoRAAdapter:
        self.check_rank(site)
        B0, A0 = qr_factors(weight, self.spec.rank)
        if not A0.sum().isfinite():  # every number of W went into A0
            raise damaged(site)
        return OLoRAAdapter(A0, B0, scale=self.spec.scale, dropout=self.spec.dropout)


def warn_of_decay(method: Method[Any, Any], name: str) -> None:
    """For methods whose factors start as a part of W."""
    if method.weight_decay:
        method.notes.append(
            f"weight_decay = {method.weight_decay:g} pulls {name}'s factors to 0, which takes away "
            "pretrained weight; 0 is the better choice."
        )


def damaged(site: Site) -> ModelError:
    return ModelError(f"The weight of '{site.name}' is not finite; the base model is damaged.")


def qr_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Q_r (out×r) and R_r (r×in) of the reduced QR of `weight` (out×in), in fp32, signs included.

    Householder's reflector j depends on columns 1…j alone, so the thin QR of the first r columns has the
    reflectors of the full one; the other columns of R_r are one product.
    """
    with full_precision():
        return _qr_factors(weight, rank)


def _qr_factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    Q, R = torch.linalg.qr(wide[:, :rank])
    A0 = Q.T @ wide
    A0[:, :rank] = R  # exact zeros below the diagonal, where the product leaves rounding
    return Q.float().contiguous(), A0.float()
