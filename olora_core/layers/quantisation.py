"""Bases whose weights are held in 8 or 4 bits: how they are loaded, and what their layers hold.

Nothing writes a quantised weight, so that an adapter beside it starts at the quantised base, bit for bit. The
packages come with the extra `gpu`, and are imported only where a base needs them.
"""

import copy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BitsAndBytesConfig, PreTrainedConfig, TorchAoConfig

from ..devices import is_dtensor
from ..errors import ModelError, SpecError

PACKAGES = {
    "nf4": "bitsandbytes",
    "int8": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-fp8": "torchao",
}
"""Every kind of quantised base, and the package that holds its weights."""
DEVICES = ("cpu", "cuda")
TORCHAO_TENSORS = {"Int8Tensor": "torchao-int8", "Float8Tensor": "torchao-fp8"}
TORCHAO_CONFIGS = {"Int8WeightOnlyConfig": "torchao-int8", "Float8WeightOnlyConfig": "torchao-fp8"}
PARAM = "hyperparameters.quantization"


@dataclass(frozen=True)
class Quantised:
    """How a base in memory came to be quantised."""

    kind: str
    settings: dict[str, Any]
    """The `quantization_config` of transformers that loads the same base."""
    from_files: bool
    """Its checkpoint holds quantised weights; there is no other base to compare with."""

    @property
    def package(self) -> str:
        """Name and version of what quantises and computes."""
        return f"{PACKAGES[self.kind]} {version(PACKAGES[self.kind])}"


# --- loading -----------------------------------------------------------------------------------------------


def planned(asked: str, config: PreTrainedConfig, name: str, device: str) -> str | None:
    """The kind that a base will have, or None for one that is loaded as ever.

    Raises SpecError when its files are quantised otherwise than asked, and ModelError when this machine
    lacks the package or the device cannot compute it.
    """
    in_files, method = _of_files(config)
    if asked != "none" and method is not None and in_files != asked:
        raise SpecError(
            f"{PARAM} = '{asked}': base model '{name}' is quantised in its files already "
            f"({in_files or method}); leave the option out to train on it as it is.",
            param=PARAM,
        )
    kind = in_files or (None if asked == "none" else asked)
    if kind is None:
        return None
    if find_spec(PACKAGES[kind]) is None:
        raise ModelError(
            f"A base model quantised as '{kind}' needs the package {PACKAGES[kind]}, which is not installed "
            "where training runs; install the extra 'gpu' there: pip install -e '.[gpu]'.",
            param=PARAM,
        )
    if torch.device(device).type not in DEVICES:
        raise ModelError(
            f"A base model quantised as '{kind}' runs on {' or '.join(DEVICES)}, and not on {device}; "
            f"train there, or leave {PARAM} out.",
            param=PARAM,
        )
    return kind


def _of_files(config: PreTrainedConfig) -> tuple[str | None, str | None]:
    """Our kind, and transformers' name of the method, of a checkpoint that is quantised; else None twice."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None, None
    values = found if isinstance(found, dict) else found.to_dict()
    method = str(values.get("quant_method", "bitsandbytes"))
    if method == "torchao":
        default = (values.get("quant_type") or {}).get("default", {})
        return TORCHAO_CONFIGS.get(default.get("_type")), method
    if values.get("load_in_8bit"):
        return "int8", method
    is_nf4 = values.get("load_in_4bit") and values.get("bnb_4bit_quant_type") == "nf4"
    return ("nf4" if is_nf4 else None), method


def loading_config(kind: str, dtype: torch.dtype) -> BitsAndBytesConfig | TorchAoConfig:
    """What transformers' loader is told. NF4 is QLoRA's, its scales quantised as well (arXiv 2305.14314)."""
    if kind == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if kind == "torchao-int8" else Float8WeightOnlyConfig())


def settle(model: nn.Module, kind: str, name: str, dtype: torch.dtype) -> None:
    """Makes the layers of a freshly loaded base compute as promised, in `dtype`, without writing themselves.

    Raises ModelError when no layer is quantised, or one cannot be computed here.
    """
    layers = dict(quantised_layers(model))
    if PACKAGES[kind] == "torchao":
        layers = {path: FrozenLinear(layer) for path, layer in layers.items()}
        for path, layer in layers.items():
            model.set_submodule(path, layer)
    if not layers:
        raise ModelError(
            f"Base model '{name}' has no layer that {PACKAGES[kind]} quantises as '{kind}'; torchao takes "
            "nn.Linear alone, bitsandbytes also GPT-2's Conv1D.",
            param=PARAM,
        )
    if kind == "nf4":
        for layer in layers.values():
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype
            # Else the first forward in eval mode rewrites the weight on some CPUs, and rounds its scales.
            layer.support_avx512bf16_for_cpu = False
    distinct = {(layer.out_features, layer.in_features): (path, layer) for path, layer in layers.items()}
    for path, layer in distinct.values():
        _try_out(layer, path, kind, name, dtype)


def _try_out(layer: nn.Module, path: str, kind: str, name: str, dtype: torch.dtype) -> None:
    """One forward and backward; and that NF4 reads its blocks right, which not every width is sure of."""
    weight = dequantised(layer)
    x = torch.ones(2, weight.shape[1], dtype=dtype, device=weight.device, requires_grad=True)
    try:
        layer(x).float().sum().backward()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ModelError(
            f"Base model '{name}' cannot be trained as '{kind}' on {weight.device}: {path} does not compute "
            f"({str(error).splitlines()[0]}).",
            param=PARAM,
        ) from error
    if kind == "nf4" and not torch.allclose(weight, _nf4_by_the_table(layer), rtol=1e-5, atol=1e-7):
        raise ModelError(
            f"Base model '{name}' cannot be trained as 'nf4' on {weight.device}: {path} has "
            f"{weight.shape[1]} inputs, a width for which bitsandbytes {version('bitsandbytes')} reads the "
            "weights wrongly there (multiples of 64 are safe); use 'int8', or another device.",
            param=PARAM,
        )


def _nf4_by_the_table(layer: nn.Module) -> Tensor:
    """What the bytes say: a table's entry a nibble, high one first, times the scale of its block."""
    state, packed = layer.weight.quant_state, layer.weight.data.view(torch.uint8).flatten()
    scales = state.absmax.float()
    if state.nested:
        import bitsandbytes.functional as bnb

        scales = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    entries = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()[: state.shape.numel()]
    values = state.code.float()[entries] * scales.repeat_interleave(state.blocksize)[: len(entries)]
    return values.view(state.shape)


