"""The base loads and follows its template; the rows fit its context, and none leaks into training."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from examples.corpus import MADE_FROM, Module, digest, documents, modules
from examples.make_docstrings import Example, as_jsonl, examples_of, select

EXAMPLES = Path(__file__).parents[2] / "examples"
BASE = EXAMPLES / "base"
FILES = {"train.jsonl": range(1000, 2001), "valid.jsonl": range(200, 401)}
TURNS = [
    {"role": "system", "content": "Answer in one line."},
    {"role": "user", "content": "def f(x):\n    return x"},
    {"role": "assistant", "content": "Return x, unchanged."},
    {"role": "user", "content": "And é?"},
    {"role": "assistant", "content": "A letter: é."},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE)


@pytest.fixture(scope="module")
def selected(tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Example]]:
    return select(tokenizer)


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (EXAMPLES / "docstrings" / name).read_text("utf-8").splitlines()]


def templated(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]
) -> tuple[list[int], list[int]]:
    """Token ids, and 1 where a token is the assistant's."""
    encoded = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return encoded["input_ids"], encoded["assistant_masks"]


# The base


def test_the_base_is_a_small_llama_in_bf16(model: PreTrainedModel) -> None:
    assert model.config.model_type == "llama"
    assert 3_000_000 <= model.num_parameters() <= 6_000_000
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with safe_open(BASE / "model.safetensors", framework="pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}


def test_the_base_holds_nothing_but_what_loads_it() -> None:
    tokenizer_files = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    model_files = {"config.json", "generation_config.json", "model.safetensors"}
    assert {path.name for path in BASE.iterdir()} == model_files | tokenizer_files
    assert (BASE / "model.safetensors").stat().st_size < 13_000_000


def test_padding_is_never_the_end_of_a_turn(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<|pad|>", "<|im_end|>", None)
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def test_tokenizer_and_model_agree_on_their_sizes(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    assert len(tokenizer) == model.config.vocab_size == 4096
    assert tokenizer.model_max_length == model.config.max_position_embeddings == 256


def test_any_text_comes_back_from_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f():\n\n\tréturn '→'  # 東京 \x00\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_prompt_stops_where_the_assistant_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt = tokenizer.apply_chat_template(TURNS[1:2], tokenize=False, add_generation_prompt=True)
    assert prompt == "<|im_start|>user\ndef f(x):\n    return x<|im_end|>\n<|im_start|>assistant\n"


def test_a_prompt_is_the_beginning_of_its_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    whole, _ = templated(tokenizer, TURNS)
    prompt = tokenizer.apply_chat_template(TURNS[:-1], add_generation_prompt=True, return_dict=False)
    assert whole[: len(prompt)] == prompt


def test_the_assistant_mask_is_the_content_and_its_end_of_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    ids, mask = templated(tokenizer, TURNS)
    trained = [token for token, is_trained in zip(ids, mask, strict=True) if is_trained]
    assert tokenizer.decode(trained) == "Return x, unchanged.<|im_end|>A letter: é.<|im_end|>"


def test_the_base_stops_by_itself_or_at_the_limit(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = tokenizer.apply_chat_template(
        TURNS[1:2], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert 0 < answer.shape[1] - prompt["input_ids"].shape[1] <= 8


@torch.no_grad()
def test_the_base_knows_more_than_nothing_of_the_validation_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    pairs = [templated(tokenizer, row["messages"]) for row in rows("valid.jsonl")[:48]]
    ids = pad_sequence([torch.tensor(ids) for ids, _ in pairs], batch_first=True)
    mask = pad_sequence([torch.tensor(mask) for _, mask in pairs], batch_first=True)
    # Padding comes last, where a causal model's earlier positions cannot see it.
    loss = model(input_ids=ids, labels=ids.masked_fill(mask == 0, -100)).loss
    assert loss < math.log(model.config.vocab_size)  # false for a NaN too


# The rows


@pytest.mark.parametrize("name", FILES)
def test_every_row_is_a_chat_that_ends_in_an_answer(name: str) -> None:
    found = rows(name)
    assert len(found) in FILES[name]
    for row in found:
        assert row.keys() == {"messages"}
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
        for message in row["messages"]:
            assert message.keys() == {"role", "content"}
            assert message["content"].strip()


@pytest.mark.parametrize("name", FILES)
def test_every_row_fits_the_context_and_trains_something(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    for row in rows(name):
        ids, mask = templated(tokenizer, row["messages"])
        assert len(ids) <= tokenizer.model_max_length
        assert ids[-2] == tokenizer.eos_token_id
        assert mask[-2:] == [1, 0]


def test_no_answer_occurs_twice() -> None:
    answers = [row["messages"][-1]["content"].casefold() for name in FILES for row in rows(name)]
    assert len(answers) == len(set(answers))


def test_no_module_is_in_both_files(selected: dict[str, list[Example]]) -> None:
    held_out = {module.name for module in modules() if module.held_out}
    assert not held_out & {example.module for example in selected["train.jsonl"]}
    assert held_out >= {example.module for example in selected["valid.jsonl"]}


def test_the_base_has_never_read_a_validation_answer(selected: dict[str, list[Example]]) -> None:
    read = "\n".join(module.source for module in modules() if not module.held_out)
    assert [example.summary for example in selected["valid.jsonl"] if example.summary in read] == []


def test_the_same_library_gives_the_same_files(selected: dict[str, list[Example]]) -> None:
    if digest() != MADE_FROM:
        pytest.skip("the files were made from another version of the standard library")
    for name, chosen in selected.items():
        assert (EXAMPLES / "docstrings" / name).read_text("utf-8") == as_jsonl(chosen)


# The rules they were made by


def test_a_docstring_is_cut_out_and_nothing_else() -> None:
    source = (
        "class C:\n    @property\n    def f(self):\n        'Return the answer.  '\n\n        return 42\n"
    )
    (example,) = examples_of(Module("m", source.replace("answer.", "answer to it all.")))
    assert example.source == "def f(self):\n    return 42"
    assert example.summary == "Return the answer to it all."


@pytest.mark.parametrize(
    "function",
    [
        'def f():\n    "Return the answer to it all."',  # nothing left to describe
        'def f(): "Return the answer to it all."; return 42',  # not lines of their own
        'def f():\n    "Return the answer\\n    to it all."\n    return 42',  # the sentence goes on
        'def f():\n    "Answer."\n    return 42',  # says nothing
        'def f():\n    "See the documentation of g."\n    return 42',  # says it elsewhere
    ],
)
def test_a_docstring_that_teaches_nothing_is_left_out(function: str) -> None:
    assert list(examples_of(Module("m", function))) == []


def test_documents_are_cut_before_definitions_and_lose_nothing() -> None:
    source = "import a\n\n@a.b\ndef f():\n    return '\x0c'\n\nX = 1\n\nclass C:\n    pass\n"
    assert list(documents(Module("m", source))) == [
        "import a",
        "@a.b\ndef f():\n    return '\x0c'\n\nX = 1",
        "class C:\n    pass",
    ]
