"""The search for a method's learning rate: successive halving on rows held out of the training rows.

Each rung trains the remaining rates for a share of the steps, with a complete schedule, and keeps the better
half; the last two rates train in full (Jamieson and Talwalkar, arXiv 1502.07943). A search over five rates
thus costs less than five full runs, and every method is compared at a rate that suits it.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from ..seeds import seed_of
from ..specs.methods.base import MAX_LEARNING_RATE

FACTORS = (0.1, 0.32, 1.0, 3.2, 10.0)
"""The grid, relative to the method's default rate: half decades around it."""
BELOW, ABOVE = (0.032, 0.01), (32.0, 100.0)
"""Rates tried beyond the grid while the best one is at its edge, nearest first."""
SHARES = (0.25, 0.5)
"""Share of the steps in the first rung, and in those between it and the last."""
FEWEST_STEPS = 8
"""Steps of a rung at least, if a full run has as many."""
FEWEST_ROWS, MOST_ROWS = 16, 512
"""Rows held out; never more than half of all."""


def held_out(examples: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the examples to train on and of those held out, both sorted: (n − k,) and (k,) int64.

    They depend on the arguments only. Raises DataError for fewer than two examples.
    """
    if examples < 2:
        raise DataError(
            "A comparison needs at least two training rows: it holds some out to choose learning rates."
        )
    count = min(max(FEWEST_ROWS, round(share * examples)), MOST_ROWS, examples // 2)
    order = np.random.default_rng(seed_of(f"search/{seed}", bits=64)).permutation(examples)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class Grid:
    """Learning rates of one method in rising order, and those beyond both edges, nearest first."""

    rates: tuple[float, ...] = ()
    below: tuple[float, ...] = ()
    above: tuple[float, ...] = ()


def grid_around(default_rate: float) -> Grid:
    """The grid around a default rate, without rates that a spec does not allow."""

    def times(factors: Sequence[float]) -> tuple[float, ...]:
        rates = (float(f"{default_rate * factor:.3g}") for factor in factors)
        return tuple(rate for rate in rates if 0 < rate <= MAX_LEARNING_RATE)

    return Grid(times(FACTORS), times(BELOW), times(ABOVE))


@dataclass(frozen=True)
class Rung:
    """Rates that are trained for the same number of steps, then compared."""

    rates: tuple[float, ...]
    steps: int
    ahead: tuple[int, ...] = ()
    """Steps of each run planned after this rung."""
    extends: bool = False
    """Whether its rate is beyond the grid, because the best one was at the edge."""


Losses = Sequence[float | None]
"""Losses of a rung's rates, in order; None for a run that failed."""


def halving(grid: Grid, steps: int) -> Generator[Rung, Losses, float | None]:
    """Yields rungs and is sent their losses; returns the best rate, or None if every run failed.

    Of two equal losses, the lower rate wins. A grid of one rate is not searched.
    """
    left = grid.rates
    if len(left) == 1:
        return left[0]
    while (rung := next_rung(left, steps, first=left == grid.rates)).steps < steps:
        losses = yield rung
        left = better(left, losses, keep=max(2, math.ceil(len(left) / 2)))
        if not left:
            return None
    losses = yield rung
    return (yield from at_the_edge(grid, left, losses, steps))


def next_rung(left: tuple[float, ...], steps: int, *, first: bool) -> Rung:
    """The rung for the remaining rates: shorter than a full run while there are more than two."""
    if len(left) <= 2:
        return Rung(left, steps)
    part = min(steps, max(FEWEST_STEPS, math.ceil(SHARES[0 if first else 1] * steps)))
    if part == steps:
        return Rung(left, steps)
    kept = max(2, math.ceil(len(left) / 2))
    after = next_rung(left[:kept], steps, first=False)
    return Rung(left, part, (after.steps,) * len(after.rates) + after.ahead)


def better(rates: tuple[float, ...], losses: Losses, keep: int) -> tuple[float, ...]:
    """The `keep` rates with the lowest losses, in rising order; failed ones are dropped."""
    ranked = sorted((loss, rate) for rate, loss in zip(rates, losses, strict=True) if loss is not None)
    return tuple(sorted(rate for _, rate in ranked[:keep]))


def at_the_edge(
    grid: Grid, rates: tuple[float, ...], losses: Losses, steps: int
) -> Generator[Rung, Losses, float | None]:
    """The best rate of the last rung; while it is at the edge, one more rate beyond is tried."""
    ranked = sorted((loss, rate) for rate, loss in zip(rates, losses, strict=True) if loss is not None)
    if not ranked:
        return None
    loss, best = ranked[0]
    for side, edge in ((grid.below, grid.rates[0]), (grid.above, grid.rates[-1])):
        for beyond in side:
            if best != edge:
                break
            (found,) = yield Rung((beyond,), steps, extends=True)
            edge = beyond
            if found is not None and found < loss:
                loss, best = found, beyond
    return best
