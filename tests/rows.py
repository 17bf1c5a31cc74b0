"""Rows of training files, and files of them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def chat(question: str, answer: str) -> Row:
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


def preference(question: str, preferred: str, other: str) -> Row:
    return {
        "input": {"messages": [{"role": "user", "content": question}]},
        "preferred_output": [{"role": "assistant", "content": preferred}],
        "non_preferred_output": [{"role": "assistant", "content": other}],
    }


def chat_row(number: int = 0) -> Row:
    """A row whose answer can be learned: the number after the one asked about."""
    return chat(f"What follows {number}?", f"{number + 1} follows {number}.")


def completion_row(number: int = 0) -> Row:
    return {"prompt": f"{number} is", "completion": " a number"}


def uneven_chat(number: int) -> Row:
    """Rows of different lengths, so that padding and cutting matter."""
    i = number
    return chat("ab"[i % 2] * (1 + 3 * i % 7), "xyz"[i % 3] * (2 + 5 * i % 9))


def uneven_preference(number: int) -> Row:
    """The same question and answer, and another answer."""
    i = number
    return preference(
        "ab"[i % 2] * (1 + 3 * i % 7), "xyz"[i % 3] * (2 + 5 * i % 9), "pqr"[i % 3] * (1 + 4 * i % 11)
    )


def jsonl(*rows: Any) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chat_file(rows: int = 12, first: int = 0) -> bytes:
    return jsonl(*map(chat_row, range(first, first + rows)))


def completion_file(rows: int = 12) -> bytes:
    return jsonl(*map(completion_row, range(rows)))


def write_rows(path: Path, rows: Iterable[Any]) -> Path:
    path.write_bytes(jsonl(*rows))
    return path
