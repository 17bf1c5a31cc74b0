"""XGBLoRA (arXiv 2410.19694): `delta(x) = Σ_t ρ s b_t a_tᵀ x + s b aᵀ drop(x)`, boosting with weak LoRAs.

In each round of κ steps a few randomly drawn blocks train a booster of rank r (1 in the paper) on top of all
finished ones. It is then kept, and the next round draws other blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..layers.adapter import Site
from ..specs import MAX_EXPORT_RANK, WHERE_TOO_WIDE
from ..specs.methods.xgblora import XGBLoRASpec
from .base import Method, generator
from .rounds import RoundsAdapter, forget, ramp, set_lr_factor

MAX_ROUNDS = 256
FEW_STEPS = 1000


class XGBLoRA(Method[XGBLoRASpec, RoundsAdapter]):
    """At the end of each round, keeps the boosters and draws the next round's blocks."""

    can_go_on = False

    def __init__(self, spec: XGBLoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        self.round_steps = steps_of_a_round(spec, self.total_steps)
        self.ramp_steps = spec.ramp_steps or max(1, min(10, self.round_steps // 10))
        if self.total_steps > MAX_ROUNDS * self.round_steps:
            raise SpecError(
                f"adapter.steps_per_round = {self.round_steps} gives more than {MAX_ROUNDS} rounds for the "
                f"job's {self.total_steps} steps; use at least {-(-self.total_steps // MAX_ROUNDS)}.",
                param="adapter.steps_per_round",
            )
        if self.total_steps < FEW_STEPS:
            self.notes.append(
                f"XGBLoRA trains one small adapter after another, in a few blocks each: with fewer than "
                f"{FEW_STEPS:,} steps (this job has {self.total_steps}) the other methods learn far more."
            )
        self.layer_of: dict[str, int | None] = {}
        self.adapters: Mapping[str, RoundsAdapter] = {}

    @classmethod
    def trainable_parameters(cls, spec: XGBLoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """Over all rounds, of the blocks that each draws; exact if all blocks are of one size."""
        layers = {site.layer_index for site in sites}
        drawn = min(len(layers), blocks_of_a_round(spec, len(layers)))
        rounds = -(-total_steps // steps_of_a_round(spec, total_steps))
        return super().trainable_parameters(spec, sites, total_steps) * rounds * drawn // len(layers)

    @classmethod
    def widest_rank(cls, spec: XGBLoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """The largest rank whose export servers can load for a layer that every round draws."""
        rounds = -(-total_steps // steps_of_a_round(spec, total_steps))
        return min(super().widest_rank(spec, sites, total_steps), MAX_EXPORT_RANK // rounds)

    def adapter(self, weight: Tensor, site: Site) -> RoundsAdapter:
        self.check_rank(site)
        self.layer_of[site.name] = site.layer_index
        adapter = RoundsAdapter(self.spec.rank, site, dropout=self.spec.dropout)
        self.begin(site.name, adapter)
        return adapter

    def begin(self, name: str, adapter: RoundsAdapter) -> None:
        draw = generator(self.seed, self.finished_steps, name)
        adapter.begin(self.spec.rank, draw, init=self.spec.init, scale=self.spec.scale)

    def on_attached(self, adapters: Mapping[str, RoundsAdapter]) -> None:
        self.adapters = adapters
        for name in adapters:
            if self.layer_of[name] is None:
                raise SpecError(
                    f"XGBLoRA draws blocks, and layer '{name}' is in none; leave it out of "
                    "adapter.target_modules.",
                    param="adapter.target_modules",
                )
        draws = [self.drawn(step) for step in range(0, self.total_steps, self.round_steps)]
        for name, adapter in self.adapters.items():
            width = self.spec.rank * sum(self.layer_of[name] in draw for draw in draws)
            if self.spec.is_too_wide(width):
                raise SpecError(
                    f"{len(draws)} rounds of adapter.rank = {self.spec.rank} export a LoRA of rank {width} "
                    f"for layer '{name}', and servers load at most {MAX_EXPORT_RANK}; use a lower rank, more "
                    f"adapter.steps_per_round, {WHERE_TOO_WIDE}.",
                    param="adapter.rank",
                )
            adapter.make_room(width)
        self.sit_out(draws[0])

    def drawn(self, step: int) -> set[int]:
        """The blocks that train in the round after this step."""
        layers = sorted({layer for layer in self.layer_of.values() if layer is not None})
        count = blocks_of_a_round(self.spec, len(layers))
        order = torch.randperm(len(layers), generator=generator(self.seed, step, ""))
        return {layers[i] for i in order[:count].tolist()}

    def sit_out(self, drawn: set[int]) -> None:
        """Excludes all other blocks from the round: with scale 0 their gradient is 0."""
        for name, adapter in self.adapters.items():
            if self.layer_of[name] not in drawn:
                adapter.scale.zero_()
                adapter.width.zero_()

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        is_last = step == self.total_steps
        if step % self.round_steps == 0 or is_last:
            for name, adapter in self.adapters.items():
                adapter.keep(self.spec.boosting_rate)
                self.begin(name, adapter)
                forget(optimizer, adapter.parameters())
            self.sit_out(set() if is_last else self.drawn(step))
        if step >= self.round_steps:
            set_lr_factor(optimizer, ramp(step % self.round_steps + 1, self.ramp_steps))


def steps_of_a_round(spec: XGBLoRASpec, total_steps: int) -> int:
    return spec.steps_per_round or max(16, -(-total_steps // 64))


def blocks_of_a_round(spec: XGBLoRASpec, blocks: int) -> int:
    """The number of blocks that a round draws from `blocks`; a larger one means all."""
    return spec.layers_per_round or -(-blocks // 3)
