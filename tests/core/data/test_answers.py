"""Conversations: what is reported, refused or not trained, and in which form a template gets them."""

import json
from datetime import date

import numpy as np
import pytest
from transformers import PreTrainedTokenizerBase

from olora_core.bases.loading import Base
from olora_core.data.answers import Answers
from olora_core.data.templates import ChatTemplate
from olora_core.data.turns import end_of_turn_tokens
from olora_core.errors import DataError, ModelError

from .chat_templates import DAY, FAMILIES, RESULT, TOOLS, answers_of, assistant, call, trained, user
from .reading import read
from .test_tokenising import PLAIN_CHATML, chat

WITH_CALLS = PLAIN_CHATML.replace(
    "+ message['content'] +",
    "+ (message['content'] or '') + (message.tool_calls[0].id + ':' + message.tool_calls[0].function.name + "
    "message.tool_calls[0].function.arguments | string if message.tool_calls else '') +",
)


@pytest.fixture
def tokenizer(llama: Base) -> PreTrainedTokenizerBase:
    llama.tokenizer.chat_template = PLAIN_CHATML
    return llama.tokenizer


def answers(tokenizer: PreTrainedTokenizerBase, template: str = PLAIN_CHATML, **options: bool) -> Answers:
    tokenizer.chat_template = template
    return Answers(ChatTemplate(tokenizer, DAY), end_of_turn_tokens(tokenizer), **options)


# --- what the template does not write ------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "I look."])
@pytest.mark.parametrize("name", ["llama3", "lfm2", "phi3"])
def test_calls_that_the_template_does_not_write_are_refused(name: str, text: str) -> None:
    messages = [user("One?"), assistant(text, tool_calls=call(city="Paris"))]
    with pytest.raises(DataError, match=r"Line 3: .* does not write the tool calls of message 1"):
        answers_of(name, FAMILIES[name]).render("Line 3", messages, TOOLS)


def test_numbers_that_the_template_does_not_write_are_refused(tokenizer) -> None:
    template = PLAIN_CHATML.replace(
        "+ message['content'] +",
        "+ message['content'] + (message.tool_calls[0].function.name if message.tool_calls else '') +",
    )
    messages = [user("One?"), assistant("", tool_calls=call(days=3))]
    with pytest.raises(DataError, match="all arguments of the tool calls of message 1"):
        answers(tokenizer, template).render("Line 3", messages, TOOLS)


@pytest.mark.parametrize("name", ['a "quoted" name', "back\\slash", "größe"])
def test_a_numbers_name_may_be_written_as_json_escapes_it(name: str) -> None:
    messages = [user("One?"), assistant("", tool_calls=call(**{name: 3}))]
    (span,) = trained(answers_of("qwen3", FAMILIES["qwen3"]).render("Line 3", messages, TOOLS))
    assert json.dumps({name: 3}, ensure_ascii=False) in span


def test_calls_that_are_not_trained_need_not_be_written() -> None:
    found = answers_of("llama3", FAMILIES["llama3"]).render(
        "Line 3",
        [user("?"), assistant("", tool_calls=call(city="Paris"), weight=0), RESULT, assistant("So.")],
        TOOLS,
    )
    assert trained(found) == ["So.<|eot_id|>"]


def test_lines_whose_reasoning_is_not_trained_are_named(tmp_path, tokenizer) -> None:
    thoughtful = chat(("user", "?"), {"role": "assistant", "content": "So.", "reasoning_content": "Hm."})
    examples, notes = read(tmp_path, tokenizer, [chat(("user", "!"), ("assistant", "No.")), thoughtful])
    (told,) = [note for note in notes if note.data and note.data.get("code") == "reasoning_not_written"]
    assert (told.level, told.data["lines"]) == ("warn", [2])
    tokens, mask = examples.row(1)
    assert tokenizer.decode(tokens[mask]) == "So.<|im_end|>"


def test_content_beside_calls_that_is_not_trained_is_named() -> None:
    messages = [user("One?"), assistant("I look.", tool_calls=call(city="Paris"))]
    found = answers_of("llama3_1", FAMILIES["llama3_1"]).render("Line 3", messages, TOOLS)
    assert found.untrained == {"content"}
    assert "I look" not in found.text


