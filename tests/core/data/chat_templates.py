"""Chat templates of today's families, conversations of every kind, and what of them has to be trained.

The templates are those that TRL ships. The reference is a mask of its own: regular expressions for a family's
headers and ends, on the text that the template writes. Run as a program, this prints the table of
docs/models.md: `python -m tests.core.data.chat_templates`.
"""

import json
import re
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import trl
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from olora_core.data.answers import Answers, Conversation
from olora_core.data.templates import ChatTemplate
from olora_core.data.turns import end_of_turn_tokens
from olora_core.errors import DataError

FOLDER = Path(trl.__file__).parent / "chat_templates"
DAY = date(2026, 11, 27)


class Family(NamedTuple):
    """How a family writes an answer."""

    header: str
    """Regular expression of what stands before an answer, at its end."""
    end: str
    """Regular expression of what ends it."""
    stops: tuple[str, ...]
    """Tokens at which generation stops; the first is the end of sequence."""
    bos: str = ""
    refused: tuple[str, ...] = ()
    """Columns that the template cannot write."""


CALLS = ("call", "two calls", "last call")
CHATML = Family(r"<\|im_start\|>assistant\n", r"<\|im_end\|>", ("<|im_end|>", "<|endoftext|>"))
GEMMA = Family(
    r"<start_of_turn>model\n",
    "<end_of_turn>",
    ("<eos>", "<end_of_turn>"),
    "<bos>",
    refused=(*CALLS, "two in a row", "greeting"),
)
GEMMA_4 = Family(
    r"(?:<\|turn>model\n|<tool_response\|>)",
    r"(?:<turn\|>|<\|tool_response>)",
    ("<eos>", "<turn|>", "<|tool_response>"),
    "<bos>",
)
LLAMA = Family(
    r"<\|start_header_id\|>assistant<\|end_header_id\|>\n\n",
    r"(?:<\|eot_id\|>|<\|eom_id\|>)",
    ("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    "<|begin_of_text|>",
)
PHI = Family(r"<\|assistant\|>\n", r"<\|end\|>", ("<|endoftext|>", "<|end|>"), refused=CALLS)
COHERE = Family(
    r"<\|START_OF_TURN_TOKEN\|><\|CHATBOT_TOKEN\|>(?:<\|START_RESPONSE\|>)?",
    r"(?:<\|END_RESPONSE\|>|<\|END_OF_TURN_TOKEN\|>)",
    ("<|END_OF_TURN_TOKEN|>",),
    "<BOS_TOKEN>",
    refused=(*CALLS, "two in a row", "greeting"),
)
DEEPSEEK = Family(
    "(?:<｜Assistant｜>|<｜tool▁outputs▁end｜>)",
    "<｜end▁of▁sentence｜>",
    ("<｜end▁of▁sentence｜>",),
    "<｜begin▁of▁sentence｜>",
    # The template writes the second call without its header, and so as part of the question.
    refused=("two calls",),
)
GPT_OSS = Family(
    r"<\|start\|>assistant(?=(?:<\|channel\|>analysis<\|message\|>.*?<\|end\|><\|start\|>assistant)?)",
    r"(?:<\|return\|>|<\|call\|>|(?<!see\.)(?<!again\.)<\|end\|>)",
    ("<|return|>", "<|endoftext|>", "<|call|>"),
    "<|startoftext|>",
)
FAMILIES = {
    **dict.fromkeys(("qwen2_5", "qwen3", "qwen3_instruct_2507", "qwen3_vl"), CHATML),
    **dict.fromkeys(("qwen3_5_think", "qwen3_5_nothink", "qwen3_6", "qwen3_8"), CHATML),
    "qwen2_5_vl": CHATML._replace(refused=CALLS),
    **dict.fromkeys(("nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"), CHATML),
    "nemotron_3_5_lightning": CHATML,
    "lfm2": CHATML._replace(bos="<|startoftext|>", refused=CALLS),
    "lfm2_v2": CHATML._replace(bos="<|startoftext|>"),
    **dict.fromkeys(("lfm2_2_5", "lfm2_2_5_v2"), CHATML._replace(bos="<|startoftext|>")),
    "gemma": GEMMA._replace(refused=(*GEMMA.refused, "system")),
    "gemma3": GEMMA,
    **dict.fromkeys(("gemma4", "gemma4_v2", "gemma4_v3", "gemma4_v4", "gemma4_v5"), GEMMA_4),
    "llama3": LLAMA._replace(refused=CALLS),
    **dict.fromkeys(("llama3_1", "llama3_2"), LLAMA),
    **dict.fromkeys(("phi3", "phi3_5"), PHI),
    **dict.fromkeys(("cohere", "cohere2"), COHERE),
    **dict.fromkeys(("deepseekv3", "deepseek_r1_distill"), DEEPSEEK),
    "gptoss": GPT_OSS,
    "glm4moe": Family(
        r"<\|assistant\|>",
        r"(?:<\|user\|>|<\|observation\|>)",
        ("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "muse_glimmer": Family(r"<\|start\|>assistant", r"<\|eot\|>", ("<|eot|>",), "<|bos|>"),
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def call(**arguments: Any) -> list[dict[str, Any]]:
    function = {"name": "get_weather", "arguments": json.dumps(arguments)}
    return [{"id": "abcdefgh1", "type": "function", "function": function}]


FIRST, SECOND = assistant("First answer."), assistant("Second answer.")
RESULT = {"role": "tool", "tool_call_id": "abcdefgh1", "name": "get_weather", "content": "sunny"}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "description": "where"}}}
WEATHER = {
    "name": "get_weather",
    "description": "The weather.",
    "parameters": {**PARAMETERS, "required": ["city"]},
}
TOOLS = [{"type": "function", "function": WEATHER}]
COLUMNS: dict[str, list[dict[str, Any]]] = {
    "one": [user("One?"), FIRST],
    "system": [{"role": "system", "content": "Be brief."}, user("One?"), FIRST],
    "two": [user("One?"), FIRST, user("Two?"), SECOND],
    "thought": [user("One?"), FIRST | {"reasoning_content": "Let me see."}],
    "two thoughts": [
        *(user("One?"), FIRST | {"reasoning_content": "Let me see."}),
        *(user("Two?"), SECOND | {"reasoning_content": "Once again."}),
    ],
    "call": [user("One?"), assistant("", tool_calls=call(city="Paris")), RESULT, FIRST],
    "two calls": [
        *(user("One?"), assistant("", tool_calls=call(city="Paris")), RESULT, FIRST),
        *(user("Two?"), assistant("", tool_calls=call(city="Rome")), RESULT, SECOND),
    ],
    "last call": [user("One?"), assistant("", tool_calls=call(city="Paris", days=3))],
    "no calls": [user("One?"), FIRST | {"tool_calls": []}, user("Two?"), SECOND | {"tool_calls": []}],
    "blanks": [user("One?"), assistant("  First answer.\n\n"), user("Two?"), assistant("\nSecond answer.  ")],
    "two in a row": [user("One?"), FIRST, SECOND],
    "greeting": [assistant("Hello!"), user("One?"), FIRST],
}


@cache
def tokenizer_of(name: str, bos: str = "", eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    """A token for each byte, and one for each tag in the family's template."""
    template = (FOLDER / f"{name}.jinja").read_text()
    tags = re.findall(r"<[|｜][^<>{}\s]{1,30}[|｜]>|<\|[a-z_]+>|<[a-z_]+\|>|<\w+_of_turn>|</?s>", template)
    order = sorted({*tags, eos, *filter(None, [bos])})
    vocabulary = {text: i for i, text in enumerate([*order, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in order])
    special = {"bos_token": bos} if bos else {}
    return PreTrainedTokenizerFast(tokenizer_object=core, chat_template=template, eos_token=eos, **special)


def answers_of(name: str, family: Family, **options: bool) -> Answers:
    tokenizer = tokenizer_of(name, family.bos, family.stops[0])
    stops = [token for text in family.stops if (token := tokenizer.convert_tokens_to_ids(text)) is not None]
    return Answers(ChatTemplate(tokenizer, DAY), end_of_turn_tokens(tokenizer, stops), **options)


def tools_of(messages: list[dict[str, Any]]) -> list[dict[str, Any]] | None:
    return TOOLS if any(message.get("tool_calls") for message in messages) else None


def trained(conversation: Conversation) -> list[str]:
    """The trained texts, without the line break behind an end, which the tokens leave out."""
    return [conversation.text[start:end].removesuffix("\n") for start, end, _ in conversation.spans]


def expected(family: Family, text: str, prompt_end: str) -> list[str]:
    """The answers in a rendered text, without what the prompt's end has already written of them."""
    found = re.findall(f"{family.header}(.*?{family.end})", text, re.DOTALL)
    openings = [
        begun for begun in (prompt_end, "<think>\n", "<think>") if begun and prompt_end.startswith(begun)
    ]
    cut = []
    for answer in found:
        opening = next((begun for begun in openings if answer.startswith(begun)), "")
        cut.append(answer.removeprefix(opening))
    return cut


def prompt_end(answers: Answers, family: Family) -> str:
    """What the prompt writes behind an answer's header."""
    prompt = answers.template.render([user("One?")], None, generation_prompt=True)[0]
    return re.split(family.header, prompt)[-1] if re.search(family.header, prompt) else ""


OTHERWISE = {
    **{
        (name, "two in a row"): ["First answer.<turn|>", "\nSecond answer.<turn|>"]
        for name in ("gemma4", "gemma4_v3", "gemma4_v4")
    },
    ("gemma4_v2", "two in a row"): ["First answer.<turn|>", "Second answer.<turn|>"],
    ("gemma4_v5", "two in a row"): ["First answer.", "Second answer.<turn|>"],
}
"""Where the template writes the second answer without a header."""
UNENDED = (
    ("glm4moe", "two in a row"),
    ("deepseek_r1_distill", "call"),
    ("deepseek_r1_distill", "last call"),
)
"""Where the template writes no end after an answer, so that the row is refused."""


def verdict(name: str, column: str) -> str:
    """How this conversation is trained: "yes", "in part" or "no"."""
    messages = COLUMNS[column]
    try:
        found = answers_of(name, FAMILIES[name]).render("Line 1", messages, tools_of(messages))
    except DataError:
        return "no"
    if (name, column) in UNENDED:
        return "no"
    return "in part" if found.untrained else "yes"


def table() -> str:
    """The Markdown table of all families and kinds of conversations."""
    lines = [f"| template | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    rows: dict[str, list[str]] = {}
    for name in FAMILIES:
        cells = " | ".join(verdict(name, column) for column in COLUMNS)
        rows.setdefault(cells, []).append(f"`{name}`")
    lines += [f"| {', '.join(names)} | {cells} |" for cells, names in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())  # noqa: T201
