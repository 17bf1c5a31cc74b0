"""Control tokens, such as "<|im_end|>", that somebody typed into a text."""

import re
from collections.abc import Callable, Iterable
from typing import Any

from transformers import PreTrainedTokenizerBase

from ..formats import texts_in
from .conversations import with_texts
from .marks import THINK


class ControlTokens:
    """Of one tokenizer: those that it marks as special, which no text should contain.

    Tags around a thought are none of them: they are one way to write it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        texts = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and not THINK.fullmatch(token.content)
        ]
        longest_first = sorted(filter(str.strip, texts), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def first(self, messages: Iterable[dict[str, Any]]) -> tuple[int, str] | None:
        """The message that contains one, and the token; None without any."""
        for i, message in enumerate(messages):
            for _, text in texts_in(message, ""):
                if found := self._pattern.search(text):
                    return i, found[0]
        return None

    def split(self, value: Any, mark: Callable[[int], str]) -> Any:
        """A copy of a JSON value with a mark inside each control token, behind its first character.

        `mark` makes the mark for a token of this length.
        """
        return with_texts(
            value,
            lambda text: self._pattern.sub(
                lambda token: token[0][0] + mark(len(token[0])) + token[0][1:], text
            ),
        )
