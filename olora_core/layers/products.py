"""The product of a frozen layer and a low-rank change, in as few passes over memory as it takes."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LowRankProduct(torch.autograd.Function):
    """`W x + bias + L (R x)`, or `L (R x)` alone where W is None: x (…, in) → (…, out), W out×in.

    What is trained is A (r×in) and B (out×r). L and R, cast to x's dtype, are made of them: `s B` and `A`, or
    for a change that started elsewhere `[s B0 | s (B−B0)]` and `[A−A0 ; A]`. Either way the gradients are
    `dA = (s Bᵀ g) xᵀ` and `dB = s g (A x)ᵀ`, where `s Bᵀ g` is the sum of `Lᵀ g`'s parts of r rows each and
    `A x` the last part of `R x`. Autograd would form them part by part, keep x once more for W, and go over
    the output once for each sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        L: Tensor,
        R: Tensor,
        scale: float,
        W: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        flat = x.flatten(0, -2)
        h = flat @ R.T
        y = h @ L.T if W is None else F.linear(flat, W, bias).addmm_(h, L.T)
        ctx.save_for_backward(flat, h, L, R, W)
        ctx.r, ctx.scale, ctx.shape = A.shape[0], scale, x.shape
        ctx.dtypes = A.dtype, B.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, L, R, W = ctx.saved_tensors
        g = g.flatten(0, -2)
        gh = g @ L
        dx = None
        if ctx.needs_input_grad[0]:
            dx = (gh @ R if W is None else (g @ W).addmm_(gh, R)).view(ctx.shape)
        dA = gh.view(len(gh), -1, ctx.r).sum(dim=1).T @ x
        dB = g.T @ h[:, -ctx.r :]
        return dx, dA.to(ctx.dtypes[0]), dB.to(ctx.dtypes[1]) * ctx.scale, *(None,) * 5


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer's product is `W x + bias` with tensors of x's dtype, so that it can be fused."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and layer.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )
