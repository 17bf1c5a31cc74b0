"""Resolving "auto", once the data are tokenised and the model's config is read."""

from dataclasses import dataclass
from typing import Any, Literal

from ..errors import SpecError
from .base import read
from .hyperparameters import Hyperparameters
from .methods.base import AdapterSpec
from .training import TrainSpec

REFERENCE_WIDTH = 4096
"""Hidden size at which a method's `base_learning_rate` holds; see `learning_rate_for`."""
AUTO_BETA = 0.1
"""The value in most experiments of the DPO paper."""


@dataclass(frozen=True)
class RunFacts:
    """What "auto" depends on, apart from the spec."""

    examples: int
    hidden_size: int
    context_length: int
    dtype: Literal["float32", "bfloat16"] = "float32"
    devices: int = 1
    sharded: bool = False


def auto_epochs(examples: int) -> int:
    """OpenAI's public rule: 3, more for very few examples, fewer for very many."""
    if 3 * examples < 100:
        return min(25, 100 // max(1, examples))
    if 3 * examples > 25_000:
        return max(1, 25_000 // examples)
    return 3


def auto_batch_size(examples: int) -> int:
    """0.2 % of the examples, from 4 to 256."""
    return min(256, max(4, round(0.002 * examples)))


def learning_rate_for(adapter: AdapterSpec, hidden_size: int) -> float:
    """The method's default peak rate for this rank and scale, and a model of this hidden size.

    `base (4096 / hidden)^e (s0 / s)^a (r0 / r)^q`, with the scale s0 and rank r0 of the method's defaults.
    docs/methods.md has the measurements that the exponents come from.
    """
    default = type(adapter)()
    rate = adapter.base_learning_rate * (REFERENCE_WIDTH / hidden_size) ** adapter.width_exponent
    rate *= (default.scale / adapter.scale) ** adapter.scale_exponent
    rate *= (default.rank / adapter.rank) ** adapter.rank_exponent
    return float(f"{rate:.2g}")


def resolve(spec: TrainSpec, facts: RunFacts) -> tuple[TrainSpec, dict[str, str]]:
    """Resolves every "auto". Returns the spec, and for the name of each value that was chosen a sentence.

    The learning rate is the table's; a run may measure its own before the first step.

    Raises SpecError for a resolved value outside the bounds that the request must keep to, such as a learning
    rate that a multiplier makes too high.
    """
    asked = spec.hyperparameters
    chosen: dict[str, Any] = {}
    why: dict[str, str] = {}

    def decide(name: str, value: Any, reason: str) -> None:
        if getattr(asked, name) == "auto":
            chosen[name] = value
            why[name] = f"{name} = {value} (auto: {reason})"

    decide("n_epochs", auto_epochs(facts.examples), f"from {facts.examples} examples")
    decide("batch_size", auto_batch_size(facts.examples), "0.2 % of the examples, from 4 to 256")
    decide("context_length", facts.context_length, "the model's own context")
    decide("beta", AUTO_BETA, "DPO's usual value")
    decide("dtype", facts.dtype, "the faster one on this device")
    own_rate = learning_rate_for(spec.adapter, facts.hidden_size)
    if asked.learning_rate in ("auto", "table"):
        factor = 1.0 if asked.learning_rate_multiplier == "auto" else asked.learning_rate_multiplier
        chosen["learning_rate"] = own_rate * factor
        chosen["learning_rate_multiplier"] = factor
        default = (
            f"{spec.adapter.title}'s default for rank {spec.adapter.rank}, scale {spec.adapter.scale:g} and "
            f"hidden size {facts.hidden_size}"
        )
        reason = default if factor == 1 else f"{factor:g} times {default}"
        why["learning_rate"] = f"learning_rate = {own_rate * factor:g} ({asked.learning_rate}: {reason})"
    elif asked.learning_rate_multiplier == "auto":
        chosen["learning_rate_multiplier"] = asked.learning_rate / own_rate
    batch_size = chosen.get("batch_size", asked.batch_size)
    if asked.sharding == "auto":
        chosen["sharding"] = "full" if facts.sharded else "none"
        if facts.devices > 1:
            why["sharding"] = f"sharding = {chosen['sharding']} (auto: by the device's memory)"
    if asked.micro_batch_size == "auto":
        chosen["micro_batch_size"] = -(-batch_size // facts.devices)
    elif asked.micro_batch_size > batch_size:
        raise SpecError(
            f"hyperparameters.micro_batch_size = {asked.micro_batch_size} exceeds batch_size = {batch_size}.",
            param="hyperparameters.micro_batch_size",
        )
    if asked.context_length != "auto" and asked.context_length > facts.context_length:
        raise SpecError(
            f"hyperparameters.context_length = {asked.context_length} exceeds the model's context of "
            f"{facts.context_length} tokens.",
            param="hyperparameters.context_length",
        )
    return _with(spec, chosen), why


def with_learning_rate(spec: TrainSpec, rate: float) -> TrainSpec:
    """A resolved spec with another peak rate. Raises SpecError for one outside the bounds."""
    return _with(spec, {"learning_rate": rate})


def _with(spec: TrainSpec, changes: dict[str, Any]) -> TrainSpec:
    values = spec.hyperparameters.model_dump() | changes
    hyperparameters = read(Hyperparameters, values, lambda name: "hyperparameters")
    return spec.model_copy(update={"hyperparameters": hyperparameters})
