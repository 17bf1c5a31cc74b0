"""Alpaca: an instruction with its output or a preference pair, optionally with input, system and history."""

from typing import Any

from .messages import check_answer_text, check_other_keys
from .report import MAP_COLUMNS, Add, named
from .weights import check_row_weight, refuse_row_weight, row_weight

KEYS = ("instruction", "input", "output", "system", "history", "weight")
PREFERENCE_KEYS = ("instruction", "input", "chosen", "rejected", "system", "history", "weight")


def check(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, KEYS, add)
    check_row_weight(record, add)
    _check_question(record, add)
    if _is_there(record, "output", add):
        check_answer_text(record["output"], "$.output", add)


def check_preference(record: dict[str, Any], add: Add) -> None:
    check_other_keys(record, PREFERENCE_KEYS, add)
    refuse_row_weight(record, add)
    _check_question(record, add)
    usable = [_is_there(record, key, add) for key in ("chosen", "rejected")]
    if not all(usable):
        return
    for key in ("chosen", "rejected"):
        check_answer_text(record[key], f"$.{key}", add)
    if record["chosen"] == record["rejected"]:
        add(
            "$",
            "equal_preference",
            "chosen and rejected are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )


def _check_question(record: dict[str, Any], add: Add) -> None:
    """Instruction, input, system and history."""
    for key in ("input", "system"):
        if record.get(key) is not None and not isinstance(record[key], str):
            add(f"$.{key}", "data_type", f"'{key}' is {named(record[key])}.", "Make it a string.")
    if _is_there(record, "instruction", add) and not (
        record["instruction"].strip() or str(record.get("input") or "").strip()
    ):
        add("$.instruction", "missing_content", "the instruction is empty.", "Write what is asked for.")
    history = record.get("history")
    if history is None:
        return
    if not isinstance(history, list):
        add("$.history", "data_type", f"'history' is {named(history)}.", _HISTORY)
        return
    for i, turn in enumerate(history):
        is_pair = isinstance(turn, list) and len(turn) == 2 and all(isinstance(part, str) for part in turn)
        if not is_pair:
            add(f"$.history[{i}]", "data_type", "a turn of the history is a list of two strings.", _HISTORY)


_HISTORY = 'Write [["question", "answer"], …].'


def _is_there(record: dict[str, Any], key: str, add: Add) -> bool:
    if isinstance(record.get(key), str):
        return True
    if record.get(key) is None:
        answers = "output" if key in ("instruction", "output") else "chosen and rejected"
        add(
            f"$.{key}",
            "missing_key",
            f"'{key}' is missing.",
            f"Give each line an instruction and {answers}. {MAP_COLUMNS}",
        )
    else:
        add(f"$.{key}", "data_type", f"'{key}' is {named(record[key])}.", "Make it a string.")
    return False


def as_chat(record: dict[str, Any]) -> dict[str, Any]:
    """A chat record. Answers in the history are trained too, as in LLaMA-Factory."""
    return {"messages": [*_question(record), _answer(record["output"])]} | row_weight(record)


def as_preference(record: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": _question(record)} | {key: [_answer(record[key])] for key in ("chosen", "rejected")}


def _question(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages before the answer; the user's is the instruction, a line break and the input."""
    system = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    before = []
    for question, answer in record.get("history") or []:
        before += [{"role": "user", "content": question}, _answer(answer)]
    asked = "\n".join(part for part in (record["instruction"], record.get("input")) if part)
    return [*system, *before, {"role": "user", "content": asked}]


def _answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}
