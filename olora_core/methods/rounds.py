"""Methods that train one pair of factors after another and keep the finished ones.

`delta(x) = B_fin A_fin x + s B A drop(x)`. Finished pairs are frozen beside W, where the papers merge them
into it. A new pair is written into the same tensors, and the optimizer's state for them is dropped: old
moments would steer the new pair, and an old step counter would make its first step too large.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..layers.adapter import Adapter, LowRank, Site, autocast_dtype, low_rank_product
from ..layers.products import fused_product, is_plain
from ..specs.methods.base import Start
from .lora import kaiming_uniform


class RoundsAdapter(Adapter):
    """A (r×in) and B (out×r) are trained. B_fin (out×K) and A_fin (K×in) hold the finished pairs.

    They are 0 until filled, and K is fixed once the adapter is attached. Everything that changes with a round
    is a buffer, so that checkpoints hold it.
    """

    A_fin: Tensor
    B_fin: Tensor
    filled: Tensor
    """Number of columns of B_fin in use, scalar."""
    scale: Tensor
    """s of the running pair, scalar; 0 while the layer is not trained."""
    width: Tensor
    """Rank of the running pair, scalar. Further rows of A are 0 and stay so, since their gradients are 0."""

    def __init__(self, rank: int, site: Site, *, dropout: float, finished: int = 0) -> None:
        super().__init__(site.in_features, site.out_features, dropout)
        self.A = nn.Parameter(torch.zeros(rank, site.in_features))
        self.B = nn.Parameter(torch.zeros(site.out_features, rank))
        for name in ("scale", "width", "filled"):
            self.register_buffer(name, torch.tensor(0.0))
        self.make_room(finished)

    def make_room(self, width: int) -> None:
        """Allocates `width` columns for finished pairs."""
        self.register_buffer("A_fin", self.A.new_zeros(width, self.in_features))
        self.register_buffer("B_fin", self.B.new_zeros(self.out_features, width))

    def delta(self, x: Tensor) -> Tensor:
        return self._with_finished(self._running(self.drop(x)), x)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        if is_plain(layer, x) and not (self.dropout and self.training):
            return self._with_finished(self._running(x, layer.weight, layer.bias), x)
        return super().forward(layer, x)

    def _running(self, x: Tensor, *frozen: Tensor | None) -> Tensor:
        dtype = autocast_dtype(x)
        with torch.no_grad():
            L, R = (self.scale * self.B).to(dtype), self.A.to(dtype)
        return fused_product(x.to(dtype), self.A, self.B, L, R, self.scale, *frozen)

    def _with_finished(self, y: Tensor, x: Tensor) -> Tensor:
        """Adds the finished pairs' product, without dropout since they are frozen like the weight."""
        return y + low_rank_product(x, LowRank(self.B_fin, self.A_fin)) if len(self.A_fin) else y

    def pair(self) -> LowRank:
        """`[B_fin | s B] [A_fin ; A]`, without unused columns."""
        filled, width = int(self.filled), int(self.width)
        B = torch.cat([self.B_fin[:, :filled], self.scale * self.B[:, :width]], dim=1)
        return LowRank(B, torch.cat([self.A_fin[:filled], self.A[:width]]))

    @torch.no_grad()
    def keep(self, rate: float = 1.0) -> None:
        """Appends the running pair, times `rate`, to the finished ones."""
        filled, width = int(self.filled), int(self.width)
        self.B_fin[:, filled : filled + width] = rate * self.scale * self.B[:, :width]
        self.A_fin[filled : filled + width] = self.A[:width]
        self.filled += width

    @torch.no_grad()
    def begin(self, rank: int, draw: torch.Generator, *, init: Start, scale: float) -> None:
        """Starts a new pair of rank `rank`, at most r, in the same tensors: A drawn, B = 0."""
        shape = rank, self.in_features
        if init == "kaiming":
            A = kaiming_uniform(*shape, draw=draw)
        else:
            A = torch.randn(shape, generator=draw) / rank
        self.A.zero_()
        self.A[:rank] = A.to(self.A.device)
        self.B.zero_()
        self.scale.fill_(scale)
        self.width.fill_(rank)


def forget(optimizer: torch.optim.Optimizer, parameters: Iterable[nn.Parameter]) -> None:
    """Drops the optimizer's state for these parameters: moments and step counter."""
    for parameter in parameters:
        optimizer.state.pop(parameter, None)


def ramp(position: int, steps: int) -> float:
    """Factor of the rate at step 1, 2, … of a round: rises linearly to 1 at `steps`."""
    return min(1.0, position / max(1, steps))


def set_lr_factor(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Sets every group's `lr_factor` from the next step on."""
    for group in optimizer.param_groups:
        group["lr_factor"] = factor
