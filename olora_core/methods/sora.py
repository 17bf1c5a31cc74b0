"""SoRA (arXiv 2311.11696): `delta(x) = c B (g ∘ A x)`, c = α/r, whose gates g are pushed to exact zeros.

After each optimizer step comes the proximal step of λ‖g‖₁, `g ← sign(g) max(|g| − ξ, 0)`; there is no loss
term. The authors' code shrinks twice, so that all |g| < 2ξ vanish; this is the soft threshold itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..layers.adapter import Site
from ..specs import SoRASpec
from .base import Method, generator
from .gated import GatedAdapter
from .lora import kaiming_uniform

TRAVEL = 0.5
"""By how much a gate shrinks over a whole run that never pushes back; it starts at 0.67 in the median.

On the shipped base this leaves about the share of components that the paper reports, 70 %. The authors' run
on STS-B travels 4.3, 20 epochs long; in a job's few epochs B cannot make up for what such gates lose.
"""
RATE_OF_THRESHOLD = 2.5
"""Adam moves a gate by about its rate: one that does not exceed the threshold holds no gate at all."""
FACTOR_DECAY = 0.1
"""Without it A and B would grow as g shrinks."""


class SoRA(Method[SoRASpec, GatedAdapter]):
    """Gates have a rate of their own and no decay; A and B have decay."""

    def __init__(self, spec: SoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        self.threshold = TRAVEL / self.total_steps if spec.threshold == "auto" else spec.threshold
        own_rate = spec.gate_learning_rate
        if own_rate == "auto" and self.threshold and not spec.threshold_times_rate:
            own_rate = RATE_OF_THRESHOLD * self.threshold
        self.gate_rate = None if own_rate == "auto" else own_rate
        self.factor_decay = spec.factor_decay
        if self.factor_decay == "auto":
            self.factor_decay = self.weight_decay or FACTOR_DECAY
        elif self.weight_decay:
            raise SpecError(
                f"adapter.factor_decay = {spec.factor_decay:g} and hyperparameters.weight_decay = "
                f"{self.weight_decay:g} both say how SoRA's factors decay; leave one of them out.",
                param="adapter.factor_decay",
            )
        steps_of_a_gate = 1.0 if spec.threshold_times_rate else self.gate_rate
        if steps_of_a_gate is not None and self.threshold and self.threshold >= steps_of_a_gate:
            told = "1" if spec.threshold_times_rate else f"the gates' learning rate {steps_of_a_gate:g}"
            self.notes.append(
                f"adapter.threshold = {self.threshold:g} is not below {told}: every gate shrinks faster than "
                "training can move it, and all will be 0 in the end. Lower it."
            )

    @classmethod
    def trainable_parameters(cls, spec: SoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """And a number for each component."""
        return super().trainable_parameters(spec, sites, total_steps) + spec.rank * len(sites)

    def adapter(self, weight: Tensor, site: Site) -> GatedAdapter:
        self.check_rank(site)
        (out_features, in_features), rank = weight.shape, self.spec.rank
        draw = generator(self.seed, self.finished_steps, site.name)
        A = kaiming_uniform(rank, in_features, draw=draw)
        g = torch.ones(rank) if self.spec.gate_init == "ones" else torch.randn(rank, generator=draw)
        B = torch.zeros(out_features, rank)
        return GatedAdapter(A, g, B, scale=self.spec.scale, dropout=self.spec.dropout)

    def param_groups(self, adapters: Mapping[str, GatedAdapter]) -> list[dict[str, Any]]:
        gated = adapters.values()
        own_rate = {} if self.gate_rate is None else {"lr_peak": self.gate_rate}
        return [
            self.group((p for a in gated for p in (a.A, a.B)), weight_decay=self.factor_decay),
            self.group((a.g for a in gated), weight_decay=0.0, **own_rate),
        ]

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        _, gates = optimizer.param_groups
        threshold = self.threshold * gates["lr"] if self.spec.threshold_times_rate else self.threshold
        for g in gates["params"]:
            g.sub_(g.clamp(-threshold, threshold))
