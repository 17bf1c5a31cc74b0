"""RM-LoRA (arXiv 2407.12074): `delta(x) = s B A x`, factors held near orthonormal, moved p of r a step.

Added to the loss: `λ mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖)` over all layers. From the second step on all but p rows of
A's gradient and p columns of B's are 0, drawn anew for each layer and step.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..layers.adapter import Site
from ..specs import RMLoRASpec
from .base import Outputs, generator
from .lora import LoRAAdapter, lora_adapter
from .lora_plus import FactorsMethod
from .orthogonality import distances, squared_distances

GAUSSIAN_DEVIATION = 0.02


class RMLoRA(FactorsMethod[RMLoRASpec, LoRAAdapter]):
    """The gradient is masked, the weights are not: AdamW's momentum still moves what was masked."""

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        adapter = lora_adapter(self, site)
        if self.spec.init == "gaussian":
            draw = generator(self.seed, self.finished_steps, site.name)
            adapter.A.data = GAUSSIAN_DEVIATION * torch.randn(adapter.A.shape, generator=draw)
        return adapter

    def placed(self, adapters: Mapping[str, LoRAAdapter]) -> None:
        self.adapters = adapters

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        if not self.spec.orthogonality:
            return None
        measure = squared_distances if self.spec.orthogonality_norm == "squared" else distances
        return self.spec.orthogonality * measure((a.A, a.B) for a in self.adapters.values()).mean()

    @torch.no_grad()
    def after_backward(self, step: int) -> None:
        if step == 1 or self.spec.moved == self.spec.rank:
            return
        # (layers, 2, r) for A and B, made on the CPU and sent to the device in one piece
        drawn = torch.stack([self.mask(step, name) for name in self.adapters])
        adapters = list(self.adapters.values())
        for adapter, (of_A, of_B) in zip(adapters, drawn.to(adapters[0].A.device), strict=True):
            for gradient, mask in ((adapter.A.grad, of_A[:, None]), (adapter.B.grad, of_B)):
                if gradient is not None:  # a layer that no example of this step reached
                    gradient.mul_(mask)

    def mask(self, step: int, name: str) -> Tensor:
        """(2, r): 1 for the rows of A, and the columns of B, that move at this step; else 0."""
        draw = generator(self.seed, step, name)
        mask = torch.zeros(2, self.spec.rank)
        mask[0, torch.randperm(self.spec.rank, generator=draw)[: self.spec.moved]] = 1
        if self.spec.variant == "v1":
            mask[1] = mask[0]
        else:
            mask[1, torch.randperm(self.spec.rank, generator=draw)[: self.spec.moved]] = 1
        return mask
