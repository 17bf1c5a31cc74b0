"""Which tokens of a record are trained, and how examples become batches."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from olora_core.bases.loading import Base
from olora_core.data.batches import IGNORED, epoch_order, micro_batches, steps_per_epoch
from olora_core.data.encoding import first_tokens
from olora_core.data.examples import Examples
from olora_core.data.tokenising import overlap_note
from olora_core.data.turns import end_of_turn_tokens
from olora_core.errors import DataError, ModelError
from olora_core.progress import Note
from tests.tiny_base import make_tokenizer

from ..runs import tokenised

EXAMPLE_BASE = Path(__file__).resolve().parents[3] / "examples" / "base"

PLAIN_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
MARKS_WITHOUT_END = PLAIN_CHATML.replace(
    "message['content'] + '<|im_end|>\\n' -}}",
    "'' -}}{%- if message['role'] == 'assistant' -%}{%- generation -%}{{- message['content'] -}}"
    "{%- endgeneration -%}{%- else -%}{{- message['content'] -}}{%- endif -%}{{- '<|im_end|>\\n' -}}",
)
THINKING = PLAIN_CHATML.replace(
    "+ message['content'] +",
    "+ ('<think></think>' if loop.last and message['role'] == 'assistant' else '') + message['content'] +",
)
WITHOUT_END = PLAIN_CHATML.replace("<|im_end|>", "\\n")
CHANGING_HEADER = PLAIN_CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>'")
FORGETTING = PLAIN_CHATML.replace("message['content']", "(message['content'] if loop.last else 'gone')")
COUNTING = PLAIN_CHATML.replace(
    "message['content']", "message['content'] + (message['content'] | length | string)"
)
STRICT = "{%- if messages[0]['role'] == 'system' -%}{{ raise_exception('no system message') }}{%- endif -%}"
WITH_TOOLS = PLAIN_CHATML.replace(
    "message['content'] +",
    "message['content'] + (message.tool_calls[0].function.name + "
    "(message.tool_calls[0].function.arguments | tojson) if message.tool_calls else '') +",
)


def chat(*turns: tuple[str, str] | dict[str, Any]) -> dict[str, Any]:
    return {"messages": [t if isinstance(t, dict) else {"role": t[0], "content": t[1]} for t in turns]}


QUESTION, ANSWER = ("user", "Why?"), ("assistant", "Because.")


@pytest.fixture
def tokenizer(llama: Base) -> PreTrainedTokenizerBase:
    return llama.tokenizer


def run(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, rows: Iterable[dict[str, Any]], context: int = 4096
) -> tuple[Examples, list[Note]]:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ends = end_of_turn_tokens(tokenizer)
    return tokenised(path, tokenizer, context_length=context, end_tokens=ends)


def trained_text(tokenizer: PreTrainedTokenizerBase, examples: Examples, i: int = 0) -> str:
    tokens, trained = examples.row(i)
    return tokenizer.decode(tokens[trained].tolist())


@pytest.mark.parametrize("template", [None, PLAIN_CHATML, MARKS_WITHOUT_END])
def test_only_the_answers_and_their_ends_are_trained(tmp_path, tokenizer, template) -> None:
    if template:
        tokenizer.chat_template = template
    rows = [chat(("system", "Be."), QUESTION, ANSWER, ("user", "Öh?"), ("assistant", "Für 🙂 dich"))]
    examples, _ = run(tmp_path, tokenizer, rows)
    assert trained_text(tokenizer, examples) == "Because.<|im_end|>Für 🙂 dich<|im_end|>"
    whole = tokenizer.decode(examples.row(0)[0].tolist())
    assert whole == tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)


@pytest.mark.parametrize("template", [None, PLAIN_CHATML])
def test_a_message_of_weight_0_is_not_trained(tmp_path, tokenizer, template) -> None:
    if template:
        tokenizer.chat_template = template
    silent = {"role": "assistant", "content": "No.", "weight": 0}
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, silent, QUESTION, ANSWER)])
    assert trained_text(tokenizer, examples) == "Because.<|im_end|>"


def test_pad_and_end_may_be_the_same_token(tmp_path, tokenizer) -> None:
    tokenizer.pad_token = tokenizer.eos_token
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, ANSWER), chat(("user", "?"), ANSWER)])
    (batch,) = micro_batches(
        examples, np.array([0, 1]), size=2, tokens=4096, packing=False, pad_token=tokenizer.pad_token_id
    )
    trained_ends = (batch.labels == tokenizer.eos_token_id).sum(dim=1)
    assert trained_ends.tolist() == [1, 1]


def test_a_template_that_writes_the_last_answer_in_its_own_way_is_masked_right(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = THINKING
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, ANSWER, QUESTION, ("assistant", "So."))])
    assert trained_text(tokenizer, examples) == "Because.<|im_end|><think></think>So.<|im_end|>"


def test_a_conversation_may_begin_with_an_answer(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = PLAIN_CHATML
    examples, _ = run(tmp_path, tokenizer, [chat(("assistant", "Hi."), QUESTION, ANSWER)])
    assert trained_text(tokenizer, examples) == "Hi.<|im_end|>Because.<|im_end|>"


def test_an_earlier_answer_may_lack_what_the_prompt_adds(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = CHANGING_HEADER
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, ANSWER, QUESTION, ("assistant", "So."))])
    assert trained_text(tokenizer, examples) == "Because.<|im_end|>So.<|im_end|>"


def test_an_answer_that_the_template_does_not_write_is_an_error(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = FORGETTING
    with pytest.raises(DataError, match=r"Line 1: .* does not write the content of message 1, an answer"):
        run(tmp_path, tokenizer, [chat(QUESTION, ANSWER, QUESTION, ANSWER)])


def test_a_template_that_cannot_be_masked_is_an_error(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = COUNTING
    with pytest.raises(DataError, match=r"Line 1: .* cannot be masked") as caught:
        run(tmp_path, tokenizer, [chat(QUESTION, ANSWER, QUESTION, ANSWER)])
    assert "weight 0" in caught.value.message


def test_a_template_that_refuses_a_role_is_named_with_the_line(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = STRICT + PLAIN_CHATML
    with pytest.raises(DataError, match=r"Line 2: .* refuses it: no system message"):
        run(tmp_path, tokenizer, [chat(QUESTION, ANSWER), chat(("system", "x"), QUESTION, ANSWER)])


def test_a_template_without_an_end_of_turn_is_an_error(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = WITHOUT_END
    with pytest.raises(DataError, match=r"Line 1 .* never stop"):
        run(tmp_path, tokenizer, [chat(QUESTION, ANSWER)])


def test_a_base_without_a_template_says_so(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        run(tmp_path, tokenizer, [chat(QUESTION, ANSWER)])


def test_the_developer_role_is_the_systems(tmp_path, tokenizer) -> None:
    examples, _ = run(tmp_path, tokenizer, [chat(("developer", "Be."), QUESTION, ANSWER)])
    assert tokenizer.decode(examples.row(0)[0].tolist()).startswith("<|im_start|>system\nBe.")


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_tool_calls_are_trained_and_their_arguments_are_objects(tmp_path, tokenizer, arguments) -> None:
    tokenizer.chat_template = WITH_TOOLS
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    caller = {"role": "assistant", "content": None, "tool_calls": [call]}
    result = {"role": "tool", "content": "2", "tool_call_id": "c"}
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, caller, result, ANSWER)])
    assert trained_text(tokenizer, examples) == 'f{"a": 1}<|im_end|>Because.<|im_end|>'


def test_a_completion_is_trained_with_its_end_and_its_prompt_is_not(tmp_path, tokenizer) -> None:
    examples, _ = run(tmp_path, tokenizer, [{"prompt": "1 + 1 =", "completion": " 2"}])
    assert tokenizer.decode(examples.row(0)[0].tolist()) == "1 + 1 = 2<|im_end|>"
    assert trained_text(tokenizer, examples) == " 2<|im_end|>"


def test_a_completion_of_messages_trains_only_the_completion(tmp_path, tokenizer) -> None:
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    examples, _ = run(tmp_path, tokenizer, [row])
    assert trained_text(tokenizer, examples) == "d<|im_end|>"


def add_bos(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes the tokenizer begin every text with <|im_start|>, as many models' tokenizers begin with <s>."""
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )


