"""The rank at which a method has as many trainable parameters as another."""

from collections.abc import Sequence

from pydantic import ValidationError

from ..errors import SpecError
from ..layers.adapter import Site
from ..methods import METHODS
from ..specs import MAX_EXPORT_RANK, AdapterSpec, check_export


def trainable_parameters(adapter: AdapterSpec, sites: Sequence[Site], total_steps: int) -> int:
    """Trainable parameters of a run in these layers, which may depend on its steps."""
    return METHODS[adapter.method].trainable_parameters(adapter, sites, total_steps)


def within_budget(adapter: AdapterSpec, budget: int, sites: Sequence[Site], total_steps: int) -> AdapterSpec:
    """The adapter at the rank whose number of trainable parameters is nearest to `budget`.

    Only ranks that the layers and the adapter's other options allow and servers can load; of two equally near
    ranks, the one nearer to the adapter's own. Raises SpecError if there is none.
    """
    widest = METHODS[adapter.method].widest_rank(adapter, sites, total_steps)
    ranks = range(1, min(widest, MAX_EXPORT_RANK) + 1)
    fitting = [changed for rank in ranks if (changed := _at_rank(adapter, rank)) is not None]
    if not fitting:
        raise SpecError(
            f"{adapter.method} has no rank that these layers and its options allow and servers can load; "
            "change the options, or leave it out.",
            param="adapter.rank",
        )

    def distance(changed: AdapterSpec) -> tuple[int, int]:
        numbers = trainable_parameters(changed, sites, total_steps)
        return abs(numbers - budget), abs(changed.rank - adapter.rank)

    return min(fitting, key=distance)


def _at_rank(adapter: AdapterSpec, rank: int) -> AdapterSpec | None:
    """None if the other options do not allow that rank, or no server could load the export."""
    try:
        changed = type(adapter).model_validate(adapter.model_dump() | {"rank": rank})
        check_export(changed)
    except (ValidationError, SpecError):
        return None
    return changed
