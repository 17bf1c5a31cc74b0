"""Records to text, with the characters that are trained."""

from dataclasses import dataclass, field
from typing import Any

from ..formats import canonical, detect_format, plain_text, read_preference
from .answers import Answers
from .spans import Span


@dataclass(frozen=True)
class Draft:
    """One row before it is tokenised."""

    line: int
    text: str
    spans: list[Span]
    """What of `text` is trained."""
    kind: str
    """"chat", rendered by its template; or "completion" or "text", which still need begin and end tokens."""
    weight: float = 1.0
    """Of the row, in the loss."""
    untrained: frozenset[str] = frozenset()
    """"reasoning" or "content", if the template left such a part of a trained answer out."""
    literal: list[tuple[int, int]] = field(default_factory=list)
    """Characters of `text` that spell control tokens but are ordinary text."""


def drafts_of(line: int, place: str, record: dict[str, Any], answers: Answers) -> list[Draft]:
    """The rows of an example: one, or for a preference pair the prompt with each of its answers.

    `place` names the row in errors. Raises DataError.
    """
    record = canonical(record)
    format = detect_format(record)
    weight = float(record.get("weight", 1))
    if format == "text":
        return [Draft(line, record["text"], [], "text", weight)]
    if format != "preference":
        return [_draft(line, place, record, answers, weight)]
    pair = read_preference(record)
    around = {"prompt": pair.prompt, "tools": pair.tools, "functions": pair.functions}
    drafts = []
    for answer in (pair.chosen, pair.rejected):
        draft = _draft(line, place, around | {"completion": answer}, answers)
        drafts.append(draft if _says_something(answer) else Draft(line, draft.text, [], "chat"))
    return drafts


def _says_something(answer: str | list[dict[str, Any]]) -> bool:
    """Whether an answer has any text or tool call besides its end of turn."""
    if isinstance(answer, str):
        return bool(answer.strip())
    called = ("tool_calls", "function_call")
    return any(plain_text(m.get("content")).strip() or any(m.get(key) for key in called) for m in answer)


def _draft(line: int, place: str, record: dict[str, Any], answers: Answers, weight: float = 1.0) -> Draft:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        text = prompt + completion
        return Draft(line, text, [Span(len(prompt), len(text))], "completion", weight)
    if prompt is not None:
        messages = [*({**message, "weight": 0} for message in prompt), *record["completion"]]
    else:
        messages = record["messages"]
    tools = record.get("tools") or [
        {"type": "function", "function": function} for function in record.get("functions") or []
    ]
    found = answers.render(place, messages, tools or None)
    return Draft(line, found.text, found.spans, "chat", weight, found.untrained, found.literal)