def test_there_is_one_begin_of_sequence_token(tmp_path, tokenizer) -> None:
    add_bos(tokenizer)
    rows = [{"prompt": "a", "completion": "b"}]
    examples, _ = run(tmp_path, tokenizer, rows)
    assert tokenizer.decode(examples.row(0)[0].tolist()) == "<|im_start|>ab<|im_end|>"
    assert trained_text(tokenizer, examples) == "b<|im_end|>"
    examples, _ = run(tmp_path, tokenizer, [chat(QUESTION, ANSWER)])
    assert examples.row(0)[0].tolist().count(tokenizer.bos_token_id) == 2  # one for each message, none before


def test_two_begin_of_sequence_tokens_are_an_error(tmp_path, tokenizer) -> None:
    add_bos(tokenizer)
    with pytest.raises(DataError, match=r"Line 1 .* two begin-of-sequence"):
        run(tmp_path, tokenizer, [{"prompt": "<|im_start|>a", "completion": "b"}])


def test_a_long_row_is_cut_and_named(tmp_path, tokenizer) -> None:
    rows = [chat(QUESTION, ANSWER), chat(QUESTION, ("assistant", "x" * 100))]
    examples, notes = run(tmp_path, tokenizer, rows, context=60)
    assert examples.lengths.tolist()[1] == 60
    (cut,) = [note for note in notes if note.data and note.data.get("code") == "n_too_long"]
    assert cut.data == {"code": "n_too_long", "lines": [2], "count": 1}
    assert "cut at 60 tokens (line 2)" in cut.message


