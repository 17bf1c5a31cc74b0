"""LoRA (arXiv 2106.09685): `delta(x) = s B A x`, A random, B zero, s = α/r (rsLoRA, 2312.03732: α/√r)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapter import LowRank, Site, compute_dtype
from ..layers.products import LowRankProduct, is_plain
from ..specs import AdapterSpec, LoRASpec
from .base import Method, generator
from .lora_plus import FactorsAdapter, FactorsMethod


class LoRAAdapter(FactorsAdapter):
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


class LoRA(FactorsMethod[LoRASpec, LoRAAdapter]):
    """Plain: beside `adapter`, only rates of their own for A and B, where asked for (LoRA+)."""

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        return lora_adapter(self, site)


def lora_adapter(method: Method[Any, Any], site: Site) -> LoRAAdapter:
    """LoRA's start, for methods that can also begin there. Raises SpecError, naming the layer."""
    method.check_rank(site)
    spec: AdapterSpec = method.spec
    draw = generator(method.seed, method.finished_steps, site.name)
    A = kaiming_uniform(spec.rank, site.in_features, draw=draw)
    return LoRAAdapter(A, torch.zeros(site.out_features, spec.rank), scale=spec.scale, dropout=spec.dropout)


def kaiming_uniform(*shape: int, draw: torch.Generator) -> Tensor:
    """With a = √5, which comes down to ±1/√in for a matrix (…, in)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)
