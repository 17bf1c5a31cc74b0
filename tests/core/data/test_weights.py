"""Weights of tokens in the loss: written beside the tokens where there are any, and read again."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olora_core.data.batches import micro_batches
from olora_core.data.example_files import DamagedExamples, ExampleWriter, open_examples
from olora_core.data.examples import Examples, Rows

PLAIN = [
    (np.array([5, 6, 7]), np.array([False, True, True])),
    (np.array([8, 9]), np.array([False, True])),
]
WEIGHTED = [
    (np.array([5, 4, 3, 2]), np.array([0, 0.25, 0, 1], dtype=np.float32)),
    (np.array([7, 7, 7]), np.array([0, 1, 1], dtype=np.float32)),
    (np.array([1, 2]), np.array([0, 0.5], dtype=np.float32)),
]


def written(folder: Path, rows: list[Any]) -> Examples:
    """The examples of a folder, one row each, as a later run opens them."""
    folder.mkdir()
    with ExampleWriter(folder, 259) as writer:
        for line, row in enumerate(rows, 1):
            writer.add(line, [row])
        writer.finish(writer.examples(), {})
    return open_examples(folder)[0]


def rows_of(examples: Examples) -> Rows:
    return [examples.row(i) for i in range(len(examples))]


def assert_same_rows(found: Rows, expected: Rows) -> None:
    for (tokens, trained), (wanted_tokens, wanted) in zip(found, expected, strict=True):
        assert tokens.tolist() == wanted_tokens.tolist()
        assert (trained.dtype, trained.tolist()) == (wanted.dtype, wanted.tolist())


@pytest.mark.parametrize("rows", [WEIGHTED, [*PLAIN, *WEIGHTED], [*WEIGHTED, *PLAIN]])
def test_weights_are_read_as_they_were_written(tmp_path, rows) -> None:
    examples = written(tmp_path / "examples", rows)
    expected = [(tokens, trained.astype(np.float32)) for tokens, trained in rows]
    assert examples.token_weights.tolist() == np.concatenate([weights for _, weights in expected]).tolist()
    assert examples.token_weights.dtype == np.float32
    assert examples.trained.tolist() == (examples.token_weights != 0).tolist()
    # A row whose weights are all 0 or 1 is one with a mask.
    of_rows = [
        (tokens, weights if set(weights) - {0, 1} else weights.astype(bool)) for tokens, weights in expected
    ]
    assert_same_rows(rows_of(examples), of_rows)
    assert examples.weights.tolist() == [weights.sum() for _, weights in expected]
    assert examples.counts.tolist() == [np.count_nonzero(weights) for _, weights in expected]


def test_without_a_weight_nothing_is_written_that_was_not_before(tmp_path) -> None:
    whole = [(tokens, trained.astype(np.float32)) for tokens, trained in PLAIN]
    for name, rows in (("mask", PLAIN), ("whole weights", whole)):
        examples = written(tmp_path / name, rows)
        assert examples.token_weights is None
        assert_same_rows(rows_of(examples), PLAIN)
        assert examples.weights.dtype == np.int64
        assert not (tmp_path / name / "weights").exists()
        parts = [
            np.array([5, 6, 7, 8, 9], dtype=np.uint32),
            np.array([0, 1, 1, 0, 1], dtype=bool),
            np.array([0, 3, 5], dtype=np.int64),
        ]
        assert examples.digest == hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def test_other_weights_are_other_data_with_the_same_fingerprints(tmp_path) -> None:
    halves = [(tokens, (trained / 2).astype(np.float32)) for tokens, trained in PLAIN]
    quarters = [(tokens, (trained / 4).astype(np.float32)) for tokens, trained in PLAIN]
    made = [written(tmp_path / str(i), rows) for i, rows in enumerate((PLAIN, halves, quarters))]
    assert len({examples.digest for examples in made}) == 3
    assert len({tuple(examples.fingerprints.tolist()) for examples in made}) == 1


def test_parts_of_weighted_examples_keep_their_weights(tmp_path) -> None:
    examples = written(tmp_path / "examples", [*PLAIN, *WEIGHTED])
    everything = rows_of(examples)
    assert_same_rows(rows_of(examples.first(3)), everything[:3])
    taken = examples.select(np.array([4, 0, 2]))
    assert_same_rows(rows_of(taken), [everything[4], everything[0], everything[2]])
    assert taken.weights.tolist() == [0.5, 2, 1.25]
    in_memory = Examples(
        examples.tokens.copy(),
        examples.trained.copy(),
        examples.offsets,
        examples.lines,
        token_weights=examples.token_weights.copy(),
    )
    assert in_memory.digest == examples.digest
    assert in_memory.first(2).digest == examples.first(2).digest


@pytest.mark.parametrize("harm", ["change", "remove"])
def test_damaged_weights_are_found(tmp_path, harm) -> None:
    written(tmp_path / "examples", WEIGHTED)
    path = tmp_path / "examples" / "weights"
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(DamagedExamples):
        open_examples(tmp_path / "examples")


@pytest.mark.parametrize("packing", [False, True])
def test_a_pass_has_the_weights_of_its_trained_tokens(tmp_path, packing: bool) -> None:
    examples = written(tmp_path / "examples", [*PLAIN, *WEIGHTED])
    weight_of = {6: 1, 7: 1, 9: 1, 4: 0.25, 2: None}  # the token 2 is trained in two rows
    (batch,) = micro_batches(examples, np.arange(5), size=9, tokens=99, packing=packing, pad_token=0)
    pairs = list(zip(batch.targets.tolist(), batch.weights.tolist(), strict=True))
    assert sorted(weight for token, weight in pairs if token == 2) == [0.5, 1]
    assert all(weight == weight_of[token] for token, weight in pairs if token != 2)
    assert batch.weight == examples.weights.sum() == sum(weight for _, weight in pairs)
    assert batch.trained_tokens == sum(batch.trained_by_row) == examples.counts.sum()


def test_a_pass_without_weights_counts_its_tokens(tmp_path) -> None:
    examples = written(tmp_path / "examples", [*PLAIN, *WEIGHTED])
    (batch,) = micro_batches(examples, np.array([0, 3]), size=9, tokens=99, packing=False, pad_token=0)
    assert batch.weights is None
    assert batch.weight == batch.trained_tokens == 4
