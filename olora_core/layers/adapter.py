"""The update of one frozen linear layer, and how it is attached to the layer without changing it.

`y = W x + bias + delta(x)`, where W is out×in and never written. GPT-2's Conv1D stores Wᵀ; adapters are built
for out×in either way, and do not depend on how W is stored or quantised.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from . import quantisation

Kind = Literal["linear", "conv1d"]


@dataclass(frozen=True)
class Site:
    """One linear layer that can be adapted: its place in the model and its shape."""

    name: str
    """Path in the model, such as `model.layers.0.self_attn.q_proj`."""
    layer_index: int | None
    """Index of its block in the stack, from 0; None outside the blocks."""
    layer_count: int
    """Number of blocks in that stack; 0 outside the blocks."""
    kind: Kind
    out_features: int
    in_features: int


class LowRank(NamedTuple):
    """`ΔW = B A`: B out×k, A k×in, fp32, all scale in B. k may be 0."""

    B: Tensor
    A: Tensor

    @property
    def rank(self) -> int:
        return self.A.shape[0]


class Adapter(nn.Module):
    """The update of one linear layer. Trained tensors and buffers are fp32, whatever the base's dtype."""

    def __init__(self, in_features: int, out_features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.dropout = dropout

    def delta(self, x: Tensor) -> Tensor:
        """`ΔW x`: (…, in) → (…, out), in x's dtype. Default: `pair()` applied to x, differentiably."""
        pair = self.pair()
        if pair is None:
            raise NotImplementedError(f"{type(self).__name__} has no pair and must define delta(x).")
        # Dropout is drawn once, before the product, so that every term of the update sees the same x.
        return low_rank_product(self.drop(x), pair)

    def forward(self, layer: nn.Module, x: Tensor) -> Tensor:
        """`layer(x) + delta(x)`, (…, in) → (…, out), with the frozen layer that this adapter updates."""
        return layer(x) + self.delta(x)

    def pair(self) -> LowRank | None:
        """The exact low-rank form of the update, (out×k, k×in) in fp32; None if the method has none."""
        raise NotImplementedError

    def delta_weight(self) -> Tensor:
        """ΔW, out×in, fp32."""
        pair = self.pair()
        if pair is not None:
            return pair.B @ pair.A
        # Row i of delta(I) is ΔW e_i, so that delta(I) is ΔWᵀ.
        eye = torch.eye(self.in_features, device=next(self.parameters()).device)
        return self.delta(eye).T

    def on_tensors_loaded(self) -> None:
        """Called after saved tensors were copied in; refresh Python state that is derived from them."""

    def drop(self, x: Tensor) -> Tensor:
        """x with dropout in training mode, same shape. Draws no random numbers if the rate is 0."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def autocast_dtype(x: Tensor) -> torch.dtype:
    """The dtype a linear layer computes in: autocast's if it is enabled, otherwise x's."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def low_rank_product(x: Tensor, pair: LowRank) -> Tensor:
    """`B (A x)`: (…, in) → (…, out), in x's dtype.

    In this order it costs r (in + out) products a token; `(B A) x` would cost in · out.
    """
    return F.linear(F.linear(x, pair.A.to(x.dtype)), pair.B.to(x.dtype))


class AdaptedLinear(nn.Module):
    """A frozen linear layer with its adapter: `base(x) + delta(x)`.

    A layer of a model that is trained on has frozen adapters too: `under`, to which the trained one is added,
    and `reference`, the whole update that it had before, which stays when the adapter is disabled.
    """

    def __init__(self, base: nn.Module, adapter: Adapter) -> None:
        super().__init__()
        self.base = base
        self.adapter = adapter
        self.under: Adapter | None = None
        self.reference: Adapter | None = None
        self.enabled = True

    @property
    def weight(self) -> Tensor:
        """The frozen weight, because some models read its dtype or device."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out); if the adapter is disabled, the output before training."""
        if not self.enabled:
            return self.base(x) if self.reference is None else self.reference(self.base, x)
        if self.under is not None:
            return self.under(self.base, x) + self.adapter.delta(x)
        return self.adapter(self.base, x)

    def train(self, mode: bool = True) -> "AdaptedLinear":
        """As for any module, but frozen adapters stay as they are when they are used."""
        super().train(mode)
        for frozen in (self.under, self.reference):
            if frozen is not None:
                frozen.eval()
        return self


def is_linear(module: nn.Module) -> bool:
    """Whether the module is of a kind that can be adapted, regardless of its weight."""
    return isinstance(module, nn.Linear | Conv1D)


def is_stored_transposed(layer: nn.Module) -> bool:
    """Whether the checkpoint stores this layer's weight as in×out; bitsandbytes transposes a Conv1D's."""
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def site_weight(module: nn.Module) -> Tensor:
    """The layer's weight, out×in: the tensor itself or, for a Conv1D, a transposed view. Not to be written.

    A quantised weight is dequantised to a new fp32 tensor.
    """
    if quantisation.kind_of(module) in quantisation.PACKAGES:
        return quantisation.dequantised(module)
    weight = module.weight.detach()
    return weight.T if isinstance(module, Conv1D) else weight


def site_shape(module: nn.Module) -> tuple[int, ...]:
    """(out, in), without dequantising anything."""
    if quantisation.kind_of(module) in quantisation.PACKAGES:
        return module.out_features, module.in_features
    return tuple(site_weight(module).shape)


def attach(model: nn.Module, adapters: Mapping[str, Adapter]) -> None:
    """Attaches each adapter to the layer of its name. A layer used in several places is replaced in all."""
    replaced = {}
    for name, adapter in adapters.items():
        layer = model.get_submodule(name)
        if not is_linear(layer):
            raise ValueError(f"{name} is a {type(layer).__name__}; only linear layers can be adapted.")
        replaced[id(layer)] = AdaptedLinear(layer, adapter)
        replaced[id(layer)].train(model.training)
    _replace(model, lambda child: replaced.get(id(child)))


def detach(model: nn.Module) -> None:
    """Removes all adapters: the model has the base's own modules again."""
    _replace(model, lambda child: child.base if isinstance(child, AdaptedLinear) else None)


def _replace(model: nn.Module, new_of: Callable[[nn.Module], nn.Module | None]) -> None:
    for parent in list(model.modules()):
        if isinstance(parent, AdaptedLinear):
            continue
        for name, child in list(parent._modules.items()):
            if child is not None and (new := new_of(child)) is not None:
                setattr(parent, name, new)


def bare_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """`named_modules` of the base: the same whether adapters are attached or not."""
    inside = None
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            inside = f"{name}."
            yield name, module.base
        elif inside is None or not name.startswith(inside):
            yield name, module


def attached(model: nn.Module) -> list[AdaptedLinear]:
    """The adapted layers, in model order."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]


@contextmanager
def full_precision() -> Iterator[None]:
    """Inside, fp32 matrix products are computed in fp32, without TF32 or bf16 passes."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes as the base, bit for bit."""
    layers = attached(model)
    before = [layer.enabled for layer in layers]
    for layer in layers:
        layer.enabled = False
    try:
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


def adapter_tensors(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """Trained tensors and buffers by `<site>.<tensor>`, detached, for checkpoints and `native/`."""
    return {
        f"{site}.{name}": tensor.detach()
        for site, adapter in adapters.items()
        for name, tensor in adapter.state_dict().items()
    }


def load_adapter_tensors(adapters: Mapping[str, Adapter], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `adapter_tensors`, in place. Raises KeyError or ValueError if any do not match."""
    mine = adapter_tensors(adapters)
    if missing := mine.keys() ^ tensors.keys():
        raise KeyError(f"tensors that only one side has: {', '.join(sorted(missing)[:5])}")
    for name, tensor in mine.items():
        if tensor.shape != tensors[name].shape or tensor.dtype != tensors[name].dtype:
            raise ValueError(f"{name} is {tuple(tensors[name].shape)} {tensors[name].dtype} in the file")
    with torch.no_grad():
        for name, tensor in mine.items():
            tensor.copy_(tensors[name])
    for adapter in adapters.values():
        adapter.on_tensors_loaded()
