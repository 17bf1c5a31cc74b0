"""COLA, Chain of LoRA (arXiv 2401.04151): `delta(x) = Σ_j s_j B_j A_j x + s_i B A drop(x)`, j < i.

M links are trained one after another. At a knot, link i joins the finished ones, and the next starts as a
fresh LoRA with a fresh optimizer; so the sum reaches a rank that none of its links has.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..layers.adapter import Site
from ..specs.methods.cola import COLASpec
from .base import Method, generator
from .rounds import RoundsAdapter, forget, set_lr_factor


class COLA(Method[COLASpec, RoundsAdapter]):
    """Starts a new link at each knot, and restarts the job's schedule for it."""

    can_go_on = False

    def __init__(self, spec: COLASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        self.ranks = links_ranks(spec, self.total_steps)
        links = len(self.ranks)
        self.knots = knots(spec.shares[:links], self.total_steps)
        """The last step of each link."""
        self.adapters: Mapping[str, RoundsAdapter] = {}
        if links < spec.links:
            self.notes.append(
                f"adapter.links = {spec.links} is more than the job's {self.total_steps} step(s); it trains "
                f"{links} link(s) of one step each."
            )

    @classmethod
    def trainable_parameters(cls, spec: COLASpec, sites: Sequence[Site], total_steps: int) -> int:
        ranks = links_ranks(spec, total_steps)
        return sum(sum(ranks) * (site.in_features + site.out_features) for site in sites)

    def adapter(self, weight: Tensor, site: Site) -> RoundsAdapter:
        self.check_rank(site)
        adapter = RoundsAdapter(
            self.spec.rank, site, dropout=self.spec.dropout, finished=sum(self.ranks[:-1])
        )
        self.begin(site.name, adapter, link=0)
        return adapter

    def begin(self, name: str, adapter: RoundsAdapter, link: int) -> None:
        rank = self.ranks[link]
        draw = generator(self.seed, self.finished_steps, name)
        adapter.begin(rank, draw, init=self.spec.init, scale=self.spec.scale_of(rank))

    def on_attached(self, adapters: Mapping[str, RoundsAdapter]) -> None:
        self.adapters = adapters

    def param_groups(self, adapters: Mapping[str, RoundsAdapter]) -> list[dict[str, Any]]:
        (group,) = super().param_groups(adapters)
        if self.spec.lr_restart == "link":
            group |= {"lr_by": "method", "lr_factor": self.schedule(1, self.knots[0])}
        return [group]

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        if step >= self.total_steps:
            return
        link = sum(knot <= step for knot in self.knots)
        begun = self.knots[link - 1] if link else 0
        if step == begun:
            self.tie(link, optimizer)
        if self.spec.lr_restart == "link":
            set_lr_factor(optimizer, self.schedule(step + 1 - begun, self.knots[link] - begun))

    def tie(self, link: int, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the finished link and begins link number `link`, from 0."""
        for name, adapter in self.adapters.items():
            adapter.keep()
            self.begin(name, adapter, link)
            forget(optimizer, adapter.parameters())


def links_ranks(spec: COLASpec, total_steps: int) -> tuple[int, ...]:
    """Ranks of the links that a run trains; each link has at least one step."""
    return spec.ranks[: min(spec.links, total_steps)]


def knots(shares: tuple[float, ...], steps: int) -> list[int]:
    """The last step of each link: in proportion to the shares, with at least one step for each."""
    ends = [round(steps * part / sum(shares)) for part in accumulate(shares)]
    for i, end in enumerate(ends):
        before, behind = (ends[i - 1] if i else 0), len(ends) - 1 - i
        ends[i] = min(max(end, before + 1), steps - behind)
    return ends