def test_an_answer_without_an_end_is_refused_even_if_another_has_one(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = PLAIN_CHATML.replace(
        "+ '<|im_end|>\\n'", "+ ('<|im_end|>\\n' if loop.last else '')"
    )
    read(tmp_path, tokenizer, [chat(("user", "?"), ("assistant", "So."))])
    with pytest.raises(
        DataError, match="Line 1 of the training file has an answer with no end-of-turn token"
    ):
        read(
            tmp_path,
            tokenizer,
            [chat(("user", "?"), ("assistant", "A."), ("user", "?"), ("assistant", "B."))],
        )


# --- reasoning -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_trained_however_it_is_called(key: str) -> None:
    messages = [user("2+2?"), assistant("Four.", **{key: "Two and two."})]
    found = answers_of("qwen3", FAMILIES["qwen3"]).render("Line 1", messages, None)
    assert trained(found) == ["<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [("qwen3", "Four.<|im_end|>"), ("gptoss", "Four.<|return|>"), ("glm4moe", "Four.<|user|>")],
)
def test_the_final_answer_can_be_trained_alone(name: str, expected: str) -> None:
    messages = [user("2+2?"), assistant("Four.", reasoning_content="Two and two.")]
    found = answers_of(name, FAMILIES[name], reasoning=False).render("Line 1", messages, None)
    assert "Two and two." in found.text
    assert trained(found) == [expected]


def test_a_thought_written_into_the_content_is_one(tokenizer) -> None:
    messages = [user("2+2?"), assistant("<think>\nTwo and two.\n</think>\n\nFour.")]
    assert trained(answers(tokenizer, reasoning=False).render("Line 1", messages, None)) == [
        "Four.<|im_end|>"
    ]
    whole = answers(tokenizer).render("Line 1", messages, None)
    assert trained(whole) == ["<think>\nTwo and two.\n</think>\n\nFour.<|im_end|>"]


def test_a_call_after_a_thought_is_trained_without_it() -> None:
    messages = [user("One?"), assistant("", reasoning_content="Hm.", tool_calls=call(city="Paris"))]
    (span,) = trained(
        answers_of("qwen3", FAMILIES["qwen3"], reasoning=False).render("Line 1", messages, TOOLS)
    )
    assert "Hm." not in span
    assert '"Paris"' in span
    assert "<tool_call>" in span


# --- forms that a template asks for --------------------------------------------------------------------


def test_arguments_printed_as_python_become_json(tokenizer) -> None:
    messages = [user("One?"), assistant("", tool_calls=call(city="Paris", rain=True))]
    (span,) = trained(answers(tokenizer, WITH_CALLS).render("Line 1", messages, None))
    assert '{"city": "Paris", "rain": true}' in span


MISTRAL = (
    "{%- for message in messages -%}{%- for call in message.tool_calls or [] -%}"
    "{%- if call.id | length != 9 -%}{{- raise_exception('ids have nine characters') -}}{%- endif -%}"
    "{%- endfor -%}{%- endfor -%}" + WITH_CALLS
)


def test_ids_are_made_to_fit_where_a_family_constrains_them(tokenizer) -> None:
    called = call(city="Paris")
    called[0]["id"] = "call_0123456789abcdef"
    result = RESULT | {"tool_call_id": called[0]["id"]}
    messages = [user("One?"), assistant("", tool_calls=called), result, assistant("So.")]
    first, _ = trained(answers(tokenizer, MISTRAL).render("Line 1", messages, None))
    found, _, _ = first.partition(":")
    assert len(found) == 9
    assert found.isalnum()
    free, _ = trained(answers(tokenizer, WITH_CALLS).render("Line 1", messages, None))
    assert free.startswith("call_0123456789abcdef:")


WITH_RESULTS = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'user' -%}{{- '[ASK]' + message.content + '[/ASK]' -}}"
    "{%- elif message.role == 'tool' -%}"
    "{{- '[RESULT]' + message.content + ' of ' + message.tool_call_id + '[/RESULT]' -}}"
    "{%- elif message.tool_calls -%}{%- for call in message.tool_calls -%}"
    "{{- '[CALL]' + call.function | tojson + ' as ' + call.id -}}{%- endfor -%}{{- '<|im_end|>' -}}"
    "{%- else -%}{{- message.content + '<|im_end|>' -}}{%- endif -%}{%- endfor -%}"
)


@pytest.mark.parametrize("name", ["abcdefgh1", "call_0123456789abcdef"])
def test_a_result_may_be_followed_by_the_id_of_its_call(tokenizer, name) -> None:
    called = call(city="Paris")
    called[0]["id"] = name
    result = RESULT | {"tool_call_id": name}
    messages = [
        user("One?"),
        assistant("", tool_calls=called),
        result,
        assistant("So."),
        user("?"),
        assistant("No."),
    ]
    found = trained(answers(tokenizer, WITH_RESULTS).render("Line 1", messages, None))
    assert found == [
        f'[CALL]{{"name": "get_weather", "arguments": {{"city": "Paris"}}}} as {name}<|im_end|>',
        "So.<|im_end|>",
        "No.<|im_end|>",
    ]


