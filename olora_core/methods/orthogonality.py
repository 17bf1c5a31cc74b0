"""The distance of factors from orthonormal, which AdaLoRA and RM-LoRA add to the loss."""

from collections.abc import Iterable

import torch
from torch import Tensor

TINY = 1e-12
"""Added under the root, which has no gradient at 0."""


def squared_distances(factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """‖A Aᵀ − I‖² and ‖Bᵀ B − I‖² (Frobenius) of every pair A (r×in), B (out×r): (2 × pairs,)."""
    products = torch.stack([P for A, B in factors for P in (A @ A.T, B.T @ B)])
    identity = torch.eye(products.shape[1], device=products.device)
    return (products - identity).square().sum(dim=(1, 2))


def distances(factors: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """‖A Aᵀ − I‖ and ‖Bᵀ B − I‖ of every pair: (2 × pairs,)."""
    return (squared_distances(factors) + TINY).sqrt()
