"""Control tokens of chat templates, such as "<|im_end|>", in what people wrote.

A file is checked before its base model is known: these are the forms that families use. Against the tokens of
the base itself it is checked when it is tokenised.
"""

import re
from collections.abc import Iterator
from typing import Any

from .report import CONTROL_TOKEN, Add

FORMS = re.compile(r"<[|｜][\w▁ ]{1,40}[|｜]>|<(?:start|end)_of_turn>|<\|?turn\|?>|\[/?INST\]")


def check_control_tokens(record: dict[str, Any], add: Add) -> None:
    """Adds an error for the first control token in a record whose texts a chat template will frame."""
    for path, text in texts_in(record, "$"):
        if found := FORMS.search(text):
            add(
                path,
                CONTROL_TOKEN,
                f"'{found[0]}' is a control token of chat models and would begin or end a turn here.",
                'Remove it, or train it as ordinary text with hyperparameters.control_tokens = "text".',
            )
            return


def texts_in(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """The path and the text of every string in a JSON value, which is itself at `path`."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from texts_in(item, f"{path}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from texts_in(item, f"{path}[{i}]")
