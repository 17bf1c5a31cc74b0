"""The linear layers of a base model that can be adapted."""

from collections import Counter
from collections.abc import Callable, Sequence

import regex
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel
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
from .loaders import why_not_loadable
from .reach import unreached_layers

MATCH_SECONDS = 0.2
ALL_LINEAR = ("auto", "all-linear")
UNADAPTED = {
    "experts": "fused expert tensors ({names}) are not linear layers and are not adapted.",
    "routers": "routers ({names}) are not adapted unless they are linear layers and named in target_modules.",
    "unreached": "layers ({names}) are not called when the model reads text and are not adapted.",
    "layers": "layers ({names}) are not adapted, because PEFT would not load their adapters: it takes their "
    "names for experts', or refuses them in this family.",
    "tensors": "matrices ({names}) do not belong to a linear layer and are not adapted.",
}
"""The note for each kind in `unadapted`, after the number of its tensors."""


def _fused(model: nn.Module) -> list[tuple[str, str, nn.Parameter]]:
    """Parameters with the matrices of several experts, (experts, …, …): module path, name, tensor.

    Convolution kernels and vectors with extra axes are 3-D as well, and are skipped.
    """
    return [
        (path, name, parameter)
        for path, module in bare_modules(model)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == 3 and min(parameter.shape) > 1 and not isinstance(module, _ConvNd)
    ]


def unadapted(model: nn.Module) -> dict[str, list[str]]:
    """The matrices inside the blocks that target_modules = "auto" does not adapt, by kind (see UNADAPTED).

    A linear layer is given by its path, anything else by its tensor's name. A layer that has an adapter,
    because target_modules names it, is not listed.
    """
    found: dict[str, list[str]] = {kind: [] for kind in UNADAPTED}
    stacks = block_stacks(model)
    owners = {path for path, _, _ in _fused(model)}
    routers, unreached = _routers(model), unreached_layers(model)
    adapted = {path for path, module in model.named_modules() if isinstance(module, AdaptedLinear)}
    for path, module in bare_modules(model):
        if path in adapted or _block_of(path, stacks)[0] is None or isinstance(module, nn.Embedding):
            continue
        if is_linear(module):
            if path in unreached:
                found["unreached"].append(path)
            elif path in routers:
                found["routers"].append(path)
            elif why_not_loadable(model, path):
                found["layers"].append(path)
            elif _is_not_affine(module):
                found["tensors"].append(f"{path}.weight")
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if sum(size > 1 for size in parameter.shape) < 2:  # a vector with extra axes
                continue
            kind = "experts" if path in owners else "routers" if path in routers else "tensors"
            found[kind].append(f"{path}.{name}")
    return {kind: names for kind, names in found.items() if names}


def _routers(model: nn.Module) -> set[str]:
    """Paths of the routers of fused experts: matrices with one row, or one row for each expert.

    Recognised by shape and place, since every family names them differently: a router is in the experts' own
    block, or the only matrix of a submodule there. The projections of a shared expert have siblings.
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


def target_sites(model: PreTrainedModel, target_modules: str | Sequence[str]) -> list[Site]:
    """The layers to adapt, in model order.

    "auto" or "all-linear": every linear layer of the transformer blocks that text reaches, except routers;
    `unadapted` lists the rest. A list: each name matches the layers whose path equals it or ends in `.name`.
    Any other string: a regular expression for the whole path. These are PEFT's rules, but that layers which
    text does not reach are left out where the same name or expression also matches others. The model must
    have no adapters attached.

    Raises SpecError for a name that matches nothing, or a layer that cannot be adapted.
    """
    if attached(model):
        raise ValueError("The model has adapters already; detach them first.")
    stacks = block_stacks(model)
    if target_modules in ALL_LINEAR:
        chosen = [name for name in _linear_layers(model) if _block_of(name, stacks)[0] is not None]
        routers = _routers(model)
        chosen = [name for name in chosen if name not in routers and _why_not(model, name) is None]
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
    """A test of whole paths. Raises SpecError for an invalid pattern, and when a match takes too long."""
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
    """Whether PEFT selects the layer `name` for an entry `ending` in a list of target modules."""
    return name == ending or name.endswith(f".{ending}")


def _chosen(model: PreTrainedModel, matches: Callable[[str], bool]) -> list[str]:
    """The linear layers whose path matches. Raises SpecError if anything else matches."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 and matches(name):
            raise _refusal(name, "it holds the matrices of several experts in one tensor")
    chosen = []
    for name, module in model.named_modules():
        if name and matches(name) and (is_linear(module) or module._parameters):
            chosen.append(name)
    unreached = unreached_layers(model)
    chosen = [name for name in chosen if name not in unreached] or chosen
    for name in chosen:
        if reason := _why_not(model, name):
            raise _refusal(name, reason)
    return chosen


def _why_not(model: PreTrainedModel, name: str) -> str | None:
    """Why this layer cannot be adapted; None if it can."""
    module = model.get_submodule(name)
    if not is_linear(module) or _is_not_affine(module):
        return f"it is a {type(module).__name__}, not a linear layer"
    weight = module.weight
    if any(m.weight is weight for m in model.modules() if isinstance(m, nn.Embedding)):
        return "its weight is tied to the token embedding"
    if reason := quantisation.why_not_adaptable(module):
        return reason
    if name in unreached_layers(model):
        return "the model does not call it when it reads text, so that it would not be trained"
    return why_not_loadable(model, name)


@torch.no_grad()
def _is_not_affine(module: nn.Module) -> bool:
    """Whether calling a family's own kind of linear layer returns something other than W x + bias.

    Probed by a forward, since a subclass may override it or only rename it.
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
    """The distinct last path components of the layers that can be adapted."""
    layers = [name for name in _linear_layers(model) if _why_not(model, name) is None]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def block_stacks(model: nn.Module) -> dict[str, int]:
    """Path and length of each outermost list of modules: `model.layers`, `transformer.h`."""
    stacks: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{s}.") for s in stacks):
            stacks[name] = len(module)
    return stacks


def _block_of(name: str, stacks: dict[str, int]) -> tuple[int | None, int]:
    """Index of the layer's block and the number of blocks in its stack; (None, 0) outside the blocks."""
    for stack, length in stacks.items():
        if name.startswith(f"{stack}."):
            return int(name[len(stack) + 1 :].partition(".")[0]), length
    return None, 0


def _site(model: nn.Module, name: str, stacks: dict[str, int]) -> Site:
    module = model.get_submodule(name)
    out_features, in_features = site_shape(module)
    kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
    return Site(name, *_block_of(name, stacks), kind, out_features, in_features)
