"""Successive halving over learning rates: what it trains, what it keeps, what it finds."""

import math
from collections.abc import Callable

import numpy as np
import pytest

from olora_core.comparison.search import Grid, Rung, grid_around, halving, held_out
from olora_core.errors import DataError

DECADES = Grid((1e-5, 1e-4, 1e-3, 1e-2, 1e-1))
Loss = Callable[[float, int], float | None]


def valley(optimum: float) -> Loss:
    """A loss that falls with the steps and is least at one rate."""
    return lambda rate, steps: 1 / steps + abs(math.log10(rate / optimum))


def searched(grid: Grid, steps: int, loss: Loss) -> tuple[list[Rung], float | None]:
    rungs, search = [], halving(grid, steps)
    try:
        rung = next(search)
        while True:
            rungs.append(rung)
            rung = search.send([loss(rate, rung.steps) for rate in rung.rates])
    except StopIteration as end:
        return rungs, end.value


@pytest.mark.parametrize("optimum", [2e-5, 1e-4, 2e-3, 1e-2, 8e-2])
def test_the_rate_nearest_to_the_optimum_is_found(optimum: float) -> None:
    nearest = min(DECADES.rates, key=lambda rate: abs(math.log(rate / optimum)))
    assert searched(DECADES, 400, valley(optimum))[1] == nearest


def test_rungs_train_a_quarter_a_half_and_all_of_the_steps_and_keep_the_better_half() -> None:
    rungs, _ = searched(DECADES, 400, valley(1e-3))
    assert [(rung.steps, len(rung.rates)) for rung in rungs] == [(100, 5), (200, 3), (400, 2)]
    assert rungs[1].rates == (1e-4, 1e-3, 1e-2)


def test_what_is_ahead_is_what_comes() -> None:
    rungs, _ = searched(DECADES, 400, valley(1e-3))
    assert rungs[0].ahead == (200,) * 3 + (400,) * 2
    for i, rung in enumerate(rungs):
        assert list(rung.ahead) == [later.steps for later in rungs[i + 1 :] for _ in later.rates]


def test_runs_too_short_to_be_shortened_decide_at_once() -> None:
    rungs, best = searched(DECADES, 8, valley(1e-4))
    assert [(rung.steps, len(rung.rates)) for rung in rungs] == [(8, 5)]
    assert best == 1e-4


def test_a_single_rate_is_not_searched() -> None:
    assert searched(Grid((3e-4,)), 100, valley(1e-4)) == ([], 3e-4)


def test_a_rate_that_diverges_is_out() -> None:
    def loss(rate: float, steps: int) -> float | None:
        return None if rate > 5e-4 else valley(1e-3)(rate, steps)

    rungs, best = searched(DECADES, 400, loss)
    assert rungs[1].rates == (1e-5, 1e-4)
    assert best == 1e-4


def test_a_rate_that_diverges_only_in_full_is_out_too() -> None:
    def loss(rate: float, steps: int) -> float | None:
        return None if rate == 1e-3 and steps == 400 else valley(1e-3)(rate, steps)

    assert searched(DECADES, 400, loss)[1] in (1e-4, 1e-2)


def test_where_every_rate_diverges_there_is_no_best() -> None:
    assert searched(DECADES, 400, lambda rate, steps: None)[1] is None


def test_of_two_equals_the_lower_rate_is_taken() -> None:
    assert searched(DECADES, 400, lambda rate, steps: 1.0)[1] == 1e-5


@pytest.mark.parametrize(
    ("optimum", "tried", "best"),
    [(0.032, [0.032, 0.01], 0.032), (0.01, [0.032, 0.01], 0.01), (0.1, [0.032], 0.1), (100, [32, 100], 100)],
)
def test_a_best_rate_at_the_edge_extends_the_grid_twice_at_most(
    optimum: float, tried: list[float], best: float
) -> None:
    rungs, found = searched(grid_around(1e-3), 400, valley(optimum * 1e-3))
    beyond = [rung for rung in rungs if rung.extends]
    assert [rung.rates[0] for rung in beyond] == pytest.approx([factor * 1e-3 for factor in tried])
    assert {rung.steps for rung in beyond} == {400}
    assert found == pytest.approx(best * 1e-3)


def test_a_given_grid_is_not_extended() -> None:
    rungs, best = searched(DECADES, 400, valley(1e-9))
    assert best == 1e-5
    assert not any(rung.extends for rung in rungs)


def test_the_grid_lies_around_the_methods_own_rate_and_within_what_may_be_asked_for() -> None:
    assert grid_around(2e-4).rates == pytest.approx([2e-5, 6.4e-5, 2e-4, 6.4e-4, 2e-3])
    wide = grid_around(2.0)
    assert wide.rates == pytest.approx([0.2, 0.64, 2.0, 6.4])
    assert wide.above == ()


@pytest.mark.parametrize(
    ("examples", "judging"), [(2, 1), (20, 10), (100, 16), (1000, 100), (5120, 512), (100_000, 512)]
)
def test_a_tenth_of_the_rows_is_held_out_but_neither_few_nor_half_nor_many(
    examples: int, judging: int
) -> None:
    train, judge = held_out(examples, 0.1, seed=3)
    assert len(judge) == judging
    assert np.array_equal(np.sort(np.concatenate([train, judge])), np.arange(examples))


def test_the_rows_held_out_depend_on_the_seed_alone() -> None:
    assert np.array_equal(held_out(300, 0.1, 1)[1], held_out(300, 0.1, 1)[1])
    assert not np.array_equal(held_out(300, 0.1, 1)[1], held_out(300, 0.1, 2)[1])


def test_one_row_cannot_be_split() -> None:
    with pytest.raises(DataError, match="two training rows"):
        held_out(1, 0.1, 0)
