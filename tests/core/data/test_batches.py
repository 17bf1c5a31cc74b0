"""How one optimizer batch is cut into passes."""

import numpy as np
import pytest

from olora_core.data.batches import micro_batches, packed_groups, padded_groups
from olora_core.data.examples import Examples

from ..training.test_losses import examples_of

DRAW = np.random.default_rng(0)
LENGTHS = np.exp(DRAW.uniform(np.log(32), np.log(512), 64)).astype(int).tolist()
EXAMPLES = examples_of(LENGTHS)
ALL = np.arange(len(LENGTHS))


@pytest.mark.parametrize("group", [padded_groups, packed_groups])
@pytest.mark.parametrize(("size", "tokens"), [(64, 2048), (4, 2048), (64, 600), (1, 16)])
def test_every_example_is_in_one_pass_and_no_pass_holds_too_much(group, size: int, tokens: int) -> None:
    groups = group(EXAMPLES, ALL, size, tokens)
    assert sorted(i for members in groups for i in members) == ALL.tolist()
    for members in groups:
        lengths = EXAMPLES.lengths[members]
        held = lengths.sum() if group is packed_groups else lengths.max() * len(members)
        assert len(members) <= size
        assert held <= tokens or len(members) == 1


def test_best_fit_decreasing_fills_the_rows() -> None:
    groups = packed_groups(EXAMPLES, ALL, 64, 2048)
    fewest = -(-sum(LENGTHS) // 2048)
    assert len(groups) == fewest


def test_an_example_joins_the_fullest_row_that_still_holds_it() -> None:
    """Rows of 10: 7 and 6 open two, 3 fits the first exactly, 4 the second."""
    assert packed_groups(examples_of([3, 7, 4, 6]), np.arange(4), 9, 10) == [[1, 0], [3, 2]]


def test_the_groups_are_the_same_every_time() -> None:
    assert packed_groups(EXAMPLES, ALL, 64, 1000) == packed_groups(EXAMPLES, ALL, 64, 1000)


@pytest.mark.parametrize("packing", [False, True])
def test_both_answers_of_a_pair_count_and_stay_together(packing: bool) -> None:
    single = examples_of([5, 9, 4, 4, 7, 8])
    pairs = Examples(single.tokens, single.trained, single.offsets, np.arange(3), 2)
    batches = micro_batches(pairs, np.arange(3), size=9, tokens=20, packing=packing, pad_token=0)
    found = [batch.lengths[i : i + 2] for batch in batches for i in range(0, len(batch.lengths), 2)]
    assert sorted(found) == [(4, 4), (5, 9), (7, 8)]
    assert all(batch.input_ids.numel() <= 20 for batch in batches)
