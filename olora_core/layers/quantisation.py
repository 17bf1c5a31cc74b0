"""Bases with weights in 8 or 4 bits: how they are loaded, and how their layers store weights.

Quantised weights are never written, so that training starts at the quantised base, bit for bit. The packages
come with the extra `gpu` and are imported only for a base that needs them.
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
"""Every kind of quantised base, and the package that implements it."""
DEVICES = ("cpu", "cuda")
TORCHAO_TENSORS = {"Int8Tensor": "torchao-int8", "Float8Tensor": "torchao-fp8"}
TORCHAO_CONFIGS = {"Int8WeightOnlyConfig": "torchao-int8", "Float8WeightOnlyConfig": "torchao-fp8"}
PARAM = "hyperparameters.quantization"


@dataclass(frozen=True)
class Quantised:
    """How a base in memory was quantised."""

    kind: str
    settings: dict[str, Any]
    """The `quantization_config` with which transformers loads the same base."""
    from_files: bool
    """The checkpoint itself is quantised, so that there is no full-precision base to compare with."""

    @property
    def package(self) -> str:
        """Name and version of the package."""
        return f"{PACKAGES[self.kind]} {version(PACKAGES[self.kind])}"


# --- loading -----------------------------------------------------------------------------------------------


def choose_kind(asked: str, config: PreTrainedConfig, name: str, device: str) -> str | None:
    """The kind that a base is to be loaded as; None if unquantised.

    Raises SpecError if the checkpoint is quantised in another way than asked for, and ModelError if the
    package is not installed or the device is not supported.
    """
    in_files, method = _checkpoint_kind(config)
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


def _checkpoint_kind(config: PreTrainedConfig) -> tuple[str | None, str | None]:
    """Kind and transformers' `quant_method` of a quantised checkpoint, the kind None if it is not supported;
    (None, None) for a checkpoint that is not quantised."""
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
    """The config for transformers' loader. NF4 is QLoRA's, with double quantisation (arXiv 2305.14314)."""
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


def prepare_layers(model: nn.Module, kind: str, name: str, dtype: torch.dtype) -> None:
    """Makes the quantised layers of a freshly loaded base compute in `dtype` and never rewrite their weights,
    and their outputs ones that a model may change in place.

    Raises ModelError if no layer is quantised, or one cannot be computed on this device.
    """
    layers = dict(quantised_layers(model))
    if PACKAGES[kind] == "torchao":
        layers = {path: FrozenLinear(layer) for path, layer in layers.items()}
        for path, layer in layers.items():
            model.set_submodule(path, layer)
    if not layers:
        raise ModelError(
            f"Base model '{name}' has no layer that {PACKAGES[kind]} quantises as '{kind}'; torchao supports "
            "only nn.Linear, bitsandbytes also GPT-2's Conv1D.",
            param=PARAM,
        )
    if kind == "nf4":
        for layer in layers.values():
            layer.compute_dtype, layer.compute_type_is_set = dtype, True
            layer.weight.quant_state.dtype = dtype
            # Otherwise the first forward in eval mode repacks the weight on some CPUs and rounds its scales.
            layer.support_avx512bf16_for_cpu = False
    # One layer of each shape is enough: kernels depend on the shape, not on the values.
    distinct = {(layer.out_features, layer.in_features): (path, layer) for path, layer in layers.items()}
    for path, layer in distinct.values():
        _check_computes(layer, path, kind, name, dtype)
    for layer in layers.values():
        layer.register_forward_hook(_own_output)


def _own_output(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """A copy where the kernel's Function returns a view, which autograd lets nobody change in place."""
    return output.clone() if output.requires_grad and output._is_view() else output


def _check_computes(layer: nn.Module, path: str, kind: str, name: str, dtype: torch.dtype) -> None:
    """One forward and backward; for NF4 also the dequantisation, which is wrong at some widths."""
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
    if kind == "nf4" and not torch.allclose(weight, _nf4_reference(layer), rtol=1e-5, atol=1e-7):
        raise ModelError(
            f"Base model '{name}' cannot be trained as 'nf4' on {weight.device}: {path} has "
            f"{weight.shape[1]} inputs, a width for which bitsandbytes {version('bitsandbytes')} reads the "
            "weights wrongly there (multiples of 64 are safe); use 'int8', or another device.",
            param=PARAM,
        )


