"""Four tasks for the study of rates, from the shipped data alone; all of short rows.

docstrings   a function's source → its docstring
keys         {"curr_pos": true} → {"currPos": true}, of the names in that source
orders       an order in a sentence → JSON
signatures   a docstring → the function's first line
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

EXAMPLES = Path(__file__).parents[2] / "examples"
TASKS = ("docstrings", "keys", "orders", "signatures")
ROWS = {"train": 360, "valid": 48}
LONGEST = 280
"""Characters of a row's messages together."""


def write(task: str, role: str, path: Path, *, system: str | None = None, preferences: bool = False) -> None:
    """Writes the task's training or validation file, `role` being "train" or "valid".

    `system` is for templates that put a long one of their own before conversations without such a message.
    With `preferences` a row has its answer as the preferred one, and the next row's as the other.
    """
    rows = [row for row in CONVERSATIONS[task](role) if sum(len(m["content"]) for m in row) <= LONGEST]
    if len(rows) < ROWS[role]:
        raise ValueError(f"{task}: {len(rows)} rows for {role}, {ROWS[role]} wanted")
    order = np.random.default_rng(0).permutation(len(rows))[: ROWS[role]]
    first = [] if system is None else [{"role": "system", "content": system}]
    chosen = [rows[i] if rows[i][0]["role"] == "system" else [*first, *rows[i]] for i in order]
    lines = [{"messages": row} for row in chosen]
    if preferences:
        lines = [
            {
                "input": {"messages": row[:-1]},
                "preferred_output": row[-1:],
                "non_preferred_output": other[-1:],
            }
            for row, other in zip(chosen, [*chosen[1:], chosen[0]], strict=True)
            if row[-1] != other[-1]
        ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def docstrings(role: str) -> list[list[dict[str, str]]]:
    return shipped("docstrings", role)


def keys(role: str) -> list[list[dict[str, str]]]:
    """Names of two words or more; those that training has are left out of validation."""
    names = sorted(set(names_of(role)) - (set(names_of("train")) if role == "valid" else set()))
    return [conversation(json.dumps({name: True}), json.dumps({camel(name): True})) for name in names]


def orders(role: str) -> list[list[dict[str, str]]]:
    return shipped("orders", role)


def signatures(role: str) -> list[list[dict[str, str]]]:
    return [conversation(row[1]["content"], signature) for row, signature in defined(role)]


CONVERSATIONS = {"docstrings": docstrings, "keys": keys, "orders": orders, "signatures": signatures}


def shipped(folder: str, role: str) -> list[list[dict[str, str]]]:
    lines = (EXAMPLES / folder / f"{role}.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"] for line in lines]


def defined(role: str) -> Iterator[tuple[list[dict[str, str]], str]]:
    """Rows of the docstrings, each with the line that begins its function."""
    for row in shipped("docstrings", role):
        found = re.search(r"^ *(?:async )?def .*:$", row[0]["content"], re.MULTILINE)
        if found:
            yield row, found.group().strip()


def names_of(role: str) -> list[str]:
    text = "\n".join(row[0]["content"] for row in shipped("docstrings", role))
    return re.findall(r"\b[a-z]+(?:_[a-z]+)+\b", text)


def camel(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(word.capitalize() for word in others)


def conversation(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
