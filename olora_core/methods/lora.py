"""LoRA (arXiv 2106.09685): `delta(x) = s B A x`, A random, B zero, s = α/r (rsLoRA, 2312.03732: α/√r)."""

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..adapter import Adapter, LowRank, Site, compute_dtype
from ..products import LowRankProduct, is_plain
from ..specs import LoRASpec
from .base import Method, generator
from .lora_plus import Factors, factor_groups


class LoRAAdapter(Adapter):
    """A (r×in) and B (out×r) are trained."""

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(in_features=A.shape[1], out_features=B.shape[0], dropout=dropout)
        self.scale = scale
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    def delta(self, x: Tensor) -> Tensor:
        return self._product(self.drop(x))

    def beside(self, layer: nn.Module, x: Tensor) -> Tensor:
        if is_plain(layer, x) and not (self.dropout and self.training):
            return self._product(x, layer.weight, layer.bias)
        return super().beside(layer, x)

    def _product(self, x: Tensor, *frozen: Tensor | None) -> Tensor:
        dtype = compute_dtype(x)
        with torch.no_grad():
            L, R = (factor.to(dtype) for factor in self.pair())
        return LowRankProduct.apply(x.to(dtype), self.A, self.B, L, R, self.scale, *frozen)

    def pair(self) -> LowRank:
        return LowRank(self.scale * self.B, self.A)


class LoRA(Method[LoRASpec]):
    """Plain: beside `adapter`, only rates of their own for A and B, where asked for (LoRA+)."""

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        self.check_rank(site)
        out_features, in_features = weight.shape
        # Kaiming-uniform with a = √5 comes down to ±1/√in.
        bound = 1 / math.sqrt(in_features)
        draw = generator(self.seed, self.finished_steps, site.name)
        A = torch.empty(self.spec.rank, in_features).uniform_(-bound, bound, generator=draw)
        B = torch.zeros(out_features, self.spec.rank)
        return LoRAAdapter(A, B, scale=self.spec.scale, dropout=self.spec.dropout)

    def param_groups(self, adapters: Mapping[str, Adapter]) -> list[dict[str, Any]]:
        return factor_groups(self, cast(Mapping[str, Factors], adapters).values(), self.spec.lora_plus_ratio)
