"""LoRA (arXiv 2106.09685): `delta(x) = s B A x`, A random, B zero, s = α/r (rsLoRA, 2312.03732: α/√r)."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.adapter import LowRank, Site, autocast_dtype
from ..layers.products import fused_product, is_plain
from ..specs import AdapterSpec
from ..specs.methods.lora import LoRASpec
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

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        if is_plain(layer, x) and not (self.dropout and self.training):
            return self._product(x, layer.weight, layer.bias)
        return super().forward(layer, x)

    def _product(self, x: Tensor, *frozen: Tensor | None) -> Tensor:
        dtype = autocast_dtype(x)
        with torch.no_grad():
            L, R = (factor.to(dtype) for factor in self.pair())
        return fused_product(x.to(dtype), self.A, self.B, L, R, self.scale, *frozen)

    def pair(self) -> LowRank:
        return LowRank(self.scale * self.B, self.A)


class LoRA(FactorsMethod[LoRASpec, LoRAAdapter]):
    """No hooks but `adapter`."""

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        return lora_adapter(self, site)


def lora_adapter(method: Method[Any, Any], site: Site) -> LoRAAdapter:
    """A LoRA adapter at its start, also for other methods that start there.

    Raises SpecError, naming the layer.
    """
    method.check_rank(site)
    spec: AdapterSpec = method.spec
    draw = generator(method.seed, method.finished_steps, site.name)
    A = kaiming_uniform(spec.rank, site.in_features, draw=draw)
    return LoRAAdapter(A, torch.zeros(site.out_features, spec.rank), scale=spec.scale, dropout=spec.dropout)


def kaiming_uniform(*shape: int, draw: torch.Generator) -> Tensor:
    """(…, in) drawn uniformly from ±1/√in: Kaiming's bound with a = √5, as in nn.Linear."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=draw)
