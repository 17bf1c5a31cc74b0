"""Examples in a folder: written row by row, read as memory-mapped arrays, and verified by checksums."""

import hashlib
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np

from .examples import CHUNK, Examples, Rows, digest_of, fingerprint, is_weighted

ABOUT = "about.json"
KINDS = {
    "trained": np.dtype(bool),
    "offsets": np.dtype(np.int64),
    "lines": np.dtype(np.int64),
    "trained_counts": np.dtype(np.int64),
    "prints": np.dtype(np.uint64),
}
"""Dtype of each file besides "tokens", which is uint16 or uint32 depending on the vocabulary."""
WEIGHTS, WEIGHTS_KIND = "weights", np.dtype(np.float32)
"""The file of `Examples.token_weights`, which only folders with a weighted token have."""


class DamagedExamples(Exception):
    """The folder's files are missing or not the ones that were written."""


class ExampleWriter:
    """Appends examples to the files of a folder; holds 32 bytes per row in memory."""

    def __init__(self, folder: Path, vocabulary: int) -> None:
        self.folder = folder
        self.rows_per_example = 1
        self.kind = np.dtype(np.uint16 if vocabulary <= 2**16 else np.uint32)
        self._tokens = (folder / "tokens").open("wb")
        self._trained = (folder / "trained").open("wb")
        self._weights: BinaryIO | None = None
        """Open from the first weighted row on."""
        self._lengths, self._counts = array("q"), array("q")
        self._lines, self._fingerprints = array("q"), array("Q")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            file.close()

    @property
    def _files(self) -> list[BinaryIO]:
        return [file for file in (self._tokens, self._trained, self._weights) if file is not None]

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, line: int, rows: Rows) -> None:
        """Appends the example of that line; every example must have the same number of rows."""
        self.rows_per_example = len(rows)
        self._lines.append(line)
        self._fingerprints.append(fingerprint(rows))
        for tokens, trained in rows:
            if self._weights is None and is_weighted(trained):
                self._weights = self._begin_weights()
            if self._weights is not None:
                self._weights.write(trained.astype(WEIGHTS_KIND).data)
            is_trained = trained.astype(bool, copy=False)
            self._tokens.write(tokens.astype(self.kind).data)
            self._trained.write(is_trained.data)
            self._lengths.append(len(tokens))
            self._counts.append(int(is_trained.sum()))

    def _begin_weights(self) -> BinaryIO:
        """The file of weights, with 0 and 1 for the rows written so far."""
        self._trained.flush()
        file = (self.folder / WEIGHTS).open("wb")
        for chunk in _read(self.folder / "trained", KINDS["trained"]):
            file.write(chunk.astype(WEIGHTS_KIND).data)
        return file

    def examples(self) -> Examples:
        """The examples written so far, mapped from the files, which may then be renamed or removed."""
        for file in self._files:
            file.flush()
        offsets = np.concatenate([[0], np.cumsum(self._lengths, dtype=np.int64)])
        weights = None if self._weights is None else self.folder / WEIGHTS
        return Examples(
            _mapped(self.folder / "tokens", self.kind),
            _mapped(self.folder / "trained", KINDS["trained"]),
            offsets,
            np.array(self._lines, dtype=np.int64),
            self.rows_per_example,
            np.array(self._counts, dtype=np.int64),
            np.array(self._fingerprints, dtype=np.uint64),
            # Read, not mapped: hashing a mapped array would make all its pages resident.
            digest_of(
                _read(self.folder / "tokens", self.kind),
                _read(self.folder / "trained", KINDS["trained"]),
                offsets,
                () if weights is None else _read(weights, WEIGHTS_KIND),
            ),
            None if weights is None else _mapped(weights, WEIGHTS_KIND),
        )

    def finish(self, examples: Examples, about: dict[str, Any]) -> None:
        """Writes the remaining arrays of `examples`, `about` (JSON-able) and the checksums of all files."""
        arrays = {
            "offsets": examples.offsets,
            "lines": examples.lines,
            "trained_counts": examples.trained_counts,
            "prints": examples.fingerprints,
        }
        for name, values in arrays.items():
            (self.folder / name).write_bytes(values.tobytes())
        files = ["tokens", *KINDS, *([WEIGHTS] if examples.token_weights is not None else [])]
        content = {
            "about": about,
            "sides": self.rows_per_example,
            "width": self.kind.itemsize,
            "digest": examples.digest,
            "files": {name: file_hash(self.folder / name) for name in files},
        }
        text = json.dumps(content)
        sealed = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "content": text}
        (self.folder / ABOUT).write_text(json.dumps(sealed), encoding="utf-8")


def open_examples(folder: Path) -> tuple[Examples, dict[str, Any]]:
    """The examples of a finished folder, and the `about` given to `finish`. Raises DamagedExamples."""
    try:
        sealed = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        if hashlib.sha256(sealed["content"].encode()).hexdigest() != sealed["sha256"]:
            raise DamagedExamples(ABOUT)
        content = json.loads(sealed["content"])
        for name, digest in content["files"].items():
            if file_hash(folder / name) != digest:
                raise DamagedExamples(name)
        kinds = {"tokens": np.dtype(f"uint{8 * content['width']}"), **KINDS}
        if WEIGHTS in content["files"]:
            kinds[WEIGHTS] = WEIGHTS_KIND
        arrays = {name: _mapped(folder / name, kind) for name, kind in kinds.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedExamples(str(error)) from None
    examples = Examples(
        *(arrays[name] for name in ("tokens", "trained", "offsets", "lines")),
        content["sides"],
        arrays["trained_counts"],
        arrays["prints"],
        content["digest"],
        arrays.get(WEIGHTS),
    )
    return examples, content["about"]


def file_hash(path: Path) -> str:
    """SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mapped(path: Path, kind: np.dtype) -> np.ndarray:
    # As a plain ndarray: slicing an np.memmap is ten times slower.
    return np.asarray(np.memmap(path, dtype=kind, mode="r"))


def _read(path: Path, kind: np.dtype) -> Iterator[np.ndarray]:
    with path.open("rb") as file:
        while len(chunk := np.fromfile(file, dtype=kind, count=CHUNK)):
            yield chunk