def test_a_row_whose_answer_is_cut_away_is_left_out_and_named(tmp_path, tokenizer) -> None:
    rows = [chat(("user", "x" * 100), ANSWER), chat(QUESTION, ANSWER)]
    examples, notes = run(tmp_path, tokenizer, rows, context=60)
    assert examples.lines.tolist() == [2]
    (left_out,) = [note for note in notes if note.data and note.data.get("code") == "no_trained_token"]
    assert left_out.data["lines"] == [1]


def test_no_row_with_a_trained_token_is_an_error(tmp_path, tokenizer) -> None:
    with pytest.raises(DataError, match="context_length"):
        run(tmp_path, tokenizer, [chat(("user", "x" * 100), ANSWER)], context=60)


def test_repeated_and_shared_rows_are_named(tmp_path, tokenizer) -> None:
    one, two, three = (chat(QUESTION, ("assistant", text)) for text in ("1", "2", "3"))
    training, notes = run(tmp_path, tokenizer, [one, two, one])
    assert [n.data["lines"] for n in notes if n.data and n.data.get("code") == "duplicate"] == [[3]]
    validation, _ = run(tmp_path, tokenizer, [three, two])
    note = overlap_note(training, validation)
    assert note is not None
    assert note.data["lines"] == [2]
    assert overlap_note(training, validation.first(1)) is None


def test_the_first_token_of_a_row_is_never_trained(tmp_path, tokenizer) -> None:
    examples, _ = run(tmp_path, tokenizer, [{"prompt": "", "completion": "ab"}])
    assert examples.row(0)[1].tolist() == [False, True, True]
    assert examples.trained_lengths.tolist() == [2]


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = epoch_order(50, seed=3, epoch=0)
    assert torch.equal(torch.get_rng_state(), before)
    assert first.tolist() == epoch_order(50, seed=3, epoch=0).tolist()
    assert sorted(first.tolist()) == list(range(50))
    others = [epoch_order(50, seed=3, epoch=1), epoch_order(50, seed=4, epoch=0)]
    assert all(other.tolist() != first.tolist() for other in others)


