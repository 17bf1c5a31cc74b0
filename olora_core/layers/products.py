"""The product of a frozen layer and a low-rank update, in as few passes over memory as possible."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def fused_product(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    L: Tensor,
    R: Tensor,
    scale: float | Tensor,
    W: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`LowRankProduct` of x with any number of axes: (…, in) → (…, out). It may be modified in place.

    A view made inside a Function may not be modified in place, as models that clip or add in place do
    (`clip_qkv`, Llama 4's experts). So the Function has matrices only, and the axes are restored outside.
    """
    flat = x.reshape(-1, x.shape[-1])  # (tokens, in)
    return LowRankProduct.apply(flat, A, B, L, R, scale, W, bias).view(*x.shape[:-1], L.shape[0])


class LowRankProduct(torch.autograd.Function):
    """`W x + bias + L (R x)`, or `L (R x)` alone where W is None: x (tokens, in) → (tokens, out), W out×in.

    A (r×in) and B (out×r) are trained. L (out×k) and R (k×in), in x's dtype, are made of them without
    autograd: `s B` and `A` with k = r, or for an update that starts elsewhere `[s B0 | s (B−B0)]` and
    `[A−A0 ; A]` with k = 2r. Either way the gradients are `dA = (s Bᵀ g) xᵀ` and `dB = s g (A x)ᵀ`.

    Why by hand: autograd would treat the parts of L and R separately, keep x a second time for W, and pass
    over the output once for each sum.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        A: Tensor,
        B: Tensor,
        L: Tensor,
        R: Tensor,
        scale: float | Tensor,
        W: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        h = x @ R.T  # (tokens, k)
        # The update is added into the frozen product's own output: no second buffer of (tokens, out).
        y = h @ L.T if W is None else F.linear(x, W, bias).addmm_(h, L.T)
        ctx.save_for_backward(x, h, L, R, W)
        ctx.r, ctx.scale = A.shape[0], scale
        ctx.dtypes = A.dtype, B.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, h, L, R, W = ctx.saved_tensors
        gh = g @ L  # (tokens, k), the gradient of h, for both dx and dA
        dx = None
        if ctx.needs_input_grad[0]:  # not in the first layer that is adapted, when the embeddings are frozen
            dx = gh @ R if W is None else (g @ W).addmm_(gh, R)
        # L's k columns are blocks of r that add up to s B: `s B0 + s (B − B0)`, or s B alone. So the blocks
        # of gh add up to `g s B`, which is what dA needs, whatever the start was.
        blocks = gh.unflatten(-1, (gh.shape[1] // ctx.r, ctx.r))
        dA = blocks.sum(dim=1).T @ x
        # The last r rows of R are A in either form, so the last r columns of h are `A x`.
        dB = g.T @ h[:, -ctx.r :]
        # The scale is applied after the cast to B's fp32: s dB in bf16 would be rounded twice.
        return dx, dA.to(ctx.dtypes[0]), dB.to(ctx.dtypes[1]) * ctx.scale, *(None,) * 5


def is_plain(layer: nn.Module, x: Tensor) -> bool:
    """Whether the layer can be fused for x (…, in): `W x + bias` with plain tensors of x's dtype."""
    return (
        type(layer) is nn.Linear
        and type(layer.weight.data) is Tensor
        and layer.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )
