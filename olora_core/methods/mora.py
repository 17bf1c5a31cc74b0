"""MoRA (arXiv 2405.12130): `delta(x) = D M C drop(x)`, with a trained square matrix M (r̂×r̂).

C (r̂×in) and D (out×r̂) are fixed matrices of zeros and ones: C folds the inputs into r̂ sums, D unfolds r̂
numbers over the outputs. r̂² is about r (in + out): as many parameters as LoRA's make an update of rank r̂.

Type 6: `delta(x) = [M R_0 x_0 ; M R_1 x_1 ; …]`, x cut into blocks x_j of r̂, and R_j the rotation of rotary
position embeddings, at position j. Such an update has any rank, and no pair.

ReMoRA: `delta(x) = Σ_t D_t M_t C_t x + D M C drop(x)`. Every F steps M joins what is kept of its type t, and
one of the next type begins at 0. All kept matrices of one type add up to one.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import SpecError, shortened
from ..layers.adapter import Adapter, LowRank, Site
from ..specs import MAX_EXPORT_RANK, WHERE_TOO_WIDE
from ..specs.methods.mora import MoRASpec
from ..specs.serving import server_rank
from .base import Method
from .rounds import forget, ramp, set_lr_factor

UNREMARKABLE_RANK = 16
"""The highest LoRA rank that vLLM loads by default."""


# --- C and D -----------------------------------------------------------------------------------------------


def summed_by_turns(x: Tensor, side: int) -> Tensor:
    """(…, in) → (…, side): x_i counts into i mod side; up to a multiple, x goes on with its own beginning."""
    turns = -(-x.shape[-1] // side)
    return tiled(x, turns * side).unflatten(-1, (turns, side)).sum(-2)


def summed_neighbours(x: Tensor, side: int) -> Tensor:
    """(…, in) → (…, side): sums of neighbours; the first in mod side groups have one more than the others."""
    size, larger = divmod(x.shape[-1], side)
    first, rest = x.split([larger * (size + 1), (side - larger) * size], dim=-1)
    sums = [
        first.unflatten(-1, (larger, size + 1)).sum(-1),
        rest.unflatten(-1, (side - larger, size)).sum(-1),
    ]
    return torch.cat(sums, dim=-1)


def tiled(h: Tensor, size: int) -> Tensor:
    """(…, side) → (…, size): h repeated, and cut at `size`."""
    times, rest = divmod(size, h.shape[-1])
    pieces = [h] * times + ([h[..., :rest]] if rest else [])
    return torch.cat(pieces, dim=-1) if len(pieces) > 1 else pieces[0]


def repeated(h: Tensor, size: int) -> Tensor:
    """(…, side) → (…, size): each number repeated in place, the first size mod side of them once more."""
    side = h.shape[-1]
    times, longer = divmod(size, side)
    first, rest = h.split([longer, side - longer], dim=-1)
    return torch.cat([first.repeat_interleave(times + 1, -1), rest.repeat_interleave(times, -1)], dim=-1)


Fold = Callable[[Tensor, int], Tensor]
FOLDS: dict[int, tuple[Fold, Fold]] = {
    1: (summed_by_turns, tiled),
    2: (summed_neighbours, repeated),
    3: (summed_neighbours, tiled),
    4: (summed_by_turns, repeated),
}
"""C and D of each type, applied to the last axis."""


# --- the adapter -------------------------------------------------------------------------------------------


class MoRAAdapter(Adapter):
    """M (r̂×r̂) is trained. `kept` (types×r̂×r̂) holds the sums of earlier rounds' matrices by type."""

    kept: Tensor
    running: Tensor
    """M's type, scalar, as a tensor so that it is saved with M."""

    def __init__(
        self, side: int, site: Site, *, type: int, kept_types: Sequence[int], dropout: float
    ) -> None:
        super().__init__(site.in_features, site.out_features, dropout)
        self.running_type, self.kept_types = type, tuple(kept_types)
        self.M = nn.Parameter(torch.zeros(side, side))
        self.register_buffer("kept", torch.zeros(len(self.kept_types), side, side))
        self.register_buffer("running", torch.tensor(float(type)))

    def on_tensors_loaded(self) -> None:
        self.running_type = int(self.running)

    @property
    def side(self) -> int:
        """r̂"""
        return len(self.M)

    @property
    def pair_rank(self) -> int:
        """k of `pair()`: r̂ for each different C in use."""
        return self.side * len({FOLDS[type][0] for type in (self.running_type, *self.kept_types)})

    def delta(self, x: Tensor) -> Tensor:
        y = self._product(self.running_type, self.M, self.drop(x))
        for type, M in zip(self.kept_types, self.kept, strict=True):
            y = y + self._product(type, M, x)  # frozen like the weight, so without dropout
        return y

    def _product(self, type: int, M: Tensor, x: Tensor) -> Tensor:
        """`D M C x` without ever building C or D."""
        fold, unfold = FOLDS[type]
        return unfold(F.linear(fold(x, self.side), M.to(x.dtype)), self.out_features)

    def pair(self) -> LowRank:
        """`D M` and C; with more than one kind of C in use, `[Σ D_t M_t | …]` and `[C ; …]`."""
        by_fold: dict[Fold, Tensor] = {}
        for type, M in [(self.running_type, self.M), *zip(self.kept_types, self.kept, strict=True)]:
            fold, unfold = FOLDS[type]
            DM = unfold(M.T, self.out_features).T
            by_fold[fold] = by_fold[fold] + DM if fold in by_fold else DM
        B = torch.cat(list(by_fold.values()), dim=1)
        return LowRank(B, torch.cat([self._C(fold) for fold in by_fold]))

    def _C(self, fold: Fold) -> Tensor:
        """C, r̂×in, as the gradients of its r̂ sums: folding unit vectors would need an in×in matrix."""
        x = torch.zeros(self.side, self.in_features, dtype=self.M.dtype, device=self.M.device)
        sums = torch.eye(self.side, dtype=x.dtype, device=x.device)
        with torch.enable_grad():
            x.requires_grad_()
            return torch.autograd.grad(fold(x, self.side), x, sums)[0]

    @torch.no_grad()
    def restart(self, type: int) -> None:
        """Adds M to `kept`, and starts one of that type at 0 in the same tensor."""
        self.kept[self.kept_types.index(self.running_type)] += self.M
        self.M.zero_()
        self.running_type = type
        self.running.fill_(type)


