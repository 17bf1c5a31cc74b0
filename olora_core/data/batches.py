"""Examples to micro-batches, in an order that (seed, epoch) determines."""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from ..seeds import seed_of
from .examples import Examples

IGNORED = -100
"""The label of a token without a loss, as in transformers and cross_entropy."""
PACK_MULTIPLE = 64
"""Packed rows are padded to a multiple of this many tokens, so that few lengths occur: in bf16 a CPU compiles
its matrix products anew for every length, which costs some milliseconds and half a megabyte each time."""


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass. A row is one sequence, or in a packed batch several end to end."""

    input_ids: Tensor
    """(rows, length) int64."""
    labels: Tensor
    """(rows, length) int64; IGNORED at prompt and padding tokens."""
    position_ids: Tensor | None
    """(1, length) int64 of a packed row: restarts at 0 with each sequence, 0 in the padding; None if every
    sequence has its own row."""
    positions: Tensor
    """(trained,) int64: which of the rows × length hidden states predict a trained token."""
    targets: Tensor
    """(trained,) int64: the trained tokens, in the order of `positions`."""
    lengths: tuple[int, ...]
    """Tokens of each sequence, in order."""
    trained_by_row: tuple[int, ...]
    """Trained tokens of each sequence, in order."""
    weight: float
    """Sum of the trained tokens' weights in the loss; their number (an int) if all weigh 1."""
    weights: Tensor | None = None
    """(trained,) fp32: the weight of each trained token; None if all weigh 1."""

    @property
    def tokens(self) -> int:
        """Tokens without padding."""
        return sum(self.lengths)

    @property
    def trained_tokens(self) -> int:
        return len(self.targets)

    @property
    def segments(self) -> tuple[int, ...]:
        """Lengths of a packed row's segments: its sequences, and the padding as one more."""
        padding = self.input_ids.shape[1] - self.tokens
        return (*self.lengths, padding) if padding else self.lengths

    @property
    def is_token(self) -> Tensor | None:
        """(rows, length) bool, False at padding; None if there is no padding."""
        rows, length = self.input_ids.shape
        if self.tokens == rows * length:
            return None
        ends = self.lengths if self.position_ids is None else (self.tokens,)
        lengths = torch.tensor(ends, device=self.input_ids.device)
        return torch.arange(length, device=lengths.device) < lengths[:, None]

    def to(self, device: torch.device) -> "MicroBatch":
        """The same batch with its tensors on `device`."""
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
    """Optimizer steps of one epoch; the last may have fewer examples."""
    return -(-examples // batch_size)


def micro_batches(
    examples: Examples, rows: np.ndarray, *, size: int, tokens: int, packing: bool, pad_token: int
) -> list[MicroBatch]:
    """Splits one optimizer batch into forward passes of at most `size` examples and `tokens` tokens.

    `rows` (batch,) int64 are the batch's indices into `examples`. Padding counts as tokens; an example longer
    than `tokens` has its own pass. The two rows of a preference pair stay in one pass, next to each other.
    A packed row is padded to a multiple of PACK_MULTIPLE, but not beyond `tokens`.
    """
    group = packed_groups if packing else padded_groups
    batches = []
    for part in group(examples, rows, size, tokens):
        members = [row for i in part for row in examples.example(int(i))]
        batches.append(_packed(members, pad_token, tokens) if packing else _padded(members, pad_token))
    return batches


def padded_groups(examples: Examples, rows: np.ndarray, size: int, tokens: int) -> list[list[int]]:
    """Groups of the indices `rows` (batch,), similar lengths together and the longest first.

    Sorting by length keeps the padding small: every row of a group is padded to its longest.
    """
    by_length = rows[np.argsort(-examples.lengths[rows], kind="stable")]
    groups: list[list[int]] = []
    for i in by_length.tolist():
        # How many rows as long as the group's first, its longest, fit into a pass.
        room = groups and tokens // (examples.rows_per_example * int(examples.lengths[groups[-1][0]]))
        if groups and len(groups[-1]) < min(size, room):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def packed_groups(examples: Examples, rows: np.ndarray, size: int, tokens: int) -> list[list[int]]:
    """Groups of the indices `rows` (batch,), each to be one packed row.

    Best fit decreasing, a greedy heuristic for bin packing: each example, the longest first, joins the
    fullest group that still has room for it.
    """
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
    """Each (tokens,) sequence in its own row, padded on the right.

    No attention mask is needed: attention is causal, so no token sees the padding after it.
    """
    longest = max(len(tokens) for tokens, _ in rows)
    input_ids = np.full((len(rows), longest), pad_token, dtype=np.int64)
    labels = np.full((len(rows), longest), IGNORED, dtype=np.int64)
    for i, (tokens, trained) in enumerate(rows):
        input_ids[i, : len(tokens)] = tokens
        labels[i, : len(tokens)] = np.where(trained, tokens.astype(np.int64), IGNORED)
    return _micro_batch(input_ids, labels, None, rows)


def _packed(rows: list[tuple[np.ndarray, np.ndarray]], pad_token: int, most: int) -> MicroBatch:
    """All sequences end to end in one row. Restarting positions tell transformers where a new one begins."""
    tokens = np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)
    trained = np.concatenate([trained for _, trained in rows])
    positions = np.concatenate([np.arange(len(tokens), dtype=np.int64) for tokens, _ in rows])
    labels = np.where(trained, tokens, IGNORED)
    padding = (0, max(0, min(-len(tokens) % PACK_MULTIPLE, most - len(tokens))))
    tokens = np.pad(tokens, padding, constant_values=pad_token)
    labels = np.pad(labels, padding, constant_values=IGNORED)
    return _micro_batch(tokens[None], labels[None], torch.from_numpy(np.pad(positions, padding))[None], rows)


def _micro_batch(
    input_ids: np.ndarray,
    labels: np.ndarray,
    position_ids: Tensor | None,
    rows: list[tuple[np.ndarray, np.ndarray]],
) -> MicroBatch:
    # On the CPU: on a GPU, nonzero() has to wait for the device to know the size of its result.
    trained = np.flatnonzero(labels != IGNORED)
    weights = None
    if any(of_row.dtype != bool for _, of_row in rows):
        # In the order of `trained`: both go through the sequences one after the other.
        weights = np.concatenate([of_row[of_row != 0].astype(np.float32) for _, of_row in rows])
    return MicroBatch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        position_ids,
        positions=torch.from_numpy(trained - 1),  # the hidden state before a token predicts it
        targets=torch.from_numpy(labels.reshape(-1)[trained]),
        lengths=tuple(len(tokens) for tokens, _ in rows),
        trained_by_row=tuple(int(np.count_nonzero(of_row)) for _, of_row in rows),
        weight=len(trained) if weights is None else float(weights.sum(dtype=np.float64)),
        weights=None if weights is None else torch.from_numpy(weights),
    )
