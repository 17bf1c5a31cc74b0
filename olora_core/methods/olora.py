"""OLoRA (arXiv 2406.01775): `delta(x) = s (B A x − B0 A0 x)`, B0 = Q_r and A0 = R_r from the QR of W.

The paper subtracts `s B0 A0` from W; here it is subtracted inside delta, so that W stays as it is. Delta is
evaluated as `s (B0 (A−A0) x + (B−B0) A x)`: the same function, but it does not cancel in low precision and
is exactly 0 at the start, in any dtype.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapter import Adapter, LowRank, Site, compute_dtype, full_precision
from ..errors import ModelError
from ..specs import OLoRASpec
from .base import Method


class OLoRAAdapter(Adapter):
    """A (r×in) and B (out×r) are trained; A0 and B0, where they started, are frozen buffers."""

    A0: Tensor
    B0: Tensor

    def __init__(self, A0: Tensor, B0: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(in_features=A0.shape[1], out_features=B0.shape[0], dropout=dropout)
        self.scale = scale
        self.register_buffer("A0", A0)
        self.register_buffer("B0", B0)
        self.A = nn.Parameter(A0.clone())
        self.B = nn.Parameter(B0.clone())

    def delta(self, x: Tensor) -> Tensor:
        dtype = compute_dtype(x)
        with torch.no_grad():
            left, right = self.pair()
        factors = self.A, self.B, left.to(dtype), right.to(dtype)
        return Difference.apply(self.drop(x).to(dtype), *factors, self.scale)

    def pair(self) -> LowRank:
        """`[s B0 | s (B−B0)] [A−A0 ; A]`, k = 2r, differences of the fp32 masters."""
        B = torch.cat([self.B0, self.B - self.B0], dim=1) * self.scale
        return LowRank(B, torch.cat([self.A - self.A0, self.A]))


class Difference(torch.autograd.Function):
    """`L (R x)` with `L = [s B0 | s (B−B0)]` (out×2r) and `R = [A−A0 ; A]` (2r×in).

    Autograd would form the gradients of L and R, 2r wide, and add up their halves. Those of A and B are r
    wide, `dA = (s Bᵀ g) xᵀ` and `dB = s g (A x)ᵀ`: that saves 3 to 12 % of a layer's time on CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, A: Tensor, B: Tensor, L: Tensor, R: Tensor, scale: float) -> Tensor:
        h = F.linear(x, R)
        ctx.save_for_backward(x, h, L, R)
        ctx.scale = scale
        ctx.dtypes = A.dtype, B.dtype
        return F.linear(h, L)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, L, R = ctx.saved_tensors
        r = R.shape[0] // 2
        gh = g @ L
        dx = gh @ R if ctx.needs_input_grad[0] else None
        g_of_Ax = gh[..., :r] + gh[..., r:]
        dA = g_of_Ax.flatten(0, -2).T @ x.flatten(0, -2)
        dB = g.flatten(0, -2).T @ h[..., r:].flatten(0, -2)
        return dx, dA.to(ctx.dtypes[0]), dB.to(ctx.dtypes[1]) * ctx.scale, None, None, None


class OLoRA(Method[OLoRASpec]):
    """Plain: no hook beside `adapter`."""

    def __init__(self, spec: OLoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        if self.weight_decay:
            self.notes.append(
                f"weight_decay = {self.weight_decay:g} pulls OLoRA's factors to 0, which takes away "
                "pretrained weight; 0 is the better choice."
            )

    def adapter(self, weight: Tensor, site: Site) -> OLoRAAdapter:
        self.check_rank(site)
        B0, A0 = qr_factors(weight, self.spec.rank)
        if not A0.sum().isfinite():  # every number of W went into A0
            raise ModelError(f"The weight of '{site.name}' is not finite; the base model is damaged.")
        return OLoRAAdapter(A0, B0, scale=self.spec.scale, dropout=self.spec.dropout)


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
