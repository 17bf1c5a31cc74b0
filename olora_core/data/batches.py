"""Examples to micro-batches, in an order fixed by (seed, epoch)."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from ..seeds import seed_of
from .examples import Examples

IGNORED = -100
"""The label of a token that is not trained."""
WHOLE = 64
"""Packed rows are filled to a multiple of so many tokens. In bf16 a CPU compiles its matrix products anew for
every number of tokens, which takes some milliseconds and half a megabyte each time."""


@dataclass(frozen=True)
class MicroBatch:
    """What one forward pass sees."""

    input_ids: Tensor
    """(rows, length) int64."""
    labels: Tensor
    """(rows, length) int64; IGNORED where nothing is trained, so at every pad too."""
    position_ids: Tensor | None
    """(1, length) of a packed row, from 0 again at each example and 0 where it is only filled; None when each
    example has its own row."""
    positions: Tensor
    """(trained,) int64: which of the rows × length hidden states predict a trained token."""
    targets: Tensor
    """(trained,) int64: those tokens."""
    lengths: tuple[int, ...]
    """Tokens of each example's row, in their order."""
    trained_by_row: tuple[int, ...]
    """How many of those belong to each example's row, in their order."""

    @property
    def tokens(self) -> int:
        """Without padding."""
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)

    @property
    def segments(self) -> tuple[int, ...]:
        """Of a packed row: the lengths, and what it is filled with."""
        filling = self.input_ids.shape[1] - self.tokens
        return (*self.lengths, filling) if filling else self.lengths

    @property
    def is_token(self) -> Tensor | None:
        """(rows, length) bool: whether a token stands there, not padding; None where nothing is padded."""
        rows, length = self.input_ids.shape
        if self.tokens == rows * length:
            return None
        ends = self.lengths if self.position_ids is None else (self.tokens,)
        lengths = torch.tensor(ends, device=self.input_ids.device)
        return torch.arange(length, device=lengths.device) < lengths[:, None]

    def to(self, device: torch.device) -> "MicroBatch":
        moved = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def epoch_order(examples: int, *, seed: int, epoch: int) -> np.ndarray:
    """(examples,) the order of one pass over the data; a function of its arguments alone."""
    generator = torch.Generator().manual_seed(seed_of(f"order/{seed}/{epoch}"))
    return torch.randperm(examples, generator=generator).numpy()


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def micro_batches(
    examples: Examples, rows: np.ndarray, *, size: int, tokens: int, packing: bool, pad_token: int
) -> list[MicroBatch]:
    """Splits one optimizer batch into forward passes of at most `size` examples and `tokens` tokens.

    Padding counts as tokens; an example longer than `tokens` has a pass of its own. The rows of an example
    stay together, one after the other. A packed row is filled to a WHOLE, within `tokens`.
    """
    group = packed_groups if packing else padded_groups
    batches = []
    for part in group(examples, rows, size, tokens):
        members = [row for i in part for row in examples.example(int(i))]
        batches.append(_packed(members, pad_token, tokens) if packing else _padded(members, pad_token))
    return batches


def padded_groups(examples: Examples, rows: np.ndarray, size: int, tokens: int) -> list[list[int]]:
    """Examples of similar length together, the longest first."""
    by_length = rows[np.argsort(-examples.lengths[rows], kind="stable")]
    groups: list[list[int]] = []
    for i in by_length.tolist():
        # The first of a group is its longest, which all others are padded to.
        room = groups and tokens // (examples.sides * int(examples.lengths[groups[-1][0]]))
        if groups and len(groups[-1]) < min(size, room):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def packed_groups(examples: Examples, rows: np.ndarray, size: int, tokens: int) -> list[list[int]]:
    """Best fit, decreasing: each example, the longest first, joins the fullest row that still holds it."""
    lengths = examples.row_tokens[rows]
    groups: list[list[int]] = []
    free: list[int] = []
    for position in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[position])
        fits = [g for g, left in enumerate(free) if left >= length and len(groups[g]) < size]
        if fits:
            best = min(fits, key=free.__getitem__)
            groups[best].append(int(rows[position]))
            free[best] -= length
        else:
            groups.append([int(rows[position])])
            free.append(tokens - length)
    return groups


def _padded(rows: list[tuple[np.ndarray, np.ndarray]], pad_token: int) -> MicroBatch:
    """Each row on its own, padded on the right.

    No attention mask is needed: attention is causal, so no token sees the pads behind it.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = np.full((len(rows), longest), pad_token, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for i, (tokens, trained) in enumerate(rows):
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = np.where(trained, tokens.astype(np.int64), IGNORED)
    return _micro_batch(input_ids, labels, None, rows)


def _packed(rows: list[tuple[np.ndarray, np.ndarray]], pad_token: int, most: int) -> MicroBatch:
    """All rows end to end. Positions that start again tell transformers where attention must not cross."""
    tokens = np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)
    trained = np.concatenate([trained for _, trained in rows])
    positions = np.concatenate([np.arange(len(tokens), dtype=np.int64) for tokens, _ in rows])
    labels = np.where(trained, tokens, IGNORED)
    filling = (0, max(0, min(-len(tokens) % WHOLE, most - len(tokens))))
    filled = np.pad(tokens, filling, constant_values=pad_token)
    labels = np.pad(labels, filling, constant_values=IGNORED)
    return _micro_batch(filled[None], labels[None], torch.from_numpy(np.pad(positions, filling))[None], rows)


def _micro_batch(
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: Tensor | None,
    rows: list[tuple[np.ndarray, np.ndarray]],
) -> MicroBatch:
    # Found here and not on the device, which would have to wait for the count.
    trained = np.flatnonzero(labels != IGNORED)
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        position_ids,
        positions=torch.from_numpy(trained - 1),
        targets=torch.from_numpy(labels.reshape(-1)[trained]),
        lengths=tuple(len(tokens) for tokens, _ in rows),
        trained_by_row=tuple(int(trained.sum()) for _, trained in rows),
    )
