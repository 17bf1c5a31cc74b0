"""Tokenised examples: flat arrays in which any row is found at once, in memory or mapped from files.

Token j of a row counts as trained when the model is asked to predict it from tokens < j.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import numpy as np

Rows = list[tuple[np.ndarray, np.ndarray]]
"""(tokens, trained) of each row of one example."""
CHUNK = 2**20


@dataclass(frozen=True)
class Examples:
    """Tokenised examples of one row each, or of two: the better answer's, then the worse one's.

    Rows are laid end to end. Row i is `offsets[i]:offsets[i + 1]`. The last three are known from files, and
    found out where they are asked for otherwise.
    """

    tokens: np.ndarray
    """(total,) uint16 or uint32."""
    trained: np.ndarray
    """(total,) bool; never true for a row's first token, which nothing predicts."""
    offsets: np.ndarray
    """(rows + 1,) int64."""
    lines: np.ndarray
    """(examples,) int64, the line of the file (or element, or row) that each example comes from."""
    rows_per_example: int = 1
    """Rows of an example: 2 where one answer is preferred to another."""
    trained_counts: np.ndarray | None = None
    """(rows,) int64, trained tokens of each."""
    known_fingerprints: np.ndarray | None = None
    """(examples,) uint64, `fingerprint` of each."""
    known_digest: str | None = None

    def __len__(self) -> int:
        return len(self.lines)

    def row(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        part = slice(self.offsets[i], self.offsets[i + 1])
        return self.tokens[part], self.trained[part]

    def example(self, i: int) -> Rows:
        """Its rows."""
        return [self.row(self.rows_per_example * i + side) for side in range(self.rows_per_example)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """(examples,) tokens of the longest row."""
        return np.diff(self.offsets).reshape(-1, self.rows_per_example).max(axis=1)

    @cached_property
    def row_tokens(self) -> np.ndarray:
        """(examples,) tokens of all of its rows."""
        return np.diff(self.offsets).reshape(-1, self.rows_per_example).sum(axis=1)

    @cached_property
    def trained_lengths(self) -> np.ndarray:
        """(examples,) number of trained tokens."""
        rows = self.trained_counts
        if rows is None:
            rows = np.add.reduceat(self.trained.astype(np.int64), self.offsets[:-1])
        return rows.reshape(-1, self.rows_per_example).sum(axis=1)

    @cached_property
    def weights(self) -> np.ndarray:
        """(examples,) what each counts in a mean loss: its trained tokens, or one for a pair."""
        return self.trained_lengths if self.rows_per_example == 1 else np.ones(len(self), dtype=np.int64)

    @cached_property
    def digest(self) -> str:
        """sha256 of what is trained on: the tokens, the mask and where rows end."""
        return self.known_digest or digest_of(_pieces(self.tokens), _pieces(self.trained), self.offsets)

    @cached_property
    def fingerprints(self) -> np.ndarray:
        """(examples,) uint64, the same for the same tokens."""
        if self.known_fingerprints is not None:
            return self.known_fingerprints
        return np.array([fingerprint(self.example(i)) for i in range(len(self))], dtype=np.uint64)

    def first(self, examples: int) -> "Examples":
        """The first examples alone."""
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
        )

    def select(self, which: np.ndarray) -> "Examples":
        """These examples alone, in this order, copied."""
        rows = (self.rows_per_example * which[:, None] + np.arange(self.rows_per_example)).ravel()
        parts = [self.row(i) for i in rows.tolist()]
        return Examples(
            np.concatenate([tokens for tokens, _ in parts]),
            np.concatenate([trained for _, trained in parts]),
            np.concatenate([[0], np.cumsum([len(tokens) for tokens, _ in parts], dtype=np.int64)]),
            self.lines[which],
            self.rows_per_example,
            None if self.trained_counts is None else self.trained_counts[rows],
            None if self.known_fingerprints is None else self.known_fingerprints[which],
        )


def fingerprint(rows: Rows) -> int:
    """64 bits of an example's tokens. Two among a million share theirs once in 30 million files."""
    hashed = hashlib.blake2b(digest_size=8)
    for tokens, _ in rows:
        hashed.update(len(tokens).to_bytes(8, "little") + tokens.astype(np.uint32).tobytes())
    return int.from_bytes(hashed.digest(), "little")


def digest_of(tokens: Iterable[np.ndarray], trained: Iterable[np.ndarray], offsets: np.ndarray) -> str:
    """The same whatever width tokens are kept in, and however they come in pieces."""
    hashed = hashlib.sha256()
    for piece in chain((part.astype(np.uint32) for part in tokens), trained, [offsets]):
        hashed.update(np.ascontiguousarray(piece).data)
    return hashed.hexdigest()


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + CHUNK] for start in range(0, len(array), CHUNK))