def _nf4_reference(layer: nn.Module) -> Tensor:
    """The dequantised weight, out×in, fp32, from the definition of NF4.

    Each nibble, the high one first, indexes a table of 16 values; the value is scaled by its block's scale.
    """
    state, packed = layer.weight.quant_state, layer.weight.data.view(torch.uint8).flatten()
    scales = state.absmax.float()
    if state.nested:
        import bitsandbytes.functional as bnb

        scales = bnb.dequantize_blockwise(state.absmax, state.state2).float() + state.offset
    entries = torch.stack([packed >> 4, packed & 15], dim=1).flatten().long()[: state.shape.numel()]
    values = state.code.float()[entries] * scales.repeat_interleave(state.blocksize)[: len(entries)]
    return values.view(state.shape)


class FrozenLinear(nn.Linear):
    """A torchao layer that dequantises its weight again in the backward pass.

    torchao's own saves the dequantised weight for the backward, so that a training step would hold those of
    all layers at once.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, bias=False, device="meta")
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        return FrozenProduct.apply(x, self)


class FrozenProduct(torch.autograd.Function):
    """`W x + bias` by the layer's own kernel: x (…, in) → (…, out). Only x has a gradient: `dx = Wᵀ g`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: nn.Linear) -> Tensor:
        ctx.weight = layer.weight
        return F.linear(x, layer.weight, layer.bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:
        return g @ ctx.weight.dequantize(g.dtype), None


# --- the layers --------------------------------------------------------------------------------------------


def quantised_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The linear layers quantised as one of PACKAGES, by path."""
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and kind_of(module) in PACKAGES:
            yield path, module


def kind_of(layer: nn.Module) -> str | None:
    """How a layer's weight is quantised: a key of PACKAGES, another name if unsupported, or None."""
    weight = layer._parameters.get("weight")
    if weight is None:
        return None
    # If bitsandbytes was not imported, no layer can be one of its.
    if (bitsandbytes := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            return str(weight.quant_type)
        if isinstance(layer, bitsandbytes.nn.Linear8bitLt):
            return "int8"
    if type(weight) in (Tensor, nn.Parameter) or is_dtensor(weight):
        is_plain = weight.is_floating_point() and weight.element_size() > 1
        return None if is_plain else str(weight.dtype)
    return TORCHAO_TENSORS.get(type(weight).__name__, type(weight).__name__)


def why_not_adaptable(layer: nn.Module) -> str | None:
    """Why this layer cannot be adapted as it is quantised; None if it can."""
    kind = kind_of(layer)
    if kind is None:
        return None
    if kind not in PACKAGES:
        return f"its weight is quantised ({kind})"
    if any(getattr(layer.weight, name, None) is not None for name in ("act_quant_kwargs", "act_pre_scale")):
        return "torchao quantises its inputs as well, which makes the gradient wrong"
    if kind == "int8" and layer.state.has_fp16_weights:
        return "its weight is quantised again at every product (llm_int8_has_fp16_weight)"
    return None


@torch.no_grad()
def dequantised(layer: nn.Module) -> Tensor:
    """The dequantised weight of a quantised layer, out×in, fp32. A new tensor."""
    kind = kind_of(layer)
    if kind not in ("nf4", "int8"):
        return layer.weight.dequantize(torch.float32)
    import bitsandbytes.functional as bnb

    if kind == "int8":
        return bnb.int8_vectorwise_dequant(layer.weight.data, _scales(layer))
    state = copy.copy(layer.weight.quant_state)
    state.dtype = torch.float32
    return bnb.dequantize_4bit(layer.weight.data.view(-1, 1), state)


def stored_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of a module's own parameters, by name; a quantised weight as its parts.

    They must not change while the base is loaded. One-byte dtypes are viewed as uint8, which every device
    can compare.
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
    """LLM.int8's scales, (out,): each row's largest |weight|. The first forward moves them to `state`."""
    return layer.state.SCB if layer.weight.SCB is None else layer.weight.SCB


def dequantise(model: nn.Module, device: torch.device) -> None:
    """Replaces every quantised layer by an fp32 nn.Linear and moves the model to `device` in fp32."""
    for path, layer in list(quantised_layers(model)):
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.weight = nn.Parameter(dequantised(layer).to(device), requires_grad=False)
        plain.bias = layer.bias
        model.set_submodule(path, plain)
    nn.Module.to(model, device=device, dtype=torch.float32)  # PreTrainedModel.to refuses a quantised model
