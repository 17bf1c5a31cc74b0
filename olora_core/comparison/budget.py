"""How many parameters a method trains, and the rank at which it trains as many as another."""

from collections.abc import Sequence

from pydantic import ValidationError

from ..errors import SpecError
from ..layers.adapter import Site
from ..methods import METHODS
from ..specs import MAX_EXPORT_RANK, AdapterSpec, check_export


def trainable_parameters(adapter: AdapterSpec, sites: Sequence[Site], total_steps: int) -> int:
    """Trainable parameters of a run of `total_steps` steps in these layers."""
    return METHODS[adapter.method].trainable_parameters(adapter, sites, total_steps)


def within_budget(adapter: AdapterSpec, budget: int, sites: Sequence[Site], total_steps: int) -> AdapterSpec:
    """The method with the rank whose number of trainable parameters is nearest to `budget`.

    Of the ranks that the layers hold, the other options allow and servers load; of two that are as near, the
    one nearer to the adapter's own. Raises SpecError when there is none.
    """
    widest = METHODS[adapter.method].widest_rank(adapter, sites, total_steps)
    ranks = range(1, min(widest, MAX_EXPORT_RANK) + 1)
    fitting = [changed for rank in ranks if (changed := _at_rank(adapter, rank)) is not None]
    if not fitting:
        raise SpecError(
            f"{adapter.method} has no rank that these layers hold, its options allow and servers load; "
            "change the options, or leave it out.",
            param="adapter.rank",
        )

    def distance(changed: AdapterSpec) -> tuple[int, int]:
        numbers = trainable_parameters(changed, sites, total_steps)
        return abs(numbers - budget), abs(changed.rank - adapter.rank)

    return min(fitting, key=distance)


def _at_rank(adapter: AdapterSpec, rank: int) -> AdapterSpec | None:
    """None where the other options do not go with that rank, or no server would load the export."""
    try:
        changed = type(adapter).model_validate(adapter.model_dump() | {"rank": rank})
        check_export(changed)
    except (ValidationError, SpecError):
        return None
    return changed