def test_content_in_parts_where_a_template_reads_nothing_else(tokenizer) -> None:
    template = PLAIN_CHATML.replace("message['content']", "message['content'][0]['text']")
    messages = [user("One?"), assistant("First."), user("Two?"), assistant("Second.")]
    found = answers(tokenizer, template).render("Line 1", messages, None)
    assert trained(found) == ["First.<|im_end|>", "Second.<|im_end|>"]


# --- control tokens ------------------------------------------------------------------------------------


CONTROLLED = [
    [user("What is <|im_end|>?"), assistant("An end.")],
    [{"role": "system", "content": "<|im_start|>"}, user("?"), assistant("So.")],
    [user("?"), assistant("It is <|im_end|> and more.")],
    [user("?"), assistant("", tool_calls=call(text="<|im_end|>"))],
]


@pytest.mark.parametrize("messages", CONTROLLED)
def test_a_control_token_inside_a_message_is_refused(tmp_path, tokenizer, messages) -> None:
    rows = [chat(("user", "!"), ("assistant", "No.")), {"messages": messages}]
    with pytest.raises(
        DataError, match=r"Line 2: message \d contains <\|im_(start|end)\|>, a control token"
    ) as caught:
        read(tmp_path, tokenizer, rows)
    assert 'control_tokens = "text"' in caught.value.message


@pytest.mark.parametrize("messages", CONTROLLED[:3])
def test_a_control_token_can_be_ordinary_text(tmp_path, tokenizer, messages) -> None:
    examples, _ = read(tmp_path, tokenizer, [{"messages": messages}], literal=True)
    tokens, mask = examples.row(0)
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(tokens.tolist()) == text
    start, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert np.count_nonzero(tokens == start) == np.count_nonzero(tokens == end) == len(messages)
    assert tokenizer.decode(tokens[mask].tolist()) == messages[-1]["content"] + "<|im_end|>"


def test_private_characters_in_a_text_are_no_marks(tokenizer) -> None:
    messages = [
        user("\U000f0000?"),
        assistant("\U000f0001\U000f0002 So \U0010fffd."),
        user("?"),
        assistant("No."),
    ]
    found = answers(tokenizer).render("Line 1", messages[:2], None)
    assert trained(found) == ["\U000f0001\U000f0002 So \U0010fffd.<|im_end|>"]


# --- weights -------------------------------------------------------------------------------------------


def test_weights_of_messages_and_rows_multiply(tmp_path, tokenizer) -> None:
    half = {"role": "assistant", "content": "A.", "weight": 0.5}
    rows = [
        chat(("user", "?"), half, ("user", "?"), ("assistant", "B.")),
        chat(("user", "?"), ("assistant", "C.")),
    ]
    rows[0]["weight"] = 0.5
    drafted = answers(tokenizer).render("Line 1", rows[0]["messages"], None)
    assert [span.weight for span in drafted.spans] == [0.5, 1.0]


# --- today's date --------------------------------------------------------------------------------------

DATED = "{{- '<|im_start|>system\\nToday is ' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}" + PLAIN_CHATML


def test_today_is_the_day_that_is_given(tokenizer) -> None:
    tokenizer.chat_template = DATED
    text, _ = ChatTemplate(tokenizer, date(2025, 2, 3)).render([user("?")])
    assert text.startswith("<|im_start|>system\nToday is 03 Feb 2025<|im_end|>")


def test_a_date_of_a_computed_format_is_refused(tokenizer) -> None:
    tokenizer.chat_template = "{%- set form = '%Y' -%}{{ strftime_now(form) }}" + PLAIN_CHATML
    with pytest.raises(ModelError, match="strftime_now"):
        ChatTemplate(tokenizer, DAY).render([user("?")])


def test_a_base_whose_template_cannot_be_fixed_to_a_day_still_trains_on_text(tmp_path, tokenizer) -> None:
    tokenizer.chat_template = "{%- set form = '%Y' -%}{{ strftime_now(form) }}" + PLAIN_CHATML
    examples, _ = read(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}])
    assert tokenizer.decode(examples.row(0)[0].tolist()) == "ab<|im_end|>"
    with pytest.raises(ModelError, match="strftime_now"):
        read(tmp_path, tokenizer, [chat(("user", "?"), ("assistant", "So."))])


# --- time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 100])
def test_a_conversation_is_rendered_twice_however_long_it_is(tokenizer, monkeypatch, turns) -> None:
    found = answers(tokenizer)
    found.turns(None)
    rendered = []
    render = ChatTemplate.render
    monkeypatch.setattr(
        ChatTemplate, "render", lambda *given, **more: rendered.append(0) or render(*given, **more)
    )
    messages = [message for i in range(turns) for message in (user(f"{i}?"), assistant(f"It is {i}."))]
    assert trained(found.render("Line 1", messages, None)) == [f"It is {i}.<|im_end|>" for i in range(turns)]
    assert len(rendered) == 2
