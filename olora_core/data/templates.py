"""The base's own chat template, as a function from a conversation to text."""

import json
import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import ModelError

Tools = list[dict[str, Any]] | None
Block = tuple[int, int]


class TemplateRefused(Exception):
    """The template raised an error; the argument is its message."""


DATE = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


class ChatTemplate:
    """Renders conversations. `day` is today's date for templates that write it: the same rows give the same
    text on every day."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, day: date) -> None:
        self.tokenizer = tokenizer
        self.day = day
        self._templates: dict[bool, tuple[str, bool]] = {}

    def render(
        self, messages: Sequence[dict[str, Any]], tools: Tools = None, *, generation_prompt: bool = False
    ) -> tuple[str, list[Block]]:
        """The text, and the (start, end) characters that the template marks with {% generation %}.

        Raises TemplateRefused.
        """
        template, marked = self._template(tools)
        try:
            texts, blocks = render_jinja_template(
                [list(messages)],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise TemplateRefused(str(error) or type(error).__name__) from None
        return texts[0], [tuple(block) for block in blocks[0]] if marked else []

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return self.tokenizer.special_tokens_map

    def _template(self, tools: Tools) -> tuple[str, bool]:
        """The template with or without tools, and whether it has {% generation %} marks."""
        kind = tools is not None
        if kind not in self._templates:
            template = self._on_its_day(self._find_template(tools))
            marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
            self._templates[kind] = template, marked
        return self._templates[kind]

    def _find_template(self, tools: Tools) -> str:
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            raise ModelError(
                "The base model has no chat template, so conversations cannot be trained on. Use a chat "
                "model, add chat_template.jinja to its folder, or give prompt and completion as strings."
            ) from None

    def _on_its_day(self, template: str) -> str:
        """The template with its calls for today's date replaced by this day's."""
        template = DATE.sub(lambda call: json.dumps(self.day.strftime(call[2])), template)
        if re.search(r"strftime_now\s*\(", template):
            raise ModelError(
                "The base model's chat template computes the format in which it writes today's date, so the "
                "date cannot be fixed. Write the format as a string inside strftime_now( ) in the template."
            )
        return template


def writes_the_day(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer's chat template writes today's date."""
    return "strftime_now" in str(tokenizer.chat_template)
