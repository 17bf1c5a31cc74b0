"""Several adapters of one layer, which add up: a model that was trained on by another method."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .adapter import Adapter, LowRank


class Stack(Adapter):
    """`delta(x)` is the sum over the links, in their order. Their numbers are part of the tensors' names."""

    def __init__(self, links: Mapping[int, Adapter]) -> None:
        first = next(iter(links.values()))
        super().__init__(first.in_features, first.out_features)
        self.links = nn.ModuleDict({str(number): links[number] for number in sorted(links)})

    def delta(self, x: Tensor) -> Tensor:
        first, *others = self._adapters()
        y = first.delta(x)
        for adapter in others:
            y = y + adapter.delta(x)
        return y

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        first, *others = self._adapters()
        y = first(layer, x)
        for adapter in others:
            y = y + adapter.delta(x)
        return y

    def pair(self) -> LowRank | None:
        """`[B1 | B2 | …] [A1 ; A2 ; …]`; None if one of the links has no pair."""
        pairs = [adapter.pair() for adapter in self._adapters()]
        if any(pair is None for pair in pairs):
            return None
        known = [pair for pair in pairs if pair is not None]
        return LowRank(torch.cat([pair.B for pair in known], dim=1), torch.cat([pair.A for pair in known]))

    def on_tensors_loaded(self) -> None:
        for adapter in self._adapters():
            adapter.on_tensors_loaded()

    def _adapters(self) -> list[Adapter]:
        return [adapter for adapter in self.links.values() if isinstance(adapter, Adapter)]
