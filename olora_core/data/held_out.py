"""The rows of a training file that are held out for validation: whole groups of them, drawn by the seed.

Rows with the same value of a chosen key, the same tokens or the same line (the parts of a long text) are one
group. Groups are drawn in the order of a hash of the seed and the value, or else the tokens, so that the
order of the rows does not matter.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import DataError
from ..formats import read_records
from ..progress import Phase
from ..seeds import seed_of
from ..specs import nearest
from .examples import Examples

ROWS_AT_ONCE = 10_000


@dataclass(frozen=True)
class Split:
    """Indices of a file's examples."""

    training: np.ndarray
    """(kept,) int64, rising."""
    validation: np.ndarray
    """(held out,) int64, rising."""
    groups: int
    """Number of groups that the examples form."""


def group_draws(
    path: Path, key: str, seed: int, rows: int, columns: Mapping[str, str] | None = None
) -> Generator[Phase, None, dict[int, int]]:
    """The place in the draw of each row whose `key` is not empty, by its line; yields progress.

    `rows` is the number of the file's rows; `columns` is its mapping of columns. Raises DataError if no row
    has the key.
    """
    draws: dict[int, int] = {}
    names: set[str] = set()
    for read, (line, record) in enumerate(read_records(path, columns, keep=key), 1):
        value = record.get(key)
        if value is not None and value != "":
            text = json.dumps(value, sort_keys=True, default=str)
            draws[line] = seed_of(f"validation/{seed}/key/{text}", bits=64)
        names = names or set(record)
        if read % ROWS_AT_ONCE == 0:
            yield Phase("splitting", read, max(read, rows))
    if not draws:
        raise DataError(
            f"group_by = '{key}': no row of the training file has that key{nearest(key, names)}. Name a key "
            "at the top level of the rows, or leave group_by out.",
            param="group_by",
        )
    return draws


def split(examples: Examples, share: float, seed: int, draws: Mapping[int, int]) -> Split:
    """Holds out groups of about `share` (between 0 and 1) of the examples.

    In the order of the draw, each group is taken that fits into what is left of the share, and then one more
    if that is nearer. `draws` is what `group_draws` returned, or empty. Raises DataError if all are one
    group.
    """
    prints = examples.fingerprints.tolist()
    places = [
        draws[line] if line in draws else seed_of(f"validation/{seed}/tokens/{print_}", bits=64)
        for line, print_ in zip(examples.lines.tolist(), prints, strict=True)
    ]
    joined = _joined(places, prints, examples.lines.tolist())
    _, group_of, sizes = np.unique(joined, return_inverse=True, return_counts=True)
    if len(sizes) < 2:
        raise _cannot_split(len(examples))
    first = np.full(len(sizes), 2**64 - 1, dtype=np.uint64)
    np.minimum.at(first, group_of, np.array(places, dtype=np.uint64))
    order = np.argsort(first, kind="stable")
    is_held_out = np.zeros(len(sizes), dtype=bool)
    is_held_out[order[_nearest(sizes[order], share * len(examples))]] = True
    of_examples = is_held_out[group_of]
    return Split(np.flatnonzero(~of_examples), np.flatnonzero(of_examples), len(sizes))


def _joined(*labels: Sequence[int]) -> np.ndarray:
    """(examples,) int64: the same number for examples with an equal label of some kind, directly or through
    others.

    `labels` are of one kind each, with one for each example.
    """
    parents = list(range(len(labels[0])))

    def root(i: int) -> int:
        while parents[i] != i:
            parents[i] = parents[parents[i]]
            i = parents[i]
        return i

    for of_kind in labels:
        first: dict[int, int] = {}
        for i, label in enumerate(of_kind):
            parents[root(i)] = root(first.setdefault(label, i))
    return np.array([root(i) for i in range(len(parents))], dtype=np.int64)


def _nearest(sizes: np.ndarray, target: float) -> list[int]:
    """Positions of the groups to hold out, given their `sizes` (groups,) in the order of the draw; never none
    and never all."""
    chosen, left = [], target
    for i, size in enumerate(sizes.tolist()):
        if size <= left:
            chosen.append(i)
            left -= size
    rest = np.delete(np.arange(len(sizes)), chosen)
    smallest = int(rest[np.argmin(sizes[rest])])
    is_nearer = abs(left - sizes[smallest]) < left
    if not chosen or (is_nearer and len(rest) > 1):
        chosen.append(smallest)
    return chosen


def _cannot_split(examples: int) -> DataError:
    what = (
        "the training file has only one usable example"
        if examples == 1
        else f"all {examples} usable examples of the training file belong together, by the value of group_by "
        "or because they have the same tokens"
    )
    return DataError(
        f"validation_share: {what}, so that none can be held out. Add other rows, or pass a validation file "
        "instead.",
        param="validation_share",
    )