@pytest.fixture
def examples(tmp_path, tokenizer) -> Examples:
    rows = [chat(("user", "q" * (5 * i % 7)), ("assistant", "a" * (1 + 3 * i % 11))) for i in range(11)]
    return run(tmp_path, tokenizer, rows)[0]


@pytest.mark.parametrize("packing", [False, True])
def test_micro_batches_hold_exactly_the_batchs_rows(examples, packing) -> None:
    rows = epoch_order(11, seed=0, epoch=0)[:7]
    batches = micro_batches(examples, rows, size=3, tokens=4096, packing=packing, pad_token=0)
    assert len(batches) == 3
    assert sum(b.tokens for b in batches) == examples.lengths[rows].sum()
    assert sum(b.trained_tokens for b in batches) == examples.trained_lengths[rows].sum()
    assert sum(int((b.labels != IGNORED).sum()) for b in batches) == examples.trained_lengths[rows].sum()


def test_micro_batches_pad_little(examples) -> None:
    batches = micro_batches(examples, np.arange(11), size=1, tokens=4096, packing=False, pad_token=0)
    lengths = [b.input_ids.shape[1] for b in batches]
    assert lengths == sorted(examples.lengths.tolist(), reverse=True)


def test_pads_are_not_trained_and_labels_stand_at_their_tokens(examples) -> None:
    (batch,) = micro_batches(examples, np.arange(11), size=11, tokens=4096, packing=False, pad_token=0)
    trained = batch.labels != IGNORED
    assert torch.equal(batch.labels[trained], batch.input_ids[trained])
    assert not trained[batch.input_ids == 0].any()


def test_a_packed_row_starts_its_positions_again_at_each_example(examples) -> None:
    (batch,) = micro_batches(examples, np.arange(4), size=4, tokens=4096, packing=True, pad_token=0)
    assert batch.position_ids is not None
    starts = (batch.position_ids[0] == 0).nonzero().flatten().tolist()
    lengths = sorted(examples.lengths[:4].tolist(), reverse=True)
    begun = [0, *np.cumsum(lengths)[:-1].tolist()]
    assert starts[:4] == begun
    assert all(batch.labels[0, start] == IGNORED for start in starts)


