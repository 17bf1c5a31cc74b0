"""A run's files: tokenised once, and found again by the next run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from olora_core.bases.loading import Base
from olora_core.data.examples import Examples
from olora_core.data.token_cache import trim
from olora_core.errors import DataError
from olora_core.progress import Phase, result_of
from olora_core.training.data import Data, read_data

from ..data.test_tokenising import PLAIN_CHATML, chat
from ..runs import spec_for, write_rows

CHANGES: dict[str, Callable[[Base], object]] = {
    "template": lambda base: setattr(base.tokenizer, "chat_template", PLAIN_CHATML + " "),
    "end of sequence": lambda base: setattr(base.tokenizer, "eos_token", "<|pad|>"),
    "vocabulary": lambda base: base.tokenizer.add_tokens(["never said"]),
    "embedding": lambda base: base.model.resize_token_embeddings(300),
}
FILES = ("tokens", "trained", "offsets", "lines", "trained_counts", "prints", "about.json")


@pytest.fixture
def rows_file(tmp_path) -> Path:
    rows = [chat(("user", "q" * (5 * i % 7)), ("assistant", "a" * (1 + 3 * i % 11))) for i in range(300)]
    return write_rows(tmp_path / "rows.jsonl", rows)


def read(base: Base, rows_file: Path, cache: Path | None, **hyperparameters: Any) -> tuple[Data, list[Phase]]:
    steps, phases = read_data(spec_for(**hyperparameters), base, rows_file, None, cache), []
    while True:
        try:
            phases.append(next(steps))
        except StopIteration as end:
            return end.value, phases


def same(one: Examples, other: Examples) -> bool:
    names = (
        "tokens",
        "trained",
        "offsets",
        "lines",
        "lengths",
        "trained_lengths",
        "weights",
        "counts",
        "fingerprints",
    )
    return one.digest == other.digest and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in names
    )


def test_a_second_run_on_the_same_file_finds_it_tokenised(llama, rows_file, tmp_path) -> None:
    first, phases = read(llama, rows_file, tmp_path / "cache")
    assert {phase.name for phase in phases} == {"tokenising"}
    assert (phases[-1].done, phases[-1].total) == (300, 300)
    again, phases = read(llama, rows_file.rename(tmp_path / "renamed"), tmp_path / "cache")
    assert phases == []
    assert same(first.training, again.training)
    assert (again.hashes, again.notes) == (first.hashes, first.notes)
    assert again.training.tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        again.training.tokens[0] = 1


def test_what_is_mapped_is_what_it_would_be_in_memory(llama, rows_file, tmp_path) -> None:
    mapped = read(llama, rows_file, tmp_path / "cache")[0].training
    plain = Examples(mapped.tokens.astype(np.uint32), mapped.trained.copy(), mapped.offsets, mapped.lines)
    assert same(mapped, plain)
    assert same(mapped.first(7), plain.first(7))


def test_examples_outlive_the_folder_they_came_from(llama, rows_file, tmp_path) -> None:
    cache = tmp_path / "cache"
    data, _ = read(llama, rows_file, cache)
    before = data.training.row(5)[0].tolist()
    trim([cache], limit_bytes=0)
    assert list(cache.iterdir()) == []
    assert data.training.row(5)[0].tolist() == before
    assert same(data.training, read(llama, rows_file, None)[0].training)


@pytest.mark.parametrize("change", CHANGES)
def test_another_tokenizer_or_template_tokenises_anew(llama, rows_file, tmp_path, change) -> None:
    read(llama, rows_file, tmp_path / "cache")
    CHANGES[change](llama)
    assert read(llama, rows_file, tmp_path / "cache")[1] != []


def test_another_context_or_another_byte_tokenises_anew(llama, rows_file, tmp_path) -> None:
    cache = tmp_path / "cache"
    read(llama, rows_file, cache)
    data, phases = read(llama, rows_file, cache, context_length=24)
    assert phases != []
    assert data.training.lengths.max() == 24
    rows_file.write_bytes(rows_file.read_bytes() + b"\n")
    assert read(llama, rows_file, cache)[1] != []


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["change", "shorten", "empty", "remove"])
def test_a_damaged_file_is_made_anew(llama, rows_file, tmp_path, name, harm) -> None:
    cache = tmp_path / "cache"
    first, _ = read(llama, rows_file, cache)
    kept = [first.training.row(i)[0].tolist() for i in range(len(first.training))]
    (path,) = cache.glob(f"*/{name}")
    content = path.read_bytes()
    path.unlink()
    if harm != "remove":
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        path.write_bytes({"change": changed, "shorten": content[:-1], "empty": b""}[harm])
    again, phases = read(llama, rows_file, cache)
    assert phases != []
    assert [again.training.row(i)[0].tolist() for i in range(len(again.training))] == kept
    assert read(llama, rows_file, cache)[1] == []


def test_a_file_for_another_method_is_refused_from_the_cache_too(llama, rows_file, tmp_path) -> None:
    read(llama, rows_file, tmp_path / "cache")
    with pytest.raises(DataError, match="method dpo does not train on"):
        read(llama, rows_file, tmp_path / "cache", type="dpo")


def test_a_reading_that_is_left_leaves_nothing(llama, rows_file, tmp_path) -> None:
    steps = read_data(spec_for(), llama, rows_file, None, tmp_path / "cache")
    next(steps)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    steps.close()
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_long_file_is_checked_with_signs_of_life(llama, tmp_path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [{"text": f"{i}"} for i in range(2500)])
    phases = read(llama, path, None)[1]
    assert [phase.name for phase in phases[:3]] == ["checking", "checking", "tokenising"]
    assert phases[1].total == path.stat().st_size


def test_a_mapping_of_columns_is_part_of_how_a_file_is_read(llama, tmp_path) -> None:
    rows = [(f"q{i} ", f"a{i}", f"b{i}") for i in range(20)]
    named = write_rows(tmp_path / "named.jsonl", [{"prompt": q, "completion": a} for q, a, _ in rows])
    other = tmp_path / "other.csv"
    other.write_text("question,answer,other\n" + "".join(f"{q},{a},{b}\n" for q, a, b in rows))
    cache, spec = tmp_path / "cache", spec_for()

    def mapped(**columns: str) -> Examples:
        asked = spec.model_copy(update={"columns": columns})
        return result_of(read_data(asked, llama, other, None, cache)).training

    expected = result_of(read_data(spec, llama, named, None, None)).training
    assert mapped(prompt="question", completion="answer").digest == expected.digest
    assert mapped(prompt="question", completion="other").digest != expected.digest
    with pytest.raises(DataError, match="no column 'reply'"):
        mapped(prompt="question", completion="reply")
    with pytest.raises(DataError, match="found columns question, answer"):
        result_of(read_data(spec, llama, other, None, cache))
