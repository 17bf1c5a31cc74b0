"""The orders are what their script writes, their answers can be read off their texts, and none leaks."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from examples import make_orders
from examples.make_orders import FILES, HELD_OUT, TRAINING

FOLDER = Path(make_orders.__file__).parent / "orders"
WORDS = (
    "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {word: number for number, word in enumerate(WORDS.split(), start=2)}
NUMBERS |= {"a pair of": 2, "a couple of": 2, "half a dozen": 6, "a dozen": 12, "two dozen": 24}
WEEK = {"Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"}


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / name).read_text("utf-8").splitlines()]


def texts(name: str) -> list[str]:
    return [row["messages"][1]["content"] for row in rows(name)]


@pytest.mark.parametrize("name", FILES)
def test_the_files_are_what_the_script_writes(name: str) -> None:
    vocabulary, count = FILES[name]
    expected = make_orders.as_jsonl(make_orders.rows(vocabulary, count))
    assert (FOLDER / name).read_bytes() == expected.encode()


@pytest.mark.parametrize(("name", "least", "most"), [("train.jsonl", 300, 500), ("valid.jsonl", 60, 100)])
def test_every_row_is_a_question_and_an_object_of_four_fields(name: str, least: int, most: int) -> None:
    found = rows(name)
    assert least <= len(found) <= most
    for row in found:
        assert row.keys() == {"messages"}
        system, _, answer = row["messages"]
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
        order = json.loads(answer["content"])
        assert list(order) == ["item", "quantity", "city", "day"]
        assert all(field in system["content"] for field in order)


@pytest.mark.parametrize("name", FILES)
def test_every_value_is_said_in_the_text(name: str) -> None:
    for row in rows(name):
        text, order = row["messages"][1]["content"], json.loads(row["messages"][2]["content"])
        assert order["city"] in text
        assert {day for day in WEEK if day in text} == ({order["day"]} - {None})
        (quantity,) = re.findall(rf"(\d+|[a-z ]*[a-z]) {re.escape(order['item'])}", text, re.IGNORECASE)
        ends = [phrase for phrase in NUMBERS if re.search(rf"\b{phrase}$", quantity.lower())]
        number = int(quantity) if quantity.isdigit() else NUMBERS[max(ends, key=len)]
        assert number == order["quantity"]


def test_no_order_occurs_twice() -> None:
    answers = [row["messages"][2]["content"] for name in FILES for row in rows(name)]
    asked = [text for name in FILES for text in texts(name)]
    assert len(set(answers)) == len(answers)
    assert len(set(asked)) == len(asked)


def test_nothing_of_a_validation_order_but_quantity_and_day_is_in_the_training_rows() -> None:
    training = "\n".join(texts("train.jsonl")).casefold()
    for words in (HELD_OUT.cities, HELD_OUT.things, [kind for kind in HELD_OUT.kinds if kind]):
        assert [word for word in words if word.casefold() in training] == []
    fixed = [
        max(re.split(r"\{\w+\}", template), key=len) for template in HELD_OUT.with_day + HELD_OUT.without_day
    ]
    assert [part for part in fixed if part.casefold() in training] == []
    assert not set(TRAINING.with_day + TRAINING.without_day) & set(HELD_OUT.with_day + HELD_OUT.without_day)


@pytest.mark.parametrize("name", FILES)
def test_one_order_in_four_has_no_day_and_every_word_is_used(name: str) -> None:
    found = [json.loads(row["messages"][2]["content"]) for row in rows(name)]
    days = Counter(order["day"] for order in found)
    assert 0.2 < days[None] / len(found) < 0.3
    assert {day for day in days if day} == WEEK
    vocabulary, _ = FILES[name]
    assert {order["city"] for order in found} == set(vocabulary.cities)
    assert {order["item"].rpartition(" ")[2] for order in found} == set(vocabulary.things)