class FrozenLinear(nn.Linear):
    """A layer of torchao's whose backward multiplies the weight out anew.

    torchao's own keeps it from the forward on, so that a training step would hold every layer's in full.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return FrozenProduct.apply(x, self)


class FrozenProduct(torch.autograd.Function):
    """`W x + bias` by the layer's own kernel: x (…, in) → (…, out). Only x has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.weight = layer.weight
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.weight.dequantize(g.dtype), None


# --- the layers --------------------------------------------------------------------------------------------


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers whose weight is held in one of our kinds, by path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and kind_of(module) in PACKAGES:
            yield path, module


def kind_of(layer: nn.Module) -> str | None:
    """How a layer's weight is quantised: one of our kinds, another name, or None when it is not."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return None
    # A layer of bitsandbytes exists only where that is imported.
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            return str(weight.quant_type)
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            return "int8"
    if type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight):
        is_plain = weight.is_floating_point() and weight.element_size() > 1
        return None if is_plain else str(weight.dtype)
    return TORCHAO_TENSORS.get(type(weight).__name__, type(weight).__name__)


def obstacle(layer: nn.Module) -> str | None:
    """Why no adapter can stand beside this layer as it is quantised, or None."""
    kind = kind_of(layer)
    if kind is None:
        return None
    if kind not in PACKAGES:
        return f"its weight is quantised ({kind})"
    if any(getattr(layer.weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale")):
        return "torchao quantises its inputs as well, which lets no right gradient through"
    if kind == "int8" and layer.state.has_fp16_weights:
        return "its weight is quantised anew at every product (llm_int8_has_fp16_weight)"
    return None


@torch.no_grad()
def dequantised(layer: nn.Module) -> Tensor:
    """What the weight of a quantised layer stands for, out×in, fp32. A new tensor."""
    kind = kind_of(layer)
    if kind not in ("nf4", "int8"):
        return layer.weight.dequantize(torch.float32)
    import bitsandbytes.functional as bnb

    if kind == "int8":
        return bnb.int8_vectorwise_dequant(layer.weight.data, _scales(layer))
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(layer.weight.data.view(-1, 1), state)


def held_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a module itself holds as parameters, by name; a quantised one in its parts.

    What must stay as it was loaded. Numbers of one byte are given as uint8, which all devices compare.
    """
    held = {name: tensor.detach() for name, tensor in module.named_parameters(recurse=False)}
    kind = kind_of(module)
    if kind not in PACKAGES:
        return held
    weight = held.pop("weight") if kind.startswith("torchao") else module.weight
    if kind == "nf4":
        parts = weight.quant_state.as_dict(packed=True)
    elif kind == "int8":
        parts = {"SCB": _scales(module)}
    else:
        names = (*weight.tensor_data_names, *getattr(weight, "optional_tensor_data_names", ()))
        parts = {name: part for name in names if (part := getattr(weight, name)) is not None}
    held |= {f"weight.{name}": part for name, part in parts.items()}
    return {name: t.view(torch.uint8) if t.element_size() == 1 else t for name, t in held.items()}


def _scales(layer: nn.Module) -> Tensor:
    """LLM.int8's largest |weight| of each row; the first forward moves it."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def dequantise(model: nn.Module, device: torch.device) -> None:
    """Puts a plain fp32 layer on `device` in the place of every quantised one, and moves the rest there."""
    for path, layer in list(quantised_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantised(layer).to(device), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    nn.Module.to(model, device=device, dtype=torch.float32)  # transformers' own refuses to