def test_a_packed_row_is_filled_to_a_whole_where_there_is_room(examples) -> None:
    (alone,) = micro_batches(examples, np.arange(4), size=4, tokens=4096, packing=True, pad_token=7)
    tokens = int(examples.lengths[:4].sum())
    whole = -(-tokens // 64) * 64
    assert alone.input_ids.shape == alone.labels.shape == alone.position_ids.shape == (1, whole)
    assert alone.tokens == tokens
    assert alone.segments == (*alone.lengths, whole - tokens)
    assert alone.is_token.tolist() == [[True] * tokens + [False] * (whole - tokens)]
    assert (alone.input_ids[0, tokens:] == 7).all()
    assert (alone.labels[0, tokens:] == IGNORED).all()
    assert (alone.position_ids[0, tokens:] == 0).all()
    (full,) = micro_batches(examples, np.arange(4), size=4, tokens=tokens, packing=True, pad_token=7)
    assert full.input_ids.shape == (1, tokens)
    assert full.segments == full.lengths


@pytest.mark.parametrize(("rows", "batch", "steps"), [(10, 4, 3), (8, 4, 2), (1, 4, 1)])
def test_the_last_incomplete_batch_counts(rows, batch, steps) -> None:
    assert steps_per_epoch(rows, batch) == steps


def test_an_example_keeps_its_digest_and_another_mask_changes_it(examples) -> None:
    other = Examples(examples.tokens, ~examples.trained, examples.offsets, examples.lines)
    again = Examples(examples.tokens.copy(), examples.trained.copy(), examples.offsets, examples.lines)
    assert again.digest == examples.digest
    assert other.digest != examples.digest


# --- plain text, and formats that become conversations -------------------------------------------------


def test_of_a_plain_text_every_token_but_the_first_is_trained(tmp_path, tokenizer) -> None:
    examples, _ = run(tmp_path, tokenizer, [{"text": "Für 🙂"}])
    tokens, trained = examples.row(0)
    assert tokenizer.decode(tokens.tolist()) == "Für 🙂<|im_end|>"
    assert trained.tolist() == [False, *[True] * (len(tokens) - 1)]


def test_a_text_begins_as_the_tokenizer_begins_texts(tmp_path, tokenizer) -> None:
    add_bos(tokenizer)
    examples, _ = run(tmp_path, tokenizer, [{"text": "ab"}])
    assert tokenizer.decode(examples.row(0)[0].tolist()) == "<|im_start|>ab<|im_end|>"
    assert trained_text(tokenizer, examples) == "ab<|im_end|>"


@pytest.mark.parametrize("length", [9, 10, 11, 18, 19, 20, 27, 28, 100])
def test_a_long_text_is_split_so_that_every_token_is_predicted_once(tmp_path, tokenizer, length) -> None:
    text = "".join(chr(ord("a") + i % 26) for i in range(length))
    examples, notes = run(tmp_path, tokenizer, [{"text": "x"}, {"text": text}], context=10)
    pieces = [examples.row(i) for i in range(1, len(examples))]
    assert all(2 <= len(tokens) <= 10 for tokens, _ in pieces)
    assert all(len(tokens) == 10 for tokens, _ in pieces[:-1])
    predicted = [token for tokens, trained in pieces for token in tokens[trained].tolist()]
    assert tokenizer.decode([pieces[0][0][0], *predicted]) == text + "<|im_end|>"
    assert set(examples.lines.tolist()[1:]) == {2}
    told = [note for note in notes if note.data and note.data.get("code") == "split"]
    assert [note.data["lines"] for note in told] == ([[2]] if length > 9 else [])
    assert not any(note.data and note.data.get("code") == "n_too_long" for note in notes)


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Why?", "output": "Because.", "history": [["Öh?", "Für 🙂 dich"]], "system": "Be."},
        {
            "conversations": [
                {"from": "human", "value": "Öh?"},
                {"from": "gpt", "value": "Für 🙂 dich"},
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "Because."},
            ],
            "system": "Be.",
        },
    ],
)
def test_instructions_and_turns_train_as_the_conversation_they_are(tmp_path, tokenizer, row) -> None:
    spelled, _ = run(tmp_path, tokenizer, [row])
    conversation = chat(
        ("system", "Be."), ("user", "Öh?"), ("assistant", "Für 🙂 dich"), ("user", "Why?"), ANSWER
    )
    written, _ = run(tmp_path, tokenizer, [conversation])
    assert spelled.digest == written.digest
    assert trained_text(tokenizer, spelled) == "Für 🙂 dich<|im_end|>Because.<|im_end|>"


def test_a_place_is_called_by_what_its_container_counts(tmp_path, tokenizer) -> None:
    path = tmp_path / "rows"
    path.write_text(json.dumps([{"prompt": "a", "completion": "b"}] * 2, indent=1))
    examples, notes = tokenised(path, tokenizer, context_length=99, end_tokens=frozenset({2}))
    assert examples.lines.tolist() == [1, 2]
    assert "(element 2)" in notes[-1].message
    tokenizer.chat_template = WITHOUT_END
    path.write_text(json.dumps([chat(QUESTION, ANSWER)]))
    with pytest.raises(DataError, match="Element 1 of the training file has an answer with no end-of-turn"):
        tokenised(path, tokenizer, context_length=99, end_tokens=frozenset({2}))


# --- positions in text ---------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["Für 🙂 dich, und 日本語!", "  two  spaces ", "a", "<|im_end|>b"])
def test_the_token_at_a_character_is_the_first_that_begins_there_or_behind(text) -> None:
    for folder in (EXAMPLE_BASE, None):
        core = make_tokenizer() if folder is None else AutoTokenizer.from_pretrained(folder)
        (encoding,) = core.backend_tokenizer.encode_batch([text], add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        positions = range(len(text) + 1)
        expected = [
            next((i for i, start in enumerate(starts) if start >= position), len(starts))
            for position in positions
        ]
        assert first_tokens(encoding, positions) == expected
