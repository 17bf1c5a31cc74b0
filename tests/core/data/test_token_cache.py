"""Tokenised files on disk: in little memory, bounded, and never half there."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from olora_core.data.example_files import DamagedExamples, ExampleWriter, open_examples
from olora_core.data.token_cache import KEPT_SECONDS, keep, new_entry, trim

MIB = 2**20
GROWTH = """
import sys
from pathlib import Path
from transformers import AutoTokenizer
from olora_core.training.data import Reading, read_file
from olora_core.progress import result_of

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

folder = Path(sys.argv[1])
how = Reading("supervised", AutoTokenizer.from_pretrained(folder / "tokenizer"), 512, frozenset({0}), 2**31)
result_of(read_file(folder / "small.jsonl", "training", how, folder / "cache"))  # fills what there is
before = peak()
read = result_of(read_file(folder / "large.jsonl", "training", how, folder / "cache"))
grown = peak() - before
again = result_of(read_file(folder / "large.jsonl", "training", how, folder / "cache"))
reopened = peak() - before
held = [(folder / "large.jsonl").read_bytes() for _ in range(3)]
print(len(read.examples), len(read.examples.tokens), grown, reopened, peak() - before)
"""


def write_word_tokenizer(folder: Path) -> None:
    """A token for each word: as quick as a tokenizer can be."""
    words = ["<|end|>", "user", "assistant", *map(str, range(10)), *(f"word{i:04}" for i in range(2000))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<|end|>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        chat_template="{% for m in messages %}{{ m.role + ' ' + m.content + ' <|end|> ' }}{% endfor %}",
    ).save_pretrained(folder)


def write_conversations(path: Path, size: int) -> int:
    """Different conversations of 2.7 kB each. Returns how many."""
    random, count = np.random.default_rng(0), 0
    words = np.array([f"word{i:04}" for i in range(2000)])
    with path.open("w") as file:
        while file.tell() < size:
            asked, said = words[random.integers(0, 2000, (2, 150))]
            question = {"role": "user", "content": " ".join([*str(count), *asked])}
            answer = {"role": "assistant", "content": " ".join(said)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
            count += 1
    return count


@pytest.mark.slow
def test_a_large_file_is_checked_and_tokenised_in_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    """40 MB, in less than 16 MB more than the first 8 MB of such rows took.

    That the measure would see the file in memory is shown at the end by holding it.
    """
    write_word_tokenizer(tmp_path / "tokenizer")
    write_conversations(tmp_path / "small.jsonl", 8 * MIB)
    rows = write_conversations(tmp_path / "large.jsonl", 40 * MIB)
    done = subprocess.run(
        [sys.executable, "-c", GROWTH, str(tmp_path)],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        check=True,
    )
    examples, tokens, grown, reopened, held = map(int, done.stdout.split())
    assert (examples, tokens > 300 * rows) == (rows, True)
    assert grown < 16 * MIB
    assert reopened < 16 * MIB
    assert held > 80 * MIB


@pytest.mark.parametrize(("vocabulary", "kind"), [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_tokens_are_as_wide_as_the_vocabulary(tmp_path: Path, vocabulary: int, kind: type) -> None:
    last, mask = vocabulary - 1, np.array([False, True])
    with ExampleWriter(tmp_path, vocabulary) as writer:
        writer.add(3, [(np.array([0, last]), mask)])
        writer.finish(writer.examples(), {"said": 1})
    examples, about = open_examples(tmp_path)
    assert (examples.tokens.dtype, about) == (kind, {"said": 1})
    assert examples.row(0)[0].tolist() == [0, last]
    assert (tmp_path / "tokens").stat().st_size == 2 * np.dtype(kind).itemsize


def test_what_was_not_finished_is_not_opened(tmp_path: Path) -> None:
    with ExampleWriter(tmp_path, 10) as writer:
        writer.add(1, [(np.array([1, 2]), np.array([False, True]))])
        writer.examples()
    with pytest.raises(DamagedExamples):
        open_examples(tmp_path)


def entry(cache: Path, name: str, size: int, age: float = 0.0) -> Path:
    with new_entry(cache) as folder:
        (folder / "tokens").write_bytes(bytes(size))
        keep(folder, cache / name)
    os.utime(cache / name, (time.time() - age,) * 2)
    return cache / name


def names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir())


def test_the_least_recently_used_go_first(tmp_path: Path) -> None:
    caches = [tmp_path / "a", tmp_path / "b"]
    for name, age in (("oldest", 30), ("older", 20)):
        entry(caches[0], name, 1000, age)
    entry(caches[1], "newest", 1000, 10)
    trim([*caches, tmp_path / "none"], limit_bytes=3000)
    assert (names(caches[0]), names(caches[1])) == (["older", "oldest"], ["newest"])
    trim(caches, limit_bytes=2500)
    assert (names(caches[0]), names(caches[1])) == (["older"], ["newest"])
    trim(caches, limit_bytes=999)
    assert names(caches[0]) + names(caches[1]) == []


def test_what_nobody_uses_for_a_week_goes(tmp_path: Path) -> None:
    entry(tmp_path, "forgotten", 10, KEPT_SECONDS + 60)
    entry(tmp_path, "known", 10, KEPT_SECONDS - 60)
    trim([tmp_path])
    assert names(tmp_path) == ["known"]


def test_a_finished_folder_replaces_what_was_there(tmp_path: Path) -> None:
    entry(tmp_path, "a", 10)
    assert (entry(tmp_path, "a", 20) / "tokens").stat().st_size == 20
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["tokens"]


def test_work_that_died_is_removed_and_work_in_progress_is_not(tmp_path: Path) -> None:
    program = (
        "import sys, os; from pathlib import Path; from olora_core.data.token_cache import new_entry\n"
        "with new_entry(Path(sys.argv[1])) as folder:\n    print(folder, flush=True)\n"
        "    sys.stdin.read(); os._exit(1)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[3],
    ) as worker:
        assert worker.stdout is not None
        folder = Path(worker.stdout.readline().strip())
        assert trim([tmp_path]) == []
        worker.communicate("")
    assert folder.is_dir()
    assert trim([tmp_path]) == [folder]
    assert names(tmp_path) == []


def test_a_folder_whose_lock_is_being_made_or_removed_is_let_be(tmp_path: Path) -> None:
    with new_entry(tmp_path) as folder:
        (folder / "lock").unlink()
        assert trim([tmp_path]) == []
        assert folder.is_dir()
