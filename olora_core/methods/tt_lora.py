"""TT-LoRA (arXiv 2408.01008): `ΔW[o,i] = α Σ G_1[i_1] … G_p[i_p] H_1[o_1] … H_q[o_q]`, a tensor train.

in = Π m_k and out = Π n_k; i_1 is the fastest digit of i, o_q of o. The cores are r×m×r (1×m×r and r×n×1
at the ends). All input digits come before all output digits, so one bond of width r joins the two halves, and
ΔW = α H G is exactly a LoRA of rank r, whose factors G (r×in) and H (out×r) are contracted before each use.

The start is our own: the last core is 0, and the others give G the variance of LoRA's A. (The authors' start
is not 0.)
"""

from collections.abc import Mapping, Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..errors import SpecError
from ..layers.adapter import Adapter, LowRank, Site
from ..specs.methods.tt_lora import TTLoRASpec
from .base import Method, generator

LARGEST_MODE = 16


class TTLoRAAdapter(Adapter):
    """The cores G of the inputs and H of the outputs are trained, each (bond, mode, bond)."""

    def __init__(self, G: Sequence[Tensor], H: Sequence[Tensor], *, scale: float, dropout: float) -> None:
        super().__init__(prod(core.shape[1] for core in G), prod(core.shape[1] for core in H), dropout)
        self.scale = scale
        self.G = nn.ParameterList(G)
        self.H = nn.ParameterList(H)

    def pair(self) -> LowRank:
        """`(α H, G)`, contracted in fp32 also under autocast: long products of small numbers."""
        with torch.autocast(self.G[0].device.type, enabled=False):
            return LowRank(self.scale * contracted_outputs([*self.H]), contracted_inputs([*self.G]))


def contracted_inputs(cores: Sequence[Tensor]) -> Tensor:
    """G, r×in, from cores (bond, m, bond); each further core holds a slower digit of the input."""
    known = cores[0][0]  # (m_1, r)
    for core in cores[1:]:
        _, mode, next_bond = core.shape
        grown = (known @ core.flatten(1)).view(-1, mode, next_bond)
        known = grown.transpose(0, 1).reshape(-1, next_bond)
    return known.T


def contracted_outputs(cores: Sequence[Tensor]) -> Tensor:
    """H, out×r, from cores (bond, n, bond), contracted from the last, which holds the fastest digit."""
    known = cores[-1][..., 0]  # (r, n_q)
    for core in reversed(cores[:-1]):
        known = (core.flatten(0, 1) @ known).view(len(core), -1)
    return known.T


class TTLoRA(Method[TTLoRASpec, TTLoRAAdapter]):
    """No hooks but `adapter`, and a check of the sizes once all layers are known."""

    @classmethod
    def trainable_parameters(cls, spec: TTLoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """r·m for the core at the outer end of each train, r·m·r for the others."""
        r, total = spec.rank, 0
        for site in sites:
            for size in (site.in_features, site.out_features):
                end, *inner = modes_of(spec, size)
                total += r * end + r * r * sum(inner)
        return total

    def adapter(self, weight: Tensor, site: Site) -> TTLoRAAdapter:
        self.check_rank(site)
        r, ins = self.spec.rank, modes_of(self.spec, site.in_features)
        outs = modes_of(self.spec, site.out_features)[::-1]
        draw = generator(self.seed, self.finished_steps, site.name)
        # An entry of G has the variance of its p factors, summed over r paths at each of p - 1 bonds.
        spread = (1 / (3 * site.in_features * r ** (len(ins) - 1))) ** (1 / (2 * len(ins)))
        bonds = [1, *[r] * (len(ins) - 1)]
        G = [
            spread * torch.randn(bond, mode, r, generator=draw) for bond, mode in zip(bonds, ins, strict=True)
        ]
        H = [r**-0.5 * torch.randn(r, mode, r, generator=draw) for mode in outs[:-1]]
        return TTLoRAAdapter(
            G, [*H, torch.zeros(r, outs[-1], 1)], scale=self.spec.scale, dropout=self.spec.dropout
        )

    def on_attached(self, adapters: Mapping[str, TTLoRAAdapter]) -> None:
        sizes = {size for a in adapters.values() for size in (a.in_features, a.out_features)}
        if unknown := sorted((self.spec.modes or {}).keys() - sizes):
            raise SpecError(
                f"adapter.modes names {unknown[0]}, and no adapted layer has that size; their sizes are "
                f"{', '.join(map(str, sorted(sizes)))}.",
                param="adapter.modes",
            )


def modes_of(spec: TTLoRASpec, size: int) -> tuple[int, ...]:
    """The modes of an input of this size; an output's are the same in reverse."""
    return (spec.modes or {}).get(size) or factored(size)


def factored(size: int) -> tuple[int, ...]:
    """The default modes of a size, the largest first: 768 is 16 · 12 · 4.

    Each prime factor, the largest first, goes into the first mode that it does not take above 16.
    """
    modes: list[int] = []
    for prime in prime_factors(size):
        room = next((i for i, mode in enumerate(modes) if mode * prime <= LARGEST_MODE), None)
        if room is None:
            modes.append(prime)
        else:
            modes[room] *= prime
    return tuple(sorted(modes, reverse=True)) or (1,)


def prime_factors(size: int) -> list[int]:
    """The prime factors, the largest first."""
    found, divisor = [], 2
    while divisor * divisor <= size:
        if size % divisor:
            divisor += 1
        else:
            found.append(divisor)
            size //= divisor
    return sorted([*found, size] if size > 1 else found, reverse=True)
