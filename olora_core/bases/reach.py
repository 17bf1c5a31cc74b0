"""Which layers of a base model text reaches: not vision and audio towers, nor attention to their output."""

from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import PreTrainedModel

from ..layers.adapter import bare_modules, is_linear
from .passes import evaluating, probe_tokens

TOKENS = 12
_unreached: WeakKeyDictionary[nn.Module, frozenset[str]] = WeakKeyDictionary()


def unreached_layers(model: PreTrainedModel) -> frozenset[str]:
    """Paths of the linear layers that are not called when the model reads text.

    Found by a forward pass over a few tokens, once for each model. They would not be trained by text, and
    their adapters would stay at their start. Of several experts in a list, all are reached if one is.
    """
    if model not in _unreached:
        _unreached[model] = frozenset(_not_called(model))
    return _unreached[model]


def _not_called(model: PreTrainedModel) -> Iterator[str]:
    with _watched(model) as called, evaluating(model), torch.no_grad():
        model(input_ids=probe_tokens(model, TOKENS), use_cache=False)
    lists = [
        path for path, module in model.named_modules() if isinstance(module, nn.ModuleList | nn.ModuleDict)
    ]
    inner = [path for path in lists if any(path.startswith(f"{outer}.") for outer in lists)]
    alive = [path for path in inner if any(name.startswith(f"{path}.") for name in called)]
    for path, module in bare_modules(model):
        if is_linear(module) and path not in called and not any(path.startswith(f"{a}.") for a in alive):
            yield path


@contextmanager
def _watched(model: nn.Module) -> Iterator[set[str]]:
    """Inside, collects the paths of the modules that are called."""
    called: set[str] = set()

    def note(path: str) -> None:
        called.add(path)

    hooks = [
        module.register_forward_hook(lambda *_, path=path: note(path))
        for path, module in model.named_modules()
    ]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()
