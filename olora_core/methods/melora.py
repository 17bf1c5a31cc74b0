"""MELoRA (arXiv 2402.17263): `delta(x) = [s B_1 A_1 x_1 ; … ; s B_n A_n x_n]`, x cut into n equal slices x_i.

Each slice of the inputs has a mini LoRA of rank r that leads to the slice of the outputs with its number. So
the update is block diagonal, of rank n·r, with the trainable parameters of one LoRA of rank r.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..layers.adapter import LowRank, Site
from ..specs import MELoRASpec
from .base import generator
from .lora import kaiming_uniform, lora_adapter
from .lora_plus import FactorsAdapter, FactorsMethod


class MELoRAAdapter(FactorsAdapter):
    """A (n×r×in/n) and B (n×out/n×r) are trained."""

    def __init__(self, A: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        n = len(A)
        super().__init__(in_features=n * A.shape[2], out_features=n * B.shape[1], dropout=dropout)
        self.scale = scale
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(B)

    def delta(self, x: Tensor) -> Tensor:
        n, _, width = self.A.shape
        slices = self.drop(x).reshape(-1, n, width).transpose(0, 1)  # n × tokens × in/n
        h = slices @ self.A.mT.to(x.dtype)
        y = h @ (self.scale * self.B).mT.to(x.dtype)  # n × tokens × out/n
        return y.transpose(0, 1).reshape(*x.shape[:-1], self.out_features)

    def pair(self) -> LowRank:
        """Both factors block diagonal, k = n·r."""
        return LowRank(torch.block_diag(*(self.scale * self.B)), torch.block_diag(*self.A))


class MELoRA(FactorsMethod[MELoRASpec, FactorsAdapter]):
    """Plain: beside `adapter`, only rates of their own for A and B, where asked for (LoRA+)."""

    @classmethod
    def widest_rank(cls, spec: MELoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """That of a slice."""
        return super().widest_rank(spec, sites, total_steps) // spec.mini_loras

    def adapter(self, weight: Tensor, site: Site) -> FactorsAdapter:
        n, rank = self.spec.mini_loras, self.spec.rank
        if n == 1:
            return lora_adapter(self, site)
        self._check_slices(site)
        out_width, in_width = site.out_features // n, site.in_features // n
        draw = generator(self.seed, self.finished_steps, site.name)
        A = kaiming_uniform(n, rank, in_width, draw=draw)
        B = torch.zeros(n, out_width, rank)
        return MELoRAAdapter(A, B, scale=self.spec.scale, dropout=self.spec.dropout)

    def _check_slices(self, site: Site) -> None:
        n, rank = self.spec.mini_loras, self.spec.rank
        common = math.gcd(site.out_features, site.in_features)
        if common % n:
            raise SpecError(
                f"adapter.mini_loras = {n} does not cut layer '{site.name}' "
                f"({site.out_features}×{site.in_features}) into equal slices; use a divisor of {common}, or "
                "leave that layer out of adapter.target_modules.",
                param="adapter.mini_loras",
            )
        out_width, in_width = site.out_features // n, site.in_features // n
        if rank > min(out_width, in_width):
            raise SpecError(
                f"adapter.rank = {rank} is more than a slice of layer '{site.name}' ({n} slices of "
                f"{out_width}×{in_width}) can hold; use at most {min(out_width, in_width)}, fewer "
                "adapter.mini_loras, or leave that layer out of adapter.target_modules.",
                param="adapter.rank",
            )