class RotationAdapter(Adapter):
    """M (r̂×r̂, r̂ even) is trained. cos and sin (blocks×r̂) of each block's angles are not saved."""

    cos: Tensor
    sin: Tensor

    def __init__(self, side: int, site: Site, *, dropout: float) -> None:
        super().__init__(site.in_features, site.out_features, dropout)
        self.M = nn.Parameter(torch.zeros(side, side))
        blocks = torch.arange(-(-site.in_features // side), dtype=torch.float64)
        speeds = 10000 ** (-2 * torch.arange(side // 2, dtype=torch.float64) / side)
        angles = torch.outer(blocks, speeds).repeat(1, 2)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

    @property
    def side(self) -> int:
        """r̂"""
        return len(self.M)

    def delta(self, x: Tensor) -> Tensor:
        blocks, side = self.cos.shape
        u = tiled(self.drop(x), blocks * side).unflatten(-1, (blocks, side))
        first, second = u.chunk(2, dim=-1)
        turned = u * self.cos.to(x.dtype) + torch.cat([-second, first], dim=-1) * self.sin.to(x.dtype)
        return tiled(F.linear(turned, self.M.to(x.dtype)).flatten(-2), self.out_features)

    def pair(self) -> None:
        return None


# --- the method --------------------------------------------------------------------------------------------


class MoRA(Method[MoRASpec, MoRAAdapter | RotationAdapter]):
    """No hooks but `adapter`, and `after_step` for ReMoRA's restarts."""

    can_go_on = False

    def __init__(self, spec: MoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        self.restarts = self._restarts()
        """The steps after which a new matrix begins."""
        cycle = spec.restart_types
        first = cycle.index(spec.type) if self.restarts else 0
        self.types = [cycle[(first + i) % len(cycle)] for i in range(1, len(self.restarts) + 1)]
        """The type of the matrix that begins at each restart."""
        self.narrow: list[str] = []
        """Layers too small for the matrix that the rank asks for."""
        self.unturned: list[str] = []
        """Layers that use type 1 in a run of type 6."""
        self.adapters: Mapping[str, Any] = {}

    @classmethod
    def trainable_parameters(cls, spec: MoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """One square matrix for each layer, which ReMoRA's rounds train again."""
        return sum(shape_of(spec, site)[1] ** 2 for site in sites)

    @classmethod
    def widest_rank(cls, spec: MoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """The largest rank whose exported pair servers can load: r̂ wide for each different C in use."""
        types = (spec.type, *spec.restart_types) if spec.restart_every else (spec.type,)
        kinds = len({FOLDS[type][0] for type in types if type in FOLDS})

        def loads(rank: int) -> bool:
            wider = spec.model_copy(update={"rank": rank})
            return not any(spec.is_too_wide(kinds * shape_of(wider, site)[1]) for site in sites)

        ranks = range(1, super().widest_rank(spec, sites, total_steps) + 1)
        return max(filter(loads, ranks), default=0)

    def _restarts(self) -> range:
        every = self.spec.restart_every
        if not every:
            return range(0)
        # The first round lasts at least as long as the warm-up, which ends where the schedule stops rising.
        rates = (self.schedule(i, self.total_steps) for i in range(1, self.total_steps + 1))
        warm_up, highest = 0, next(rates)
        for rate in rates:
            if rate <= highest:
                break
            warm_up, highest = warm_up + 1, rate
        if warm_up > every:
            self.notes.append(
                f"adapter.restart_every = {every} is less than the warm-up's {warm_up} steps; the first "
                "round lasts as long as the warm-up."
            )
        return range(max(every, warm_up), self.total_steps, every)

    def adapter(self, weight: Tensor, site: Site) -> MoRAAdapter | RotationAdapter:
        self.check_rank(site)
        type, side = shape_of(self.spec, site)
        if square_side(self.spec.rank, site) > min(site.out_features, site.in_features):
            self.narrow.append(site.name)
        if type == 6:
            return RotationAdapter(side, site, dropout=self.spec.dropout)
        if self.spec.type == 6:
            self.unturned.append(site.name)
        kept = sorted({type, *self.types}) if self.restarts else ()
        return MoRAAdapter(side, site, type=type, kept_types=kept, dropout=self.spec.dropout)

    def on_attached(self, adapters: Mapping[str, MoRAAdapter | RotationAdapter]) -> None:
        self.adapters = adapters
        if self.narrow:
            self.notes.append(
                f"adapter.rank = {self.spec.rank} asks for a larger matrix than {len(self.narrow)} layers "
                f"({shortened(self.narrow)}) can hold; theirs is as large as the layer allows."
            )
        if self.unturned:
            self.notes.append(
                f"{len(self.unturned)} layers ({shortened(self.unturned)}) have fewer outputs than inputs, "
                "most of which type 6 would ignore; they use type 1."
            )
        if self.spec.export == "adapter":
            self._check_width(*max(self.adapters.items(), key=lambda item: item[1].pair_rank))

    def _check_width(self, name: str, widest: MoRAAdapter) -> None:
        """Raises SpecError for an exported pair that no server can load; notes one that needs an option."""
        width = widest.pair_rank
        if self.spec.is_too_wide(width):
            side = MAX_EXPORT_RANK * widest.side // width
            fits = (side**2 + side) // (widest.in_features + widest.out_features)
            smaller = f"use a rank up to {fits}" if fits else "leave it out of adapter.target_modules"
            raise SpecError(
                f"adapter.rank = {self.spec.rank} exports a LoRA of rank {width} for layer '{name}' "
                f"({widest.out_features}×{widest.in_features}), and servers load at most {MAX_EXPORT_RANK}; "
                f"{smaller}, {WHERE_TOO_WIDE}.",
                param="adapter.rank",
            )
        if self.spec.export_rank is None and width > UNREMARKABLE_RANK:
            self.notes.append(
                f"The adapter is exported as a LoRA of rank {width}; start vLLM with "
                f"--max-lora-rank {server_rank(width)}."
            )

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        if not self.restarts or step < self.restarts.start:
            return
        if step in self.restarts:
            for adapter in self.adapters.values():
                adapter.restart(self.types[self.restarts.index(step)])
                forget(optimizer, adapter.parameters())
        since = (step - self.restarts.start) % self.restarts.step
        set_lr_factor(optimizer, ramp(since + 1, min(self.spec.ramp_steps, self.restarts.step)))


def shape_of(spec: MoRASpec, site: Site) -> tuple[int, int]:
    """(type, r̂) of a layer: r̂ at most the layer's own rank, and type 1 where type 6 would ignore inputs."""
    side = min(square_side(spec.rank, site), site.out_features, site.in_features)
    if spec.type != 6:
        return spec.type, side
    return (6, side // 2 * 2) if site.out_features >= site.in_features > 1 else (1, side)


def square_side(rank: int, site: Site) -> int:
    """r̂: √(r (in + out)), rounded."""
    return int((rank * (site.in_features + site.out_features)) ** 0.5 + 0.5)
