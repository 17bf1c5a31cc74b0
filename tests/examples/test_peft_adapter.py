"""What the quickstarts measure and ask: the tokens of an answer, and questions asked together."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from examples import peft_adapter

EXAMPLES = Path(peft_adapter.__file__).parent
SYSTEM = {"role": "system", "content": "Answer in one line."}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(EXAMPLES / "base", padding_side="left")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """Conversations with and without a system message, and questions of different lengths."""
    lines = (EXAMPLES / "docstrings" / "valid.jsonl").read_text("utf-8").splitlines()[:6]
    found = [json.loads(line) for line in lines]
    found[1]["messages"].insert(0, SYSTEM)
    found[3]["messages"].insert(0, SYSTEM)
    return found


def test_the_measured_tokens_are_the_answer_and_its_end(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    for row in rows:
        ids, trained = peft_adapter.encode(tokenizer, row)
        assert tokenizer.decode(ids[trained]) == row["messages"][-1]["content"] + "<|im_end|>"
        marked = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        assert trained[0].int().tolist() == marked["assistant_masks"]


def test_questions_asked_together_get_the_answers_that_each_gets_alone(
    tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLES / "base", dtype=torch.float32)
    together = peft_adapter.answers(model, tokenizer, rows, 8)
    for row, text in zip(rows, together, strict=True):
        prompt = tokenizer.apply_chat_template(
            row["messages"][:-1], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        alone = model.generate(**prompt, max_new_tokens=8, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        assert text == " ".join(tokenizer.decode(alone, skip_special_tokens=True).split())
