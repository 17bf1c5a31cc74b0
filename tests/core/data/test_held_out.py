"""The validation share: whole groups of rows, near the share, the same for the same seed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olora_core.data.examples import Examples
from olora_core.data.held_out import Split, group_draws, split
from olora_core.errors import DataError
from olora_core.progress import Phase, result_of

from ..formats.test_containers import WRITERS


def examples_of(rows: list[list[int]], lines: list[int] | None = None) -> Examples:
    """Examples of these tokens, of which all but the first are trained."""
    trained = [[False] + [True] * (len(row) - 1) for row in rows]
    return Examples(
        np.concatenate(rows).astype(np.uint32),
        np.concatenate(trained),
        np.cumsum([0, *map(len, rows)]),
        np.array(range(1, len(rows) + 1) if lines is None else lines),
    )


def different(count: int) -> list[list[int]]:
    return [[1, i // 100, i % 100] for i in range(count)]


def draws_of(values: list[Any], seed: int, folder: Path) -> dict[int, int]:
    path = folder / "rows.jsonl"
    rows = [{"text": "t"} | ({} if value is None else {"user": value}) for value in values]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return result_of(group_draws(path, "user", seed, len(rows)))


def is_a_partition(parts: Split, examples: Examples) -> bool:
    both = [*parts.training.tolist(), *parts.validation.tolist()]
    return sorted(both) == list(range(len(examples)))


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 0.5, 0.9])
def test_the_share_of_different_rows_is_exact(share: float) -> None:
    examples = examples_of(different(200))
    parts = split(examples, share, 7, {})
    assert is_a_partition(parts, examples)
    assert len(parts.validation) == 200 * share
    assert parts.groups == 200
    assert parts.training.tolist() == sorted(parts.training.tolist())


def test_the_seed_alone_decides() -> None:
    examples = examples_of(different(100))
    of_seeds = [split(examples, 0.2, seed, {}).validation.tolist() for seed in (1, 2, 1)]
    assert of_seeds[0] == of_seeds[2] != of_seeds[1]
    # Rows from all over the file: the mean of 20 of 0…99 drawn evenly is 49.5 ± 5.8.
    assert 30 < np.mean(of_seeds[0]) < 70


def test_the_order_of_the_rows_does_not_matter() -> None:
    rows = different(100)
    order = np.random.default_rng(0).permutation(100)
    here = split(examples_of(rows), 0.2, 3, {}).validation
    there = split(examples_of([rows[i] for i in order]), 0.2, 3, {}).validation
    assert sorted(order[there].tolist()) == here.tolist()


def test_another_row_moves_hardly_any_other() -> None:
    rows = different(100)
    before = set(split(examples_of(rows), 0.2, 3, {}).validation.tolist())
    after = set(split(examples_of([*rows, [1, 99, 99]]), 0.2, 3, {}).validation.tolist())
    assert len(before ^ after) <= 2


def test_rows_with_the_same_tokens_are_on_one_side() -> None:
    rows = [row for row in different(60) for _ in range(1 + row[2] % 3)]
    examples = examples_of(rows)
    parts = split(examples, 0.3, 1, {})
    assert is_a_partition(parts, examples)
    assert parts.groups == 60
    sides = [{tuple(rows[i]) for i in side} for side in (parts.training, parts.validation)]
    assert not sides[0] & sides[1]
    assert abs(len(parts.validation) - 0.3 * len(rows)) <= 2


def test_the_parts_of_a_long_text_are_on_one_side() -> None:
    lines = [line for line in range(1, 41) for _ in range(3)]
    examples = examples_of(different(120), lines)
    parts = split(examples, 0.25, 1, {})
    assert parts.groups == 40
    assert len(parts.validation) == 30
    of_sides = [set(examples.lines[side].tolist()) for side in (parts.training, parts.validation)]
    assert not of_sides[0] & of_sides[1]


def test_rows_with_one_key_are_on_one_side_and_others_for_themselves(tmp_path) -> None:
    users = [f"u{i % 12}" if i % 4 else None for i in range(120)]  # 9 users of 10 rows, 30 rows without
    examples = examples_of(different(120))
    parts = split(examples, 0.3, 5, draws_of(users, 5, tmp_path))
    assert is_a_partition(parts, examples)
    assert parts.groups == 9 + 30
    of_sides = [{users[i] for i in side} - {None} for side in (parts.training, parts.validation)]
    assert not of_sides[0] & of_sides[1]
    assert {users[i] for i in parts.validation} != {None}
    assert len(parts.validation) == 36


def test_equal_rows_of_two_users_join_their_groups(tmp_path) -> None:
    users = ["a", "a", "b", "b", "c", "d"]
    rows = different(6)
    rows[2] = rows[1]  # a's and b's
    parts = split(examples_of(rows), 0.5, 5, draws_of(users, 5, tmp_path))
    assert parts.groups == 3
    held = set(parts.validation.tolist())
    assert held & {0, 1, 2, 3} in (set(), {0, 1, 2, 3})


def test_a_group_far_larger_than_the_share_is_trained_on(tmp_path) -> None:
    users = ["whale"] * 90 + [f"u{i}" for i in range(10)]
    for seed in range(20):
        parts = split(examples_of(different(100)), 0.05, seed, draws_of(users, seed, tmp_path))
        assert len(parts.validation) == 5
        assert parts.validation.min() >= 90


@pytest.mark.parametrize(("share", "held"), [(0.01, 1), (0.999, 4)])
def test_both_sides_have_an_example(share: float, held: int) -> None:
    assert len(split(examples_of(different(5)), share, 1, {}).validation) == held


def test_the_smaller_of_two_large_groups_is_held_out(tmp_path) -> None:
    users = ["a"] * 7 + ["b"] * 3
    parts = split(examples_of(different(10)), 0.1, 1, draws_of(users, 1, tmp_path))
    assert parts.validation.tolist() == [7, 8, 9]


def test_what_cannot_be_split_is_refused(tmp_path) -> None:
    with pytest.raises(DataError, match="only one usable example") as caught:
        split(examples_of([[1, 2]]), 0.5, 1, {})
    assert caught.value.param == "validation_share"
    with pytest.raises(DataError, match="all 3 usable examples of the training file belong together"):
        split(examples_of([[1, 2]] * 3), 0.5, 1, {})
    with pytest.raises(DataError, match="by the value of group_by"):
        split(examples_of(different(3)), 0.5, 1, draws_of(["a", "a", "a"], 1, tmp_path))


@pytest.mark.parametrize("container", WRITERS)
def test_the_key_is_read_from_any_container(container: str, tmp_path) -> None:
    values = ["a", "b", None, "", "a"]
    rows = [
        {"prompt": "p", "completion": str(i)} | ({} if user is None else {"user": user})
        for i, user in enumerate(values)
    ]
    (tmp_path / "rows").write_bytes(WRITERS[container](rows))
    draws = result_of(group_draws(tmp_path / "rows", "user", 1, 5))
    lines = [2, 3, 6] if container == "csv" else [1, 2, 5]
    assert list(draws) == lines
    assert draws[lines[0]] == draws[lines[2]] != draws[lines[1]]


def test_values_of_another_type_are_other_values(tmp_path) -> None:
    draws = draws_of([1, "1", True, 1.5, [1], {"a": 1, "b": 2}, {"b": 2, "a": 1}, "é", 0], 1, tmp_path)
    assert len(draws) == 9
    assert len(set(draws.values())) == 8
    assert draws[6] == draws[7]


def test_another_seed_draws_the_keys_in_another_order(tmp_path) -> None:
    users = [f"u{i}" for i in range(50)]
    orders = [
        sorted(users, key=lambda user, seed=seed: draws_of(users, seed, tmp_path)[users.index(user) + 1])
        for seed in (1, 2)
    ]
    assert orders[0] != orders[1]


def test_a_key_that_no_row_has_is_named(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "t", "user": "a"}) + "\n")
    with pytest.raises(DataError, match=r"'usr': no row .* \(did you mean 'user'\?\)") as caught:
        result_of(group_draws(path, "usr", 1, 1))
    assert caught.value.param == "group_by"


def test_a_long_file_is_read_with_signs_of_life(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "t", "user": "a"}\n' * 25_000)
    phases = list(group_draws(path, "user", 1, 25_000))
    assert phases == [Phase("splitting", done, 25_000) for done in (10_000, 20_000)]
