"""The linear layers of a base model that can be adapted."""

from collections import Counter
from collections.abc import Callable, Sequence

import regex
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
from transformers import conversion_mapping as conversions
from transformers.pytorch_utils import Conv1D

from ..errors import SpecError
from ..layers import quantisation
from ..layers.adapter import (
    AdaptedLinear,
    Kind,
    Site,
    attached,
    bare_modules,
    is_linear,
    site_shape,
    site_weight,
)
from ..specs import nearest

MATCH_SECONDS = 0.2
ALL_LINEAR = ("auto", "all-linear")
UNADAPTED = {
    "experts": "fused expert tensors ({names}) are not linear layers and are not adapted.",
    "routers": "routers ({names}) are not adapted unless they are linear layers and named.",
    "layers": "layers ({names}) are not adapted, for PEFT would take their names for the experts'.",
    "tensors": "matrices ({names}) are in no linear layer and are not adapted.",
}
"""What is said of each kind that `unadapted` tells apart, after its number."""
TAKEN_FOR_EXPERTS = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}
"""Names that PEFT moves to the fused experts when it loads an adapter, wherever else a layer bears them."""


def _fused(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Parameters that hold the matrices of several experts in one 3-D tensor.

    Path of the module, name and tensor; a convolution's kernel or a vector with extra axes is none.
    """
    return [
        (path, name, parameter)
        for path, module in bare_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
    ]


def unadapted(model: nn.Module) -> dict[str, list[str]]:
    """What target_modules = "auto" does not adapt inside the blocks, by kind (see UNADAPTED).

    A linear layer is given by its path, anything else by the name of its tensor. A layer that bears an
    adapter, because it was named, is not left out.
    """
    found: dict[str, list[str]] = {kind: [] for kind in UNADAPTED}
    stacks = block_stacks(model)
    owners = {path for path, _, _ in _fused(model)}
    routers = _routers(model)
    adapted = {path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for path, module in bare_modules(model):
        if path in adapted or _block_of(path, stacks)[0] is None or isinstance(module, nn.Embedding):
            continue
        if is_linear(module):
            if path in routers:
                found["routers"].append(path)
            elif _taken_for_experts(model, path):
                found["layers"].append(path)
            elif _does_more(module):
                found["tensors"].append(f"{path}.weight")
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) < 2:  # a vector, whatever its axes
                continue
            kind = "experts" if path in owners else "routers" if path in routers else "tensors"
            found[kind].append(f"{path}.{name}")
    return {kind: names for kind, names in found.items() if names}


def _routers(model: nn.Module) -> set[str]:
    """Paths of the gates beside fused experts: a matrix with one row, or as many as there are experts.

    Told by shape and place, since every family has a name of its own for them. A gate stands in the experts'
    own block, or alone in a module there; the projections of a shared expert have siblings.
    """
    counts = {path.rpartition(".")[0]: parameter.shape[0] for path, _, parameter in _fused(model)}
    matrices = {
        path: site_shape(module)[0]
        for path, module in bare_modules(model)
        if counts
        and isinstance(weight := getattr(module, "weight", None), torch.Tensor)
        and weight.dim() == 2
    }
    siblings = Counter(path.rpartition(".")[0] for path in matrices)
    return {
        path
        for path, rows in matrices.items()
        for block, count in counts.items()
        if path.startswith(f"{block}.") and rows in (1, count)
        if (parent := path.rpartition(".")[0]) == block or siblings[parent] == 1
    }


def _taken_for_experts(model: nn.Module, path: str) -> bool:
    """Whether PEFT would look for this layer's factors among the fused experts, and not load them."""
    family = getattr(model.config, "model_type", None)
    family = "mixtral" if family == "mixtral" else conversions._MODEL_TO_CONVERSION_PATTERN.get(family)
    return path.rpartition(".")[2] in TAKEN_FOR_EXPERTS.get(family, ())


def target_sites(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[Site]:
    """The layers to adapt, in model order.

    "auto" (or "all-linear"): every linear layer of the transformer blocks but routers; `unadapted` tells what
    it does not take. A list: each name matches the layers whose path is it or ends in `.name`. Any other
    string: a regular expression for the whole path. The rules are PEFT's. The model must bear no adapters.

    Raises SpecError for a name that matches nothing, and for one that matches what cannot be adapted.
    """
    if attached(model):
        raise ValueError("The model bears adapters already; detach them first.")
    stacks = block_stacks(model)
    if target_modules in ALL_LINEAR:
        chosen = [name for name in _linear_layers(model) if _block_of(name, stacks)[0] is not None]
        routers = _routers(model)
        chosen = [name for name in chosen if name not in routers and _obstacle(model, name) is None]
        if not chosen:
            raise _no_match(model, "target_modules = 'auto' finds no linear layer inside the model's blocks")
    elif isinstance(target_modules, str):
        chosen = _chosen(model, _full_match(target_modules))
        if not chosen:
            raise _no_match(
                model,
                f"no linear layer's whole path matches the regular expression '{target_modules}' "
                f'(to name layers, give a list: ["{target_modules}"])',
            )
    else:
        wanted = set()
        for ending in target_modules:
            matched = _chosen(model, lambda name, ending=ending: ends_in(name, ending))
            if not matched:
                raise _no_match(
                    model, f"no linear layer is named '{ending}'{nearest(ending, _endings(model))}"
                )
            wanted.update(matched)
        chosen = [name for name in _linear_layers(model) if name in wanted]
    return [_site(model, name, stacks) for name in chosen]


def _full_match(pattern: str) -> Callable[[str], bool]:
    """Whether a whole path matches. Raises SpecError for a pattern that takes for ever to try."""
    try:
        compiled = regex.compile(pattern)
    except regex.error as error:
        raise SpecError(
            f"adapter.target_modules: '{pattern}' is not a regular expression ({error}).",
            param="adapter.target_modules",
        ) from None

    def matches(name: str) -> bool:
        try:
            return compiled.fullmatch(name, timeout=MATCH_SECONDS) is not None
        except TimeoutError:
            raise SpecError(
                f"adapter.target_modules: the regular expression '{pattern}' takes too long to try on "
                f"'{name}'; write it without nested repetition, or give a list of names.",
                param="adapter.target_modules",
            ) from None

    return matches


def ends_in(name: str, ending: str) -> bool:
    """Whether a list of target modules with this entry selects that path, by the rule of PEFT."""
    return name == ending or name.endswith(f".{ending}")


def _chosen(model: PreTrainedModel, matches: Callable[[str], bool]) -> list[str]:
    """The linear layers whose path matches. Refuses other layers and tensors that match."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and matches(name):
            raise _refusal(name, "it holds the matrices of several experts in one tensor")
    chosen = []
    for name, module in model.named_modules():
        if name and matches(name) and (is_linear(module) or module._parameters):
            if reason := _obstacle(model, name):
                raise _refusal(name, reason)
            chosen.append(name)
    return chosen


def _obstacle(model: PreTrainedModel, name: str) -> str | None:
    """Why this layer cannot be adapted, or None."""
    module = model.get_submodule(name)
    if not is_linear(module) or _does_more(module):
        return f"it is a {type(module).__name__}, not a linear layer"
    weight = module.weight
    if any(m.weight is weight for m in model.modules() if isinstance(m, nn.Embedding)):
        return "its weight is tied to the token embedding"
    if reason := quantisation.obstacle(module):
        return reason
    if _taken_for_experts(model, name):
        family = model.config.model_type
        return f"PEFT takes its name for the fused experts of a {family} and would not load its adapter"
    return None


@torch.no_grad()
def _does_more(module: nn.Module) -> bool:
    """Whether a family's own kind of linear layer gives something else than W x + bias.

    Asked by calling it, for some only say otherwise what they inherit.
    """
    if not type(module).__module__.startswith("transformers.models."):
        return False
    weight = site_weight(module)
    x = torch.ones(1, weight.shape[1], dtype=weight.dtype, device=weight.device)
    try:
        got = module(x)
    except (RuntimeError, ValueError, IndexError):
        return True
    expected = nn.functional.linear(x, weight, module.bias)
    if not isinstance(got, torch.Tensor) or got.shape != expected.shape:
        return True
    return bool((got - expected).float().norm() > 0.05 * expected.float().norm())  # bf16 rounds


def _refusal(name: str, reason: str) -> SpecError:
    return SpecError(
        f"adapter.target_modules names '{name}', which cannot be adapted: {reason}. Leave it out.",
        param="adapter.target_modules",
    )


def _no_match(model: PreTrainedModel, what: str) -> SpecError:
    return SpecError(
        f"adapter.target_modules: {what}. Available: {', '.join(_endings(model))}.",
        param="adapter.target_modules",
    )


def _linear_layers(model: PreTrainedModel) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module)]


def _endings(model: PreTrainedModel) -> list[str]:
    """Last part of the path of every layer that can be adapted, each once."""
    layers = [name for name in _linear_layers(model) if _obstacle(model, name) is None]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def block_stacks(model: nn.Module) -> dict[str, int]:
    """Path and length of each outermost list of modules: `model.layers`, `transformer.h`."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{s}.") for s in stacks):
            stacks[name] = len(module)
    return stacks


def _block_of(name: str, stacks: dict[str, int]) -> tuple[int | None, int]:
    """Number of the block that holds this layer, and of the blocks in its stack; (None, 0) outside."""
    for stack, length in stacks.items():
        if name.startswith(f"{stack}."):
            return int(name[len(stack) + 1 :].partition(".")[0]), length
    return None, 0


def _site(model: nn.Module, name: str, stacks: dict[str, int]) -> Site:
    module = model.get_submodule(name)
    out_features, in_features = site_shape(module)
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    return Site(name, *_block_of(name, stacks), kind, out_features, in_features)
