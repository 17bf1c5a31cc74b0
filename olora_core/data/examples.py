"""Tokenised examples: flat arrays with row offsets, in memory or memory-mapped.

Token j of a row is trained if the loss includes its prediction from tokens < j.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

Rows = list[tuple[np.ndarray, np.ndarray]]
"""One example: (tokens, trained) of each of its rows, both (length,).

`trained` is bool; or float32, the token's weight in the loss, 0 where it is not trained.
"""
CHUNK = 2**20
"""Tokens read or hashed at a time."""


@dataclass(frozen=True)
class Examples:
    """Tokenised examples of one row each, or of two: with the preferred answer, then with the other.

    Rows are stored end to end: row i is `offsets[i]:offsets[i + 1]`. The last three fields come from a token
    folder; without one they are computed when needed.
    """

    tokens: np.ndarray
    """(total,) uint16 or uint32."""
    trained: np.ndarray
    """(total,) bool; False for a row's first token, which nothing predicts."""
    offsets: np.ndarray
    """(rows + 1,) int64."""
    lines: np.ndarray
    """(examples,) int64: the line (or element, or row) of the file that each example comes from."""
    rows_per_example: int = 1
    """2 for preference pairs, otherwise 1."""
    trained_counts: np.ndarray | None = None
    """(rows,) int64: trained tokens of each row."""
    known_fingerprints: np.ndarray | None = None
    """(examples,) uint64: `fingerprint` of each example."""
    known_digest: str | None = None
    token_weights: np.ndarray | None = None
    """(total,) float32: each token's weight in the loss, 0 where it is not trained; None if all trained
    tokens weigh 1."""

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Row i: its tokens (length,) uint16 or uint32, and which are trained, (length,) bool, or float32 if
        one of its weights is neither 0 nor 1."""
        part = slice(self.offsets[i], self.offsets[i + 1])
        trained = self.trained[part]
        if self.token_weights is not None:
            weights = self.token_weights[part]
            trained = weights if is_weighted(weights) else trained
        return self.tokens[part], trained

    def example(self, i: int) -> Rows:
        """The rows of example i."""
        return [self.row(self.rows_per_example * i + side) for side in range(self.rows_per_example)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,) int64: tokens of each example's longest row."""
        return np.diff(self.offsets).reshape(-1, self.rows_per_example).max(axis=1)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """(examples,) int64: tokens of each example, all rows together."""
        return np.diff(self.offsets).reshape(-1, self.rows_per_example).sum(axis=1)

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """(examples,) int64: trained tokens of each example."""
        rows = self.trained_counts
        if rows is None:
            rows = np.add.reduceat(self.trained.astype(np.int64), self.offsets[:-1])
        return rows.reshape(-1, self.rows_per_example).sum(axis=1)

    @cached_property
    def counts(self) -> np.ndarray:
        """(examples,) int64: what a mean accuracy counts: the trained tokens, or 1 for a preference pair."""
        return self.trained_lengths if self.rows_per_example == 1 else np.ones(len(self), dtype=np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """(examples,) weight in a mean loss: `counts`, or the sum of the tokens' weights as float64."""
        if self.token_weights is None or self.rows_per_example != 1:
            return self.counts
        return np.add.reduceat(self.token_weights, self.offsets[:-1], dtype=np.float64)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the training data: tokens, mask, offsets and, if there are any, weights."""
        return self.known_digest or digest_of(
            _chunks(self.tokens),
            _chunks(self.trained),
            self.offsets,
            () if self.token_weights is None else _chunks(self.token_weights),
        )

    @cached_property
    def fingerprints(self) -> np.ndarray:
        """(examples,) uint64: equal for examples with the same tokens."""
        if self.known_fingerprints is not None:
            return self.known_fingerprints
        return np.array([fingerprint(self.example(i)) for i in range(len(self))], dtype=np.uint64)

    def first(self, examples: int) -> "Examples":
        """The first `examples` of them, as views."""
        kept = min(examples, len(self))
        rows = self.rows_per_example * kept
        end = self.offsets[rows]
        return Examples(
            self.tokens[:end],
            self.trained[:end],
            self.offsets[: rows + 1],
            self.lines[:kept],
            self.rows_per_example,
            None if self.trained_counts is None else self.trained_counts[:rows],
            None if self.known_fingerprints is None else self.known_fingerprints[:kept],
            token_weights=None if self.token_weights is None else self.token_weights[:end],
        )

    def select(self, which: np.ndarray) -> "Examples":
        """A copy of the examples at `which` (selected,) int64, in that order."""
        rows = (self.rows_per_example * which[:, None] + np.arange(self.rows_per_example)).ravel()
        parts = [slice(self.offsets[i], self.offsets[i + 1]) for i in rows.tolist()]

        def joined(values: np.ndarray) -> np.ndarray:
            return np.concatenate([values[part] for part in parts])

        return Examples(
            joined(self.tokens),
            joined(self.trained),
            np.concatenate([[0], np.cumsum(np.diff(self.offsets)[rows])]),
            self.lines[which],
            self.rows_per_example,
            None if self.trained_counts is None else self.trained_counts[rows],
            None if self.known_fingerprints is None else self.known_fingerprints[which],
            token_weights=None if self.token_weights is None else joined(self.token_weights),
        )


def is_weighted(trained: np.ndarray) -> bool:
    """Whether a row's `trained`, (length,) bool or float32, holds a weight that is neither 0 nor 1."""
    return trained.dtype != bool and bool(((trained != 0) & (trained != 1)).any())


def fingerprint(rows: Rows) -> int:
    """64-bit hash of an example's tokens. A file of a million rows has a collision with probability 3e-8."""
    hashed = hashlib.blake2b(digest_size=8)
    for tokens, _ in rows:
        hashed.update(len(tokens).to_bytes(8, "little") + tokens.astype(np.uint32).tobytes())
    return int.from_bytes(hashed.digest(), "little")


def digest_of(
    tokens: Iterable[np.ndarray],
    trained: Iterable[np.ndarray],
    offsets: np.ndarray,
    token_weights: Iterable[np.ndarray] = (),
) -> str:
    """SHA-256 in hex; independent of the tokens' integer width and of how the arrays are cut into chunks."""
    hashed = hashlib.sha256()
    for chunk in chain((part.astype(np.uint32) for part in tokens), trained, [offsets], token_weights):
        hashed.update(np.ascontiguousarray(chunk).data)
    return hashed.hexdigest()


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))
