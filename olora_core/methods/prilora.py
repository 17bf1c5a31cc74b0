"""PRILoRA (arXiv 2401.11316): `delta(x) = s_l B A x`, the rank rising with depth, A pruned while it trains.

Block l of L has rank `r_l`, on a straight line from r_s to r_f. Every K steps the share p of each row of A
with the smallest `S_ij = |A_ij| X̄_j` is set to 0, where `X̄ ← β X̄ + (1−β) n` is a running mean of the size
of input feature j: n_j is its root mean square over the tokens of a step. (The paper's L2 norm grows with the
number of tokens, but orders the entries of a row alike.) B is never pruned.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..data.batches import MicroBatch
from ..errors import SpecError
from ..layers.adapter import Site
from ..specs.methods.prilora import PRILoRASpec
from .base import Outputs, generator
from .lora import LoRAAdapter, kaiming_uniform
from .lora_plus import FactorsMethod

SQUARES_AT_ONCE = 2**22
"""Squared entries of an input that are held in fp32 at once."""


@dataclass
class Pass:
    """The current forward pass, shared by the adapters of a run."""

    counts: bool = False
    """Whether inputs are measured: not in the backward, where checkpointed blocks run forward again."""
    is_token: Tensor | None = None
    """(rows, length) bool; None where nothing is padded."""


class PRILoRAAdapter(LoRAAdapter):
    """A (r_l×in) and B (out×r_l) are trained; `norm` (in) is X̄."""

    norm: Tensor
    seen: Tensor
    """(in + 1,): each input feature's sum of squares over this step's tokens, and the number of tokens."""
    kept: Tensor | None
    """A's shape, 1 where A is not pruned; None when pruned entries may grow again."""

    def __init__(
        self, A: Tensor, B: Tensor, *, scale: float, dropout: float, regrow: bool, current: Pass
    ) -> None:
        super().__init__(A, B, scale=scale, dropout=dropout)
        self.current = current
        self.pending: Tensor | None = None
        self.register_buffer("norm", torch.zeros(self.in_features))
        self.register_buffer("seen", torch.zeros(self.in_features + 1), persistent=False)
        self.register_buffer("kept", None if regrow else torch.ones_like(A))

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        if self.training and self.current.counts:
            seen = squares(x.detach(), self.current.is_token)
            self.pending = seen if self.pending is None else self.pending + seen
        return super().forward(layer, x)

    @torch.no_grad()
    def prune(self, share: float, by_row: bool) -> None:
        """Sets the least important entries of A to 0, among equal ones the first."""
        importance = self.A.abs() * self.norm
        groups = importance if by_row else importance.view(1, -1)
        least = groups.argsort(dim=1, stable=True)[:, : int(share * groups.shape[1])]
        self.A.view_as(groups).scatter_(1, least, 0.0)
        if self.kept is not None:
            self.kept.view_as(groups).fill_(1.0).scatter_(1, least, 0.0)


def squares(x: Tensor, is_token: Tensor | None) -> Tensor:
    """x (…, in) → (in + 1,) fp32: each feature's sum of squares over the tokens, and the number of tokens.

    `is_token` (rows, length) marks what is not padding. It is ignored for a layer that sees the tokens in
    another arrangement, as an expert does.
    """
    flat = x.flatten(0, -2)
    if is_token is None or is_token.numel() != len(flat):
        weights = torch.ones(len(flat), device=x.device)
    else:
        weights = is_token.flatten().float()
    # In chunks, since fp32 squares of all tokens at once would need more memory than the layer itself.
    rows = max(1, SQUARES_AT_ONCE // flat.shape[1])
    sums = torch.zeros(flat.shape[1], device=x.device)
    for piece, counts in zip(flat.split(rows), weights.split(rows), strict=True):
        sums += counts @ piece.float().square()
    return torch.cat([sums, weights.sum()[None]])


def rank_of(spec: PRILoRASpec, site: Site) -> int:
    return spec.rank_at(site.layer_index, site.layer_count)


class PRILoRA(FactorsMethod[PRILoRASpec, PRILoRAAdapter]):
    """Measures every layer's inputs during the passes, and prunes after steps."""

    can_go_on = False

    def __init__(self, spec: PRILoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        self.current = Pass()
        self.adapters: list[PRILoRAAdapter] = []

    @classmethod
    def trainable_parameters(cls, spec: PRILoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        return sum(rank_of(spec, site) * (site.in_features + site.out_features) for site in sites)

    @classmethod
    def widest_rank(cls, spec: PRILoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """Found by trying, since the last block's rank can be up to twice the mean."""
        widest = super().widest_rank(spec, sites, total_steps)

        def fits(rank: int) -> bool:
            wider = spec.model_copy(update={"rank": rank})
            return all(rank_of(wider, s) <= min(s.in_features, s.out_features) for s in sites)

        return max(filter(fits, range(1, widest + 1)), default=0)

    def adapter(self, weight: Tensor, site: Site) -> PRILoRAAdapter:
        rank = rank_of(self.spec, site)
        limit = min(site.out_features, site.in_features)
        if rank > limit:
            raise SpecError(
                f"adapter.rank = {self.spec.rank} gives layer '{site.name}' ({site.out_features}×"
                f"{site.in_features}) rank {rank}, and it can hold at most {limit}; use a lower rank, or "
                "leave that layer out of adapter.target_modules.",
                param="adapter.rank",
            )
        draw = generator(self.seed, self.finished_steps, site.name)
        return PRILoRAAdapter(
            kaiming_uniform(rank, site.in_features, draw=draw),
            torch.zeros(site.out_features, rank),
            scale=self.spec.scale_at(rank),
            dropout=self.spec.dropout,
            regrow=self.spec.regrow,
            current=self.current,
        )

    def on_attached(self, adapters: Mapping[str, PRILoRAAdapter]) -> None:
        self.adapters = list(adapters.values())

    def before_pass(self, batch: MicroBatch) -> None:
        self.current.counts, self.current.is_token = True, batch.is_token
        for adapter in self.adapters:
            adapter.pending = None

    def after_pass(self, outputs: Outputs) -> None:
        self.current.counts, self.current.is_token = False, None
        for adapter in self.adapters:
            if adapter.pending is not None and not outputs.repeated:
                adapter.seen += adapter.pending
            adapter.pending = None

    def on_step_retry(self) -> None:
        for adapter in self.adapters:
            adapter.seen.zero_()

    def after_backward(self, step: int) -> None:
        """Updates X̄ from the inputs on all devices; a layer that saw no token keeps its X̄."""
        sizes = [len(adapter.seen) for adapter in self.adapters]
        seen = self.devices.sum(torch.cat([adapter.seen for adapter in self.adapters]))
        beta = self.spec.importance_decay if step > 1 else 0.0
        for adapter, of_layer in zip(self.adapters, seen.split(sizes), strict=True):
            tokens = of_layer[-1]
            now = (of_layer[:-1] / tokens.clamp(min=1)).sqrt()
            updated = beta * adapter.norm + (1 - beta) * now
            adapter.norm.copy_(torch.where(tokens > 0, updated, adapter.norm))
            adapter.seen.zero_()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        is_due = step % self.spec.prune_every == 0
        is_last = step == self.total_steps and self.spec.prune_at_end
        for adapter in self.adapters:
            if is_due or is_last:
                adapter.prune(self.spec.prune_share, self.spec.prune_group == "row")
            elif adapter.kept is not None:
                adapter.A.data.mul_(adapter.kept)
