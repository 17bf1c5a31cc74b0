"""Pydantic's errors in words."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from olora_core.specs.validation import any_requirement, refusal


class Level(Enum):
    LOW = "low"
    HIGH = "high"


class Inner(BaseModel):
    name: str


class Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    whole: int = 1
    strict_whole: int = Field(default=1, strict=True)
    number: float = 1.0
    switch: bool = False
    text: str = Field(default="abc", min_length=2, max_length=5)
    pattern: str = Field(default="a", pattern="^[a-z]+$")
    entries: list[int] = Field(default=[1], min_length=1, max_length=2)
    pair: tuple[int, ...] = (1,)
    names: dict[str, int] = Field(default_factory=dict)
    inner: Inner | None = None
    path: Path = Path()
    choice: Literal["one", "two", "three"] = "one"
    level: Level = Level.LOW
    at_least: int = Field(default=1, ge=1)
    at_most: float = Field(default=1, le=3600)
    above: float = Field(default=1, gt=0)
    below: float = Field(default=0.5, lt=1)
    even: int = Field(default=2, multiple_of=2)
    own: int = 0
    auto: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    mode: Literal["auto"] | bool | Literal["full"] = "auto"
    required: int

    @field_validator("own")
    @classmethod
    def _own(cls, value: int) -> int:
        if value:
            raise ValueError("must be 0 here")
        return value


def problems(**values: Any) -> list[Any]:
    with pytest.raises(ValidationError) as caught:
        Model(**{"required": 1} | values)
    return caught.value.errors(include_url=False)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("whole", "abc", "must be a whole number (got 'abc')."),
        ("whole", 1.5, "must be a whole number (got 1.5)."),
        ("whole", None, "must be a whole number (got None)."),
        ("whole", "9" * 5000, "must be a smaller whole number (got '" + "9" * 76 + "…)."),
        ("strict_whole", True, "must be a whole number (got True)."),
        ("number", "abc", "must be a number (got 'abc')."),
        ("number", [], "must be a number (got [])."),
        ("number", float("inf"), "must be a finite number (got inf)."),
        ("switch", "maybe", "must be true or false (got 'maybe')."),
        ("switch", [], "must be true or false (got [])."),
        ("text", 7, "must be a string (got 7)."),
        ("text", "a", "must have 2 or more characters (got 'a')."),
        ("text", "abcdef", "must have at most 5 characters (got 'abcdef')."),
        ("pattern", "A", "must match ^[a-z]+$ (got 'A')."),
        ("entries", 7, "must be a list (got 7)."),
        ("entries", [], "must have 1 or more entries (got [])."),
        ("entries", [1, 2, 3], "must have at most 2 entries (got [1, 2, 3])."),
        ("pair", 7, "must be a list (got 7)."),
        ("names", 7, "must be an object (got 7)."),
        ("inner", 7, "must be an object (got 7)."),
        ("path", 7, "must be a path (got 7)."),
        ("choice", "four", "must be 'one', 'two' or 'three' (got 'four')."),
        ("level", "mid", "must be 'low' or 'high' (got 'mid')."),
        ("at_least", 0, "must be at least 1 (got 0)."),
        ("at_most", 3601, "must be at most 3600 (got 3601)."),
        ("above", 0, "must be greater than 0 (got 0)."),
        ("below", 1, "must be less than 1 (got 1)."),
        ("even", 3, "must be a multiple of 2 (got 3)."),
        ("own", 5, "must be 0 here (got 5)."),
        ("other", 5, "is unknown."),
    ],
)
def test_a_refusal_says_what_the_value_must_be(name: str, value: Any, sentence: str) -> None:
    (problem,) = problems(**{name: value})
    assert refusal(name, problem) == f"{name} {sentence}"


def test_a_missing_field_is_required() -> None:
    with pytest.raises(ValidationError) as caught:
        Model()
    assert refusal("required", caught.value.errors()[0]) == "required is missing; it is required."


@pytest.mark.parametrize(
    ("name", "value", "predicate"),
    [
        ("auto", 0, "must be at least 1 or 'auto'"),
        ("auto", "many", "must be a whole number or 'auto'"),
        ("mode", "half", "must be true, false, 'full' or 'auto'"),
    ],
)
def test_the_types_of_a_field_become_one_predicate(name: str, value: Any, predicate: str) -> None:
    assert any_requirement(problems(**{name: value})) == predicate
