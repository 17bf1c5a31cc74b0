"""Text to token ids, and which of them are trained."""

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerBase

from ..errors import ModelError
from .drafts import Draft


class Encoder:
    """Texts to token ids and masks, on all of the tokenizer's threads."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, end_tokens: frozenset[int]) -> None:
        if not tokenizer.is_fast:
            raise ModelError(
                "The base model's tokenizer gives no character offsets, which masking needs; use a base "
                "model with a tokenizer.json."
            )
        self.end_tokens = end_tokens
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        # This call also turns off truncation and padding that tokenizer.json may ask for.
        alone = tokenizer("", verbose=False).input_ids
        self.adds_bos = self.bos is not None and alone[:1] == [self.bos]
        self._core = tokenizer.backend_tokenizer

    def encode(self, drafts: Sequence[Draft]) -> list[Encoding]:
        """The encoding of each draft's text, without the tokens that the tokenizer adds."""
        whole = [draft.text for draft in drafts if not draft.literal]
        encodings = iter(self._encode(whole))
        return [self._encode_literal(draft) if draft.literal else next(encodings) for draft in drafts]

    def _encode(self, texts: list[str]) -> list[Encoding]:
        return self._core.encode_batch(texts, add_special_tokens=False)

    def _encode_literal(self, draft: Draft) -> Encoding:
        """Encodes a text in pieces, its `literal` characters without looking for control tokens in them."""
        pieces, at = [], 0
        for start, end in draft.literal:
            pieces += [
                *self._encode([draft.text[at:start]]),
                self._literal_core.encode(draft.text[start:end], add_special_tokens=False),
            ]
            at = end
        return Encoding.merge([*pieces, *self._encode([draft.text[at:]])], growing_offsets=True)

    @cached_property
    def _literal_core(self) -> Tokenizer:
        core = Tokenizer.from_str(self._core.to_str())
        core.encode_special_tokens = True
        return core

    def text_of(self, token: int) -> str:
        """How the vocabulary writes a token."""
        return str(self._core.id_to_token(token))

    def row(self, draft: Draft, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a row, (tokens,) int64, and which are trained, (tokens,) bool; or if some have a
        weight other than 1, their weights, (tokens,) float32."""
        ids, weights = self._row(draft, encoding)
        weights = weights * np.float32(draft.weight)
        return ids, weights if ((weights != 0) & (weights != 1)).any() else weights != 0

    def _row(self, draft: Draft, encoding: Encoding) -> tuple[np.ndarray, np.ndarray]:
        ids = np.array(encoding.ids, dtype=np.int64)
        if draft.kind == "chat":
            return ids, self._weights(draft, encoding, ids)
        prompt_tokens = 0
        if draft.kind == "completion":
            ids, prompt_tokens = self._split(draft, encoding, ids)
        if self.adds_bos:
            ids, prompt_tokens = np.concatenate([[self.bos], ids]), prompt_tokens + 1
        if self.eos is None:
            raise ModelError(
                "The base model's tokenizer has no end-of-sequence token, which a completion or a text needs "
                "to end with; set eos_token in its tokenizer_config.json."
            )
        if not len(ids) or ids[-1] != self.eos:
            ids = np.append(ids, self.eos)
        return ids, (np.arange(len(ids)) >= prompt_tokens).astype(np.float32)

    def _weights(self, draft: Draft, encoding: Encoding, ids: np.ndarray) -> np.ndarray:
        weights = np.zeros(len(ids), dtype=np.float32)
        edges = first_tokens(encoding, [edge for span in draft.spans for edge in (span.start, span.end)])
        for first, last, (_, _, weight) in zip(edges[::2], edges[1::2], draft.spans, strict=True):
            weights[first : self._with_its_end(ids, first, last)] = weight
        return weights

    def _with_its_end(self, ids: np.ndarray, first: int, last: int) -> int:
        """End of a trained turn: after its end-of-turn token, without the line breaks that follow."""
        if ids[last - 1] in self.end_tokens:
            return last
        # A template may put the token just outside its marks; a model that never learns it never stops.
        if last < len(ids) and ids[last] in self.end_tokens:
            return last + 1
        inside = (at for at in range(last - 1, first - 1, -1) if ids[at] in self.end_tokens)
        return next(inside, last - 1) + 1

    def _split(self, draft: Draft, encoding: Encoding, ids: np.ndarray) -> tuple[np.ndarray, int]:
        """Ids of prompt and completion, and the number of prompt tokens."""
        boundary = draft.spans[0][0]
        (at,) = first_tokens(encoding, [boundary])
        if at and encoding.token_to_chars(at - 1)[1] > boundary:
            # A token across the boundary cannot occur at inference, where the prompt is encoded alone.
            head, tail = self._encode([draft.text[:boundary], draft.text[boundary:]])
            return np.array(head.ids + tail.ids, dtype=np.int64), len(head.ids)
        return ids, at


def first_tokens(encoding: Encoding, positions: Sequence[int]) -> list[int]:
    """For each character position, the index of the first token that begins there or later.

    One pass over the tokens for all positions: looking each up in the encoding would be one pass for each.
    """
    starts = np.fromiter((start for start, _ in encoding.offsets), dtype=np.int64, count=len(encoding))
    return np.searchsorted(starts, positions).tolist()
