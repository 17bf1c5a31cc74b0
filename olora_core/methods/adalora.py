"""AdaLoRA (arXiv 2303.10512): `delta(x) = c P (λ ∘ Q x)`; a falling budget keeps the best components.

P, λ and Q are `B`, `g` and `A` here; c = α / (r + 1e-5), r the rank at the start. Each entry w of the three
has an importance I = |w ∂L/∂w|, w after the step and the gradient before it, with the running means

    Ī ← β1 Ī + (1 − β1) I        Ū ← β2 Ū + (1 − β2) |I − Ī|        s(w) = Ī Ū

and the score of component i is s(λ_i) + mean_j s(P_ji) + mean_j s(Q_ij). At a masking, the components with
the highest scores over all layers, as many as the budget allows, keep their λ. The others' is set to 0, from
where training may move it again until the next masking.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import SpecError
from ..layers.adapter import Site
from ..specs.methods.adalora import AdaLoRASpec
from .base import Method, Outputs, generator
from .gated import GatedAdapter
from .orthogonality import distances, squared_distances

DEVIATION = 0.02
TRAINED = ("A", "g", "B")


class AdaLoRAAdapter(GatedAdapter):
    """A, g and B are trained. Buffers hold Ī and Ū of their entries, and the final mask `pattern` (r,)."""

    pattern: Tensor

    def __init__(self, A: Tensor, g: Tensor, B: Tensor, *, scale: float, dropout: float = 0.0) -> None:
        super().__init__(A, g, B, scale=scale, dropout=dropout)
        for name in TRAINED:
            for kind in ("importance", "uncertainty"):
                self.register_buffer(f"{name}_{kind}", torch.zeros_like(getattr(self, name)))
        self.register_buffer("pattern", torch.ones_like(g))

    def smoothed(self, kind: str) -> list[Tensor]:
        """The `importance` (Ī) or `uncertainty` (Ū) of A, g and B."""
        return [getattr(self, f"{name}_{kind}") for name in TRAINED]

    def worth(self) -> Tensor:
        """(r,): the score of each component."""
        of_A, of_g, of_B = (
            importance * uncertainty
            for importance, uncertainty in zip(
                self.smoothed("importance"), self.smoothed("uncertainty"), strict=True
            )
        )
        return of_g + of_B.mean(dim=0) + of_A.mean(dim=1)


class AdaLoRA(Method[AdaLoRASpec, AdaLoRAAdapter]):
    """All components are trained up to `initial_steps`; then the budget falls, until step `frozen_at`."""

    can_go_on = False

    def __init__(self, spec: AdaLoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        steps, initial, final = self.total_steps, spec.initial_steps, spec.final_steps
        self.initial_steps = steps // 10 if initial == "auto" else initial
        self.frozen_at = steps - (max(1, 4 * steps // 10) if final == "auto" else final)
        """T − t_f, the step of the last masking."""
        if self.frozen_at <= max(1, self.initial_steps):
            raise SpecError(
                f"AdaLoRA has no step left to choose components in: of this run's {steps} steps the first "
                f"{self.initial_steps} keep all (adapter.initial_steps), the last {steps - self.frozen_at} "
                "keep those chosen (adapter.final_steps), and at least one must come before the choice. "
                "Lower these, or train for more steps.",
                param="adapter.final_steps",
            )
        window = self.frozen_at - self.initial_steps
        interval = spec.mask_interval
        self.mask_interval = max(1, min(10, steps // 100, window)) if interval == "auto" else interval
        if self.mask_interval > window:
            raise SpecError(
                f"adapter.mask_interval = {interval} is more than the {window} steps in which the budget "
                f"falls; use at most {window}.",
                param="adapter.mask_interval",
            )

    @classmethod
    def trainable_parameters(cls, spec: AdaLoRASpec, sites: Sequence[Site], total_steps: int) -> int:
        """A LoRA's, and one gate for each component."""
        return super().trainable_parameters(spec, sites, total_steps) + spec.rank * len(sites)

    def adapter(self, weight: Tensor, site: Site) -> AdaLoRAAdapter:
        self.check_rank(site)
        (out_features, in_features), rank = weight.shape, self.spec.rank
        draw = generator(self.seed, self.finished_steps, site.name)
        A = DEVIATION * torch.randn(rank, in_features, generator=draw)
        B = DEVIATION * torch.randn(out_features, rank, generator=draw)
        return AdaLoRAAdapter(A, torch.zeros(rank), B, scale=self.spec.scale, dropout=self.spec.dropout)

    def on_attached(self, adapters: Mapping[str, AdaLoRAAdapter]) -> None:
        self.adapters = list(adapters.values())

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        if not self.spec.orthogonality:
            return None
        factors = ((a.A, a.B) for a in self.adapters)
        if self.spec.orthogonality_norm == "squared_sum":
            return self.spec.orthogonality * squared_distances(factors).sum()
        return self.spec.orthogonality * distances(factors).mean()

    @torch.no_grad()
    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        if step < self.frozen_at:
            self._measure()
            if step > self.initial_steps and step % self.mask_interval == 0:
                self._mask(self._best(self.budget(step)))
        elif step == self.frozen_at:
            self._freeze(self._best(self.budget(step)))
        else:
            self._mask([a.pattern for a in self.adapters])

    def budget(self, step: int) -> int:
        """Number of components that all layers together keep at this step."""
        start, end = (rank * len(self.adapters) for rank in (self.spec.rank, self.spec.target))
        if step <= self.initial_steps:
            return start
        left = max(0.0, 1 - (step - self.initial_steps) / (self.frozen_at - self.initial_steps))
        return int(end + (start - end) * left**3)

    def _measure(self) -> None:
        """Updates Ī and Ū of every entry from this step's gradient."""
        trained = [getattr(a, name) for a in self.adapters for name in TRAINED]
        # A layer that no example of this step reached has no gradient.
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in trained]
        importance = [t for a in self.adapters for t in a.smoothed("importance")]
        uncertainty = [t for a in self.adapters for t in a.smoothed("uncertainty")]
        now = torch._foreach_mul(trained, gradients)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(importance, now, 1 - self.spec.beta1)
        torch._foreach_sub_(now, importance)
        torch._foreach_abs_(now)
        torch._foreach_lerp_(uncertainty, now, 1 - self.spec.beta2)

    def _best(self, budget: int) -> list[Tensor]:
        """(r,) for each layer: 1 for components among the `budget` best of all layers, else 0."""
        worth = torch.stack([a.worth() for a in self.adapters])
        # Sorted, with ties in the layers' order, since a threshold would keep all or none of equal scores.
        order = worth.flatten().argsort(descending=True, stable=True)
        kept = torch.zeros_like(worth)
        kept.view(-1)[order[:budget]] = 1
        return list(kept)

    def _mask(self, patterns: list[Tensor]) -> None:
        for adapter, pattern in zip(self.adapters, patterns, strict=True):
            adapter.g.masked_fill_(pattern == 0, 0.0)

    def _freeze(self, patterns: list[Tensor]) -> None:
        """The last masking: its choice is final, and scores are no longer updated."""
        self._mask(patterns)
        for adapter, pattern in zip(self.adapters, patterns, strict=True):
            adapter.pattern.copy_(pattern)
            for tensor in (*adapter.smoothed("importance"), *adapter.smoothed("uncertainty")):
                tensor.zero_()
