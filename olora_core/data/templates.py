"""Chat templates: a conversation as the model reads it, and which of its characters are the answers."""

import json
import re
from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import DataError, ModelError
from ..formats import plain_text

Span = tuple[int, int]


class ChatTemplate:
    """Renders conversations with the tokenizer's own template and finds the answers in the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> None:
        self.tokenizer = tokenizer
        self.end_texts = [tokenizer.convert_ids_to_tokens(token) for token in end_tokens]
        self._templates: dict[bool, tuple[str, bool]] = {}

    def draft(
        self, place: str, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        """The rendered conversation and its trained (start, end) characters; `place` names it in errors."""
        weights = [message.get("weight", 1) != 0 for message in messages]
        plain = normalised(messages)
        try:
            return self._draft(plain, weights, tools)
        except _CannotMask as problem:
            raise DataError(
                f"{place}: the base model's chat template cannot be masked, because {problem}. Split the "
                "conversation so that its answer comes last, give earlier answers weight 0, or use a base "
                "model whose template has {% generation %} marks."
            ) from None
        except _TemplateRefused as problem:
            raise DataError(f"{place}: the base model's chat template refuses it: {problem}") from None

    def _draft(
        self, messages: list[dict[str, Any]], weights: list[bool], tools: list[dict[str, Any]] | None
    ) -> tuple[str, list[Span]]:
        answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if any("tool_calls" in message for message in messages):
            messages = self._with_arguments_it_takes(messages, tools)
        text, marks = self.render(messages, tools)
        if len(marks) == len(answers):
            return text, [mark for mark, i in zip(marks, answers, strict=True) if weights[i]]
        if marks and all(weights[i] for i in answers):
            return text, marks
        return text, [self._answer(text, messages, i, tools) for i in answers if weights[i]]

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        generation_prompt: bool = False,
    ) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks with {% generation %}, if it does."""
        template, marked = self._template(tools)
        try:
            texts, marks = render_jinja_template(
                [messages],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=generation_prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is a program and may fail in any way
            raise _TemplateRefused(str(error) or type(error).__name__) from None
        return texts[0], [tuple(mark) for mark in marks[0]] if marked else []

    @cached_property
    def _special_tokens(self) -> dict[str, Any]:
        return self.tokenizer.special_tokens_map

    def _template(self, tools: list[dict[str, Any]] | None) -> tuple[str, bool]:
        """The template with or without tools, and whether it has {% generation %} marks."""
        kind = tools is not None
        if kind not in self._templates:
            template = self._find_template(tools)
            marked = bool(re.search(r"\{%-?\s*generation\s*-?%\}", template))
            self._templates[kind] = template, marked
        return self._templates[kind]

    def _find_template(self, tools: list[dict[str, Any]] | None) -> str:
        try:
            return self.tokenizer.get_chat_template(None, tools)
        except ValueError:
            raise ModelError(
                "The base model has no chat template, so conversations cannot be trained on. Use a chat "
                "model, add chat_template.jinja to its folder, or give prompt and completion as strings."
            ) from None

    def _with_arguments_it_takes(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None
    ) -> list[dict[str, Any]]:
        """Tool arguments as objects, or as JSON strings for a template that refuses objects."""
        try:
            self.render(messages, tools)
        except _TemplateRefused:
            return [_with_string_arguments(message) for message in messages]
        return messages

    def _answer(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: list[dict[str, Any]] | None
    ) -> Span:
        """Span of answer i, found by rendering the conversation up to it, and verified."""
        start = self._start(text, messages, i, tools)
        through = text if i + 1 == len(messages) else self.render(messages[: i + 1], tools)[0]
        if text.startswith(through):
            return start, len(through)
        # The template changes an answer when more messages follow (it drops reasoning, for example).
        content = messages[i].get("content", "").strip()
        after = text.find(content, start) + len(content)
        ends = [at + len(end) for end in self.end_texts if (at := text.find(end, after)) >= 0]
        if after < start + len(content) or not ends:
            raise _CannotMask(f"it rewrites message {i}, an answer, once later messages follow")
        between = text[after : min(ends)]
        names = [call["function"]["name"] for call in messages[i].get("tool_calls", [])]
        rest = between.strip()
        if names and not all(name in rest for name in names):
            raise _CannotMask(f"the calls of message {i} are not found before its end")
        if not names and rest not in self.end_texts:
            raise _CannotMask(f"text of its own follows the answer in message {i}")
        return start, min(ends)

    def _start(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: list[dict[str, Any]] | None
    ) -> int:
        if i == 0:
            opening = self._opening()
            at = text.find(opening) if opening else -1
            if at < 0:
                raise _CannotMask("the conversation begins with an answer")
            return at + len(opening)
        before, _ = self.render(messages[:i], tools, generation_prompt=True)
        if not text.startswith(before):
            raise _CannotMask(
                f"what it writes before message {i}, an answer, changes once the answer follows"
            )
        return len(before)

    def _opening(self) -> str:
        """What the template writes before an answer."""
        question = [{"role": "user", "content": "?"}]
        asked = self.render(question)[0]
        return self.render(question, generation_prompt=True)[0].removeprefix(asked)


class _TemplateRefused(Exception):
    """The template raised an error; the argument is its message."""


class _CannotMask(Exception):
    """The answers cannot be located in the rendered text with certainty; the argument says why."""


def end_of_turn_tokens(tokenizer: PreTrainedTokenizerBase, generation_eos: Any = None) -> frozenset[int]:
    """Ids of the tokens that may end an answer: end of sequence, and what the chat template writes after one.

    `generation_eos` is the generation config's `eos_token_id`: an int, a list or None.
    """
    known = generation_eos if isinstance(generation_eos, list) else [generation_eos]
    tokens = {token for token in (tokenizer.eos_token_id, *known) if token is not None}
    if tokenizer.chat_template:
        probe = "An answer."
        question, answer = {"role": "user", "content": "?"}, {"role": "assistant", "content": probe}
        try:
            text, _ = ChatTemplate(tokenizer, frozenset()).render([question, answer])
        except _TemplateRefused:
            return frozenset(tokens)
        behind = tokenizer(text.rpartition(probe)[2], add_special_tokens=False).input_ids
        tokens.update([token for token in behind if token in tokenizer.added_tokens_decoder][:1])
    return frozenset(tokens)


def normalised(messages: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages as templates expect them: content as a string, arguments as objects, current role names."""
    return [_normalised(message) for message in messages]


def _normalised(message: dict[str, Any]) -> dict[str, Any]:
    kept = ("role", "content", "name", "tool_calls", "tool_call_id")
    plain = {key: message[key] for key in kept if message.get(key) is not None}
    plain["role"] = {"developer": "system", "function": "tool"}.get(plain["role"], plain["role"])
    plain["content"] = plain_text(plain.get("content"))
    calls = message.get("tool_calls") or []
    if message.get("function_call"):
        calls = [{"id": "call", "type": "function", "function": message["function_call"]}]
    if calls:
        plain["tool_calls"] = [_call(call, _as_object) for call in calls]
    return plain


def _call(call: dict[str, Any], written: Callable[[Any], Any]) -> dict[str, Any]:
    function = call["function"]
    return {**call, "function": {**function, "arguments": written(function.get("arguments", {}))}}


def _as_object(arguments: Any) -> Any:
    return json.loads(arguments) if isinstance(arguments, str) else arguments


def _with_string_arguments(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls", [])
    written = [_call(call, lambda a: json.dumps(a, ensure_ascii=False)) for call in calls]
    return {**message, "tool_calls": written} if calls else message
