"""PiSSA (arXiv 2404.02948): `delta(x) = s (B A x − B0 A0 x)`, `s B0 A0` the best rank-r part of W by its SVD.

With `W ≈ U_r S_r V_rᵀ`: `B0 = U_r S_r^½ / √s` and `A0 = S_r^½ V_rᵀ / √s`. The paper subtracts that part from
W; as in OLoRA, it is subtracted inside delta, so that W stays as it is and the start is exact, however
inexact the SVD is.
"""

from typing import Any

import torch
from torch import Tensor

from ..layers.adapter import Site, full_precision
from ..specs import PiSSASpec, SVDSpec
from .base import Method, generator
from .lora_plus import FactorsMethod
from .olora import OLoRAAdapter, damaged, warn_of_decay

OVERSAMPLING = 8
"""Columns that the randomised SVD takes beyond the rank, so that close singular values come apart."""


class PiSSA(FactorsMethod[PiSSASpec, OLoRAAdapter]):
    """Plain: beside `adapter`, only rates of their own for A and B, where asked for (LoRA+)."""

    def __init__(self, spec: PiSSASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        warn_of_decay(self, "PiSSA")

    def adapter(self, weight: Tensor, site: Site) -> OLoRAAdapter:
        return svd_adapter(self, weight, site)


def svd_adapter(method: Method[Any, Any], weight: Tensor, site: Site) -> OLoRAAdapter:
    """The difference form from the SVD's factors. Raises SpecError or ModelError, naming the layer."""
    method.check_rank(site)
    if not weight.sum(dtype=torch.float64).isfinite():
        raise damaged(site)
    spec: SVDSpec = method.spec
    draw = generator(method.seed, method.finished_steps, site.name)
    B0, A0 = svd_factors(weight, spec.rank, spec.scale, iterations=spec.svd_iterations, draw=draw)
    return OLoRAAdapter(A0, B0, scale=spec.scale, dropout=spec.dropout)


def svd_factors(
    weight: Tensor, rank: int, scale: float, *, iterations: int | None, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """B0 (out×r) and A0 (r×in), fp32, of `weight` (out×in); an exact SVD where `iterations` is None."""
    wide = weight.detach().to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
    with full_precision():
        if iterations is None:
            U, S, Vt = torch.linalg.svd(wide, full_matrices=False)
        else:
            U, S, Vt = _randomised_svd(wide, rank + OVERSAMPLING, iterations, draw)
    root = (S[:rank] / scale).sqrt()
    return (U[:, :rank] * root).float().contiguous(), (root[:, None] * Vt[:rank]).float().contiguous()


def _randomised_svd(
    W: Tensor, columns: int, iterations: int, draw: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """The SVD of W on the range of `(W Wᵀ)^iterations W G`, G random (Halko et al., arXiv 0909.4061, 4.4)."""
    G = torch.randn(W.shape[1], min(columns, *W.shape), generator=draw, dtype=W.dtype).to(W.device)
    Q, _ = torch.linalg.qr(W @ G)
    for _ in range(iterations):
        # An orthonormal basis at every turn: else the first singular vector drowns the others.
        Q, _ = torch.linalg.qr(W.T @ Q)
        Q, _ = torch.linalg.qr(W @ Q)
    U, S, Vt = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return Q @ U, S, Vt
