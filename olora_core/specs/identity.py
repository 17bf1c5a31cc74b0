"""A spec as text, by which a checkpoint knows the run that it belongs to."""

from collections.abc import Mapping
from typing import Any

from .adapters import DEFAULT_METHOD
from .base import Spec
from .training import TrainSpec

FORMER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {"olora": {"rank": 32}}
"""By method: defaults that have changed since checkpoints were first written."""


def identity_text(spec: TrainSpec) -> str:
    """JSON of a resolved spec without what is as by default.

    So an option that a later version adds leaves the text of earlier runs as it was, and so does a default
    that changes: the text keeps to the former one.
    """
    adapter = _defaults_in(spec.adapter, FORMER_DEFAULTS.get(spec.adapter.method, {}))
    is_default = spec.adapter.method == DEFAULT_METHOD and adapter == set(type(spec.adapter).model_fields)
    left_out: dict[str, Any] = dict.fromkeys(_defaults_in(spec) - {"adapter"}, True)
    left_out["adapter"] = is_default or adapter
    left_out["hyperparameters"] = _defaults_in(spec.hyperparameters)
    return spec.model_dump_json(exclude=left_out)


def _defaults_in(model: Spec, former: Mapping[str, Any] | None = None) -> set[str]:
    """Names of the fields that have their default, or their former one."""
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(model).model_fields.items()
    }
    return {
        name for name, default in (defaults | dict(former or {})).items() if getattr(model, name) == default
    }
