"""What is trained of a conversation, for the chat templates of today's families."""

import json
from pathlib import Path
from typing import Any

import pytest

from olora_core.errors import DataError

from .chat_templates import (
    CHATML,
    COLUMNS,
    FAMILIES,
    FOLDER,
    OTHERWISE,
    TOOLS,
    UNENDED,
    answers_of,
    expected,
    prompt_end,
    table,
    tools_of,
    trained,
)
from .reading import read


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_trained_is_the_familys_answers(tmp_path, name: str, column: str) -> None:
    family, messages = FAMILIES[name], COLUMNS[column]
    answers, tools = answers_of(name, family), tools_of(messages)
    if column in family.refused:
        with pytest.raises(DataError, match="Line 7: the base model's chat template"):
            answers.render("Line 7", messages, tools)
        return
    if (name, column) in UNENDED:
        with pytest.raises(
            DataError, match="Line 1 of the training file has an answer with no end-of-turn token"
        ):
            read(
                tmp_path,
                answers.template.tokenizer,
                [{"messages": messages, "tools": TOOLS}],
                answers.end_tokens,
            )
        return
    found = answers.render("Line 7", messages, tools)
    if (name, column) in OTHERWISE:
        assert trained(found) == OTHERWISE[name, column]
        return
    assert trained(found) == expected(family, found.text, prompt_end(answers, family))
    count = sum(message["role"] == "assistant" for message in messages)
    assert len(found.spans) == count
    written = {
        "call": ["Paris", "First"],
        "two calls": ["Paris", "First", "Rome", "Second"],
        "last call": ["Paris"],
    }
    texts = written.get(column) or [
        message["content"].split()[0] for message in messages if message["role"] == "assistant"
    ]
    assert all(text in answer for text, answer in zip(texts, trained(found), strict=True))


TRAINING = sorted(path.stem for path in FOLDER.glob("*_training.jinja"))
IN_PARTS = ("idefics3_training", "llava_next_training", "smolvlm_training")


MARKED = [
    (name, column)
    for name in TRAINING
    for column in ("one", "two", "call")
    if column not in FAMILIES.get(name.removesuffix("_training"), CHATML).refused
    and not (name in IN_PARTS and column == "call")
]


@pytest.mark.parametrize(("name", "column"), MARKED)
def test_a_template_with_marks_of_its_own_decides_what_is_trained(name: str, column: str) -> None:
    family = FAMILIES.get(name.removesuffix("_training"), CHATML)
    messages = COLUMNS[column]
    answers = answers_of(name, family)
    found = answers.render("Line 7", messages, tools_of(messages))
    blocks = answers.template.render(written_for(name, messages), tools_of(messages))[1]
    assert blocks
    assert [(start, end) for start, end, _ in found.spans] == blocks


def written_for(name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages as transformers' users would pass them to this template."""
    written = []
    for message in messages:
        message = dict(message)
        if name in IN_PARTS:
            message["content"] = [{"type": "text", "text": message["content"]}]
        if message.get("tool_calls") and name != "deepseek_r1_distill_training":
            function = message["tool_calls"][0]["function"]
            arguments = {"arguments": json.loads(function["arguments"])}
            message["tool_calls"] = [message["tool_calls"][0] | {"function": function | arguments}]
        if message.get("tool_calls") and name == "deepseek_r1_distill_training":
            message["content"] = None
        written.append(message)
    return written


def test_the_table_in_the_documentation_is_true() -> None:
    page = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    assert table() in page
