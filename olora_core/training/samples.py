"""Sample answers of the base and of the tuned model to the first rows, for people to compare.

Both answer at the end of the run, which is possible because the base is never written. Prompts are taken from
the tokenised examples, so they have any file format's, and are exactly those of training.
"""

import math
import time
from collections.abc import Generator, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig

from ..bases.loading import Base
from ..bases.passes import evaluating
from ..data.conversations import normalised
from ..data.examples import Examples
from ..errors import ModelError
from ..layers.adapter import adapters_off
from ..progress import Note, Phase, Sample, Samples
from .data import Data, context_length

NEW_TOKENS = 64
SECONDS = 60.0
"""After this time no further row is started, and a running answer is cut."""
ROWS_LOOKED_AT = 256
SHOWN_CHARACTERS = 1000


def sample(base: Base, data: Data, count: int) -> Generator[Phase | Note, None, Samples | None]:
    """The answers to the first `count` rows with a prompt, of the validation data if there are any.

    None if no row has a prompt. An error here never fails the run, whose training is complete.
    """
    examples = data.validation or data.training
    file = "training" if data.validation is None or data.held_out else "validation"
    until, rows = time.monotonic() + SECONDS, []
    for done, (line, prompt, reference) in enumerate(islice(_questions(examples), count)):
        yield Phase("sampling", done, count)
        if time.monotonic() > until:
            yield Note("info", f"Sample answers took too long; {done} of {count} were generated.")
            break
        try:
            rows.append(_sample(base, line, prompt, reference, until))
        except Exception as error:  # a base that cannot generate can still be a good base
            yield Note(
                "warn", f"No sample answer could be generated for line {line}: {type(error).__name__}."
            )
            break
    return Samples(rows, file, held_out=data.held_out is not None) if rows else None


def _questions(examples: Examples) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Line number, prompt (tokens,) and last trained answer (tokens,) of each row; of a pair, the better one.

    Rows without a prompt, which are trained from their second token on, are left out.
    """
    for i in range(min(ROWS_LOOKED_AT, len(examples))):
        tokens, trained = examples.example(i)[0]
        trained = trained != 0  # weights tell the same
        ends = np.flatnonzero(trained)
        if not len(ends):
            continue
        before = np.flatnonzero(~trained[: ends[-1]])
        start = before[-1] + 1
        if start > 1:
            yield int(examples.lines[i]), tokens[:start], tokens[start : ends[-1] + 1]


def _sample(base: Base, line: int, prompt: np.ndarray, reference: Sequence[int], until: float) -> Sample:
    tokens = min(NEW_TOKENS, context_length(base) - len(prompt))
    with adapters_off(base.model):
        before = answer(base, prompt.tolist(), tokens, until=until)
    after = answer(base, prompt.tolist(), tokens, until=until)
    decode = base.tokenizer.decode
    return Sample(
        line=line,
        prompt=_tail(decode(prompt.tolist())),
        reference=_head(decode(reference.tolist(), skip_special_tokens=True).strip()),
        base=_head(before),
        tuned=_head(after),
    )


def _head(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"


def _tail(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"…{text[-SHOWN_CHARACTERS:]}"


def generate(base: Base, messages: list[dict[str, Any]], max_new_tokens: int) -> str:
    """The model's answer to a conversation, by greedy decoding."""
    if not base.tokenizer.chat_template:
        raise ModelError(
            f"Base model '{base.name}' has no chat template, so it cannot answer a conversation."
        )
    prompt = base.tokenizer.apply_chat_template(
        normalised(messages), add_generation_prompt=True, return_dict=True
    )
    return answer(base, prompt["input_ids"], max_new_tokens)


def answer(base: Base, prompt: list[int], max_new_tokens: int, *, until: float = math.inf) -> str:
    """The model's continuation of `prompt` by greedy decoding, until the monotonic time `until`.

    The sampling and penalties of the base's own generation config are ignored.
    """
    if (highest := max(prompt, default=0)) >= base.embedded_tokens:
        raise ModelError(
            f"The prompt contains token {highest} ('{base.tokenizer.convert_ids_to_tokens(highest)}'), and "
            f"base model '{base.name}' embeds only {base.embedded_tokens} tokens; leave it out."
        )
    how = GenerationConfig(
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        max_new_tokens=max_new_tokens,
        max_time=None if until == math.inf else max(0.0, until - time.monotonic()),
        eos_token_id=sorted(base.end_tokens),
        pad_token_id=base.tokenizer.pad_token_id or 0,
    )
    input_ids = torch.tensor([prompt], device=base.device)
    with evaluating(base.model), torch.no_grad():
        tokens = base.model.generate(
            input_ids=input_ids, attention_mask=torch.ones_like(input_ids), generation_config=how
        )
    return base.tokenizer.decode(tokens[0, len(prompt) :], skip_special_tokens=True).strip()
