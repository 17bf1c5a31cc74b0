"""BA-LoRA (arXiv 2408.04556, second version): PiSSA's `delta`, and three penalties on the output logits.

`L = L_task + λ1(u) L_C + λ2(u) L_D + λ3(u) L_S`, u the share of the run that is over. With Z the M×V logits
that predict a trained token, Z_P those of the base:

- consistency, `L_C = τ² mean KL(softmax(Z_P / τ) ‖ softmax(Z / τ))`: stay near what the base knows;
- diversity, `L_D = −mean H(softmax(the K largest of each row of Z))`: keep more than one answer likely;
- spectrum, `L_S = −(σ_1 + … + σ_k) / ‖Z‖`, σ the singular values of Z: let few directions carry the batch.

This is the form for language models; the paper has another one for classifiers.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..bases.passes import LOGITS_AT_ONCE
from ..data.batches import IGNORED
from ..layers.adapter import Site, full_precision
from ..specs import BALoRASpec
from .base import Outputs
from .lora import LoRAAdapter, lora_adapter
from .lora_plus import FactorsMethod
from .olora import warn_of_decay
from .pissa import svd_adapter

SPECTRUM_ROWS = 256
"""Of the M rows of Z, how many the spectrum is taken of at most, evenly spaced."""
SPECTRUM_FLOOR = 1e-6
"""Share of ‖Z‖² below which a squared singular value is rounding."""


class BALoRA(FactorsMethod[BALoRASpec, LoRAAdapter]):
    """Beside `adapter`, a penalty; it costs one pass of the base for each pass of the model."""

    def __init__(self, spec: BALoRASpec, **run: Any) -> None:
        super().__init__(spec, **run)
        # With every λ at 0 it is the method that it starts from, at that method's cost.
        self.needs_logits = bool(spec.lambda_consistency or spec.lambda_diversity or spec.lambda_spectrum)
        self.penalty_copies = 6 if self.needs_logits else 0
        if spec.init == "pissa":
            warn_of_decay(self, "BA-LoRA")

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        return lora_adapter(self, site) if self.spec.init == "lora" else svd_adapter(self, weight, site)

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        spec, over = self.spec, self.finished_steps / self.total_steps
        consistency = spec.lambda_consistency * consistency_factor(over)
        diversity = spec.lambda_diversity * late_factor(over)
        spectrum = spec.lambda_spectrum * late_factor(over)
        if not (consistency or diversity or spectrum):
            return None
        assert outputs.logits is not None
        Z = predicting(outputs.logits, outputs.labels)
        total = torch.zeros((), device=Z.device)
        if consistency:
            Z_P = predicting(reference(), outputs.labels)
            total = total + consistency * consistency_loss(Z_P, Z, spec.temperature)
        if diversity and len(Z) > 1:
            total = total + diversity * diversity_loss(Z, spec.top_tokens)
        if spectrum and len(Z) > 1:
            total = total + spectrum * spectrum_loss(
                Z, spec.top_singular_values, norm=spec.spectrum_norm, center=spec.center_logits
            )
        return total


def consistency_factor(over: float) -> float:
    """λ1's: from 1 down to 0.1 along a cosine."""
    return 0.1 + 0.9 * (1 + math.cos(math.pi * over)) / 2


def late_factor(over: float) -> float:
    """λ2's and λ3's: 0 for the first fifth of the run, 1 from its first quarter on, linear between."""
    return min(1.0, max(0.0, (over - 0.2) / 0.05))


def predicting(logits: Tensor, labels: Tensor) -> Tensor:
    """(rows, length, V) → (M, V): position t counts when the label at t + 1 is trained."""
    return logits[:, :-1][labels[:, 1:] != IGNORED]


def consistency_loss(Z_P: Tensor, Z: Tensor, temperature: float) -> Tensor:
    """L_C. fp32 probabilities of a few rows at a time, computed once more in the backward."""
    rows = max(1, LOGITS_AT_ONCE // Z.shape[1])
    total = torch.zeros((), device=Z.device)
    for p, f in zip(Z_P.split(rows), Z.split(rows), strict=True):
        total = total + checkpoint(
            _divergence, p, f, temperature, use_reentrant=False, preserve_rng_state=False
        )
    return temperature**2 * total / max(1, len(Z))


def _divergence(Z_P: Tensor, Z: Tensor, temperature: float) -> Tensor:
    log_p = (Z_P.float() / temperature).log_softmax(dim=-1)
    log_f = (Z.float() / temperature).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_f)).sum()


def diversity_loss(Z: Tensor, top_tokens: int) -> Tensor:
    """L_D, from −ln K to 0."""
    log_p = Z.topk(min(top_tokens, Z.shape[1]), dim=-1).values.float().log_softmax(dim=-1)
    return (log_p.exp() * log_p).sum(dim=-1).mean()


def spectrum_loss(Z: Tensor, top: int, *, norm: str = "frobenius", center: bool = False) -> Tensor:
    """L_S. The singular values are roots of the Gram matrix's eigenvalues, whose sums have calm gradients
    where values lie close together.
    """
    count = min(len(Z), SPECTRUM_ROWS)
    Z = Z[torch.arange(count, device=Z.device) * len(Z) // count].float()
    if center:
        Z = Z - Z.mean(dim=-1, keepdim=True)
    with full_precision():
        squares = torch.linalg.eigvalsh(Z @ Z.T)  # rising
    energy = Z.square().sum()
    there = squares > SPECTRUM_FLOOR * energy
    # A root of 0 would have an infinite gradient, also where it is not taken.
    values = torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0)
    whole = energy.clamp_min(torch.finfo(energy.dtype).tiny).sqrt()
    if norm == "nuclear":
        whole = values.sum().clamp_min(torch.finfo(energy.dtype).tiny)
    return -values[-min(top, *Z.shape) :].sum() / whole
