"""The search for a method's learning rate: successive halving, judged on rows held out of the training rows.

Each rung trains the rates that are left for a share of the steps, with a complete schedule of its own, and
keeps the better half; the last two train in full (Jamieson and Talwalkar, arXiv 1502.07943). So a
search over five rates costs less than five full runs, and no method is compared at a rate that suits another.
"""

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import DataError
from ..seeds import seed_of
from ..specs.methods.base import MAX_LEARNING_RATE

FACTORS = (0.1, 0.32, 1.0, 3.2, 10.0)
"""Of the method's own rate: half decades around it."""
BELOW, ABOVE = (0.032, 0.01), (32.0, 100.0)
"""Where the grid goes on if its edge is the best, nearest first."""
SHARES = (0.25, 0.5)
"""Of the steps, that the first rung trains for, and those between it and the last."""
FEWEST_STEPS = 8
"""Of a rung, if the run has as many."""
FEWEST_ROWS, MOST_ROWS = 16, 512
"""Held out to judge by; never more than half of all."""


def held_out(examples: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which examples the search trains on, and which it is judged by; rising, drawn by the seed alone."""
    if examples < 2:
        raise DataError(
            "A comparison needs at least two training rows: it holds some out to choose learning rates by."
        )
    count = min(max(FEWEST_ROWS, round(share * examples)), MOST_ROWS, examples // 2)
    order = np.random.default_rng(seed_of(f"search/{seed}", bits=64)).permutation(examples)
    return np.sort(order[count:]), np.sort(order[:count])


@dataclass(frozen=True)
class Grid:
    """The rates of one method, rising, and those by which the grid may be extended, nearest first."""

    rates: tuple[float, ...]
    below: tuple[float, ...] = ()
    above: tuple[float, ...] = ()


def grid_around(own_rate: float) -> Grid:
    """A method's own grid, within what may be asked for."""

    def times(factors: Sequence[float]) -> tuple[float, ...]:
        rates = (float(f"{own_rate * factor:.3g}") for factor in factors)
        return tuple(rate for rate in rates if 0 < rate <= MAX_LEARNING_RATE)

    return Grid(times(FACTORS), times(BELOW), times(ABOVE))


@dataclass(frozen=True)
class Rung:
    """Rates that are trained for the same number of steps, then judged together."""

    rates: tuple[float, ...]
    steps: int
    ahead: tuple[int, ...] = ()
    """Steps of each run that the search still plans after this rung."""
    extends: bool = False
    """Whether it reaches beyond the grid, since the best rate lay at its edge."""


Losses = Sequence[float | None]
"""Of a rung's rates, in their order; None for a run that diverged."""


def halving(grid: Grid, steps: int) -> Generator[Rung, Losses, float | None]:
    """Yields rungs, to be sent their losses; returns the best rate, or None where every run diverged.

    Of two equal losses the lower rate's is the better. A grid of one rate is not searched.
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
    """Short while more than two are left, unless a whole run is as short."""
    if len(left) <= 2:
        return Rung(left, steps)
    part = min(steps, max(FEWEST_STEPS, math.ceil(SHARES[0 if first else 1] * steps)))
    if part == steps:
        return Rung(left, steps)
    kept = max(2, math.ceil(len(left) / 2))
    after = next_rung(left[:kept], steps, first=False)
    return Rung(left, part, (after.steps,) * len(after.rates) + after.ahead)


def better(rates: tuple[float, ...], losses: Losses, keep: int) -> tuple[float, ...]:
    """The best of them, rising; those that diverged are out."""
    ranked = sorted((loss, rate) for rate, loss in zip(rates, losses, strict=True) if loss is not None)
    return tuple(sorted(rate for _, rate in ranked[:keep]))


def at_the_edge(
    grid: Grid, rates: tuple[float, ...], losses: Losses, steps: int
) -> Generator[Rung, Losses, float | None]:
    """The best of the last rung; while that is an edge of what was tried, one more rate beyond it."""
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
