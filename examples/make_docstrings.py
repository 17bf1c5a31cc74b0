"""Makes `examples/docstrings/{train,valid}.jsonl`: a function's source in, its docstring's first line out.

    python -m examples.make_docstrings      # from the root of the repository, after examples.make_base

The rows are in OpenAI's chat format. Validation rows come from the held-out modules, which are in neither the
training rows nor the base's text. The same library text and tokenizer give the same files, byte for byte.
"""

import ast
import hashlib
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from examples.corpus import Module, digest, modules

BASE = Path(__file__).parent / "base"
OUT = Path(__file__).parent / "docstrings"

INSTRUCTION = "Describe this function in one line."
MOST_ROWS = {"train.jsonl": 1500, "valid.jsonl": 300}
MOST_A_MODULE = 30  # so that tkinter and decimal do not fill the file
FEWEST_WORDS = 4
LONGEST_LINE = 100  # characters of an answer
POINTS_ELSEWHERE = re.compile(r"^(same as|like|as|stub|internal|helper|override)\b|\bsee\b", re.IGNORECASE)

Function = ast.FunctionDef | ast.AsyncFunctionDef
Row = dict[str, list[dict[str, str]]]


@dataclass(frozen=True)
class Example:
    module: str
    source: str  # without the docstring, dedented
    summary: str  # the docstring's first line

    @property
    def row(self) -> Row:
        question = {"role": "user", "content": f"{INSTRUCTION}\n\n{self.source}"}
        return {"messages": [question, {"role": "assistant", "content": self.summary}]}

    @property
    def place(self) -> str:
        """Sort key for a reproducible shuffle."""
        return hashlib.sha256(f"{self.module}\0{self.source}\0{self.summary}".encode()).hexdigest()


# From a module to its examples


def examples_of(module: Module) -> Iterator[Example]:
    for statement in statements(ast.parse(module.source)):
        if isinstance(statement, Function):
            summary = summary_of(statement)
            source = bare_source(module, statement) if summary else None
            if summary and source:
                yield Example(module.name, source, summary)


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement below a node. `ast.walk` would also visit expressions, most of the tree."""
    for block in ("body", "handlers", "orelse", "finalbody"):
        for child in getattr(node, block, []):
            yield child
            yield from statements(child)


def summary_of(function: Function) -> str | None:
    """The docstring's first line, if it is a complete and informative sentence; else None."""
    first, _, rest = (ast.get_docstring(function) or "").partition("\n")
    first = first.strip()
    whole = first.endswith(".") and not rest.partition("\n")[0].strip()
    telling = len(first.split()) >= FEWEST_WORDS and not POINTS_ELSEWHERE.search(first)
    fits = len(first) <= LONGEST_LINE and first.isascii()
    return first if whole and telling and fits else None


def bare_source(module: Module, function: Function) -> str | None:
    """The function without its docstring; None if no real body is left."""
    docstring, *body = function.body
    if not any(does_something(statement) for statement in body):
        return None
    lines = module.source.split("\n")
    before = lines[function.lineno - 1 : docstring.lineno - 1]
    after = lines[docstring.end_lineno or docstring.lineno : function.end_lineno]
    while after and not after[0].strip():
        del after[0]
    source = textwrap.dedent("\n".join(before + after))
    return source if is_same_function(source, function) else None


def does_something(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Expr):
        return not isinstance(statement.value, ast.Constant)  # an ellipsis, or a second string
    return not isinstance(statement, ast.Pass | ast.Raise | ast.Global)


def is_same_function(source: str, function: Function) -> bool:
    """False if removing lines also removed code, which a docstring may share a line with."""
    try:
        cut = ast.parse(source).body[0]
    except (SyntaxError, IndexError):
        return False
    return (
        isinstance(cut, Function)
        and [ast.dump(s) for s in cut.body] == [ast.dump(s) for s in function.body[1:]]
        and ast.dump(cut.args) == ast.dump(function.args)
    )


# From examples to files


def select(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    """The examples of each file, without duplicate answers or sources within or across the files."""
    training = [example for module in modules() if not module.held_out for example in examples_of(module)]
    held_out = [example for module in modules() if module.held_out for example in examples_of(module)]
    seen = {key for example in training for key in keys(example)}
    unseen = [example for example in held_out if not seen.intersection(keys(example))]
    return {
        "train.jsonl": choose(training, tokenizer, MOST_ROWS["train.jsonl"]),
        "valid.jsonl": choose(unseen, tokenizer, MOST_ROWS["valid.jsonl"]),
    }


def keys(example: Example) -> set[str]:
    return {example.summary.casefold(), example.source}


def choose(found: Iterable[Example], tokenizer: PreTrainedTokenizerBase, most: int) -> list[Example]:
    chosen: list[Example] = []
    seen: set[str] = set()
    a_module: Counter[str] = Counter()
    for example in sorted(found, key=lambda example: example.place):
        if len(chosen) == most:
            break
        new = a_module[example.module] < MOST_A_MODULE and not seen.intersection(keys(example))
        if new and tokens(example.row, tokenizer) <= tokenizer.model_max_length:
            chosen.append(example)
            seen.update(keys(example))
            a_module[example.module] += 1
    return chosen


def tokens(row: Row, tokenizer: PreTrainedTokenizerBase) -> int:
    return len(
        tokenizer.apply_chat_template(row["messages"], return_dict=False, tokenizer_kwargs={"verbose": False})
    )


def as_jsonl(chosen: Iterable[Example]) -> str:
    return "".join(json.dumps(example.row, ensure_ascii=False) + "\n" for example in chosen)


def main() -> None:
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    OUT.mkdir(exist_ok=True)
    print(f"corpus {digest()}")
    for name, chosen in select(tokenizer).items():
        (OUT / name).write_text(as_jsonl(chosen), encoding="utf-8", newline="\n")
        lengths = sorted(tokens(example.row, tokenizer) for example in chosen)
        sources = len({example.module for example in chosen})
        print(
            f"{name}: {len(chosen)} rows from {sources} modules,"
            f" tokens a row: median {lengths[len(lengths) // 2]}, most {lengths[-1]}"
        )


if __name__ == "__main__":
    main()
