"""Pydantic's errors worded as requirements: `adapter.rank must be at least 1 (got 0).`"""

import re
from collections.abc import Sequence
from typing import Any

from pydantic_core import ErrorDetails

REQUIREMENTS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_parsing_size": "must be a smaller whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "list_type": "must be a list",
    "tuple_type": "must be a list",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "path_type": "must be a path",
    "none_required": "must be null",
    "literal_error": "must be {expected}",
    "enum": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "multiple_of": "must be a multiple of {multiple_of}",
    "value_error": "{error}",
}
"""By pydantic's type of error. Our own validators raise ValueErrors that begin with "must"."""
LONGEST_VALUE = 80
"""Characters of a refused value that a sentence quotes."""


def requirement(problem: ErrorDetails) -> str:
    """The predicate of a sentence about the value, such as `must be a whole number`."""
    words = REQUIREMENTS.get(problem["type"])
    if words is None:
        return f"must be {problem['msg'].removeprefix('Input should be ')}"
    limits = problem.get("ctx", {})
    return words.format(**{name: _as_written(limit) for name, limit in limits.items()})


def any_requirement(problems: Sequence[ErrorDetails]) -> str:
    """One predicate for a field that takes values of several types, of which each complained.

    `must be at least 1 or 'auto'` for "auto" or a number.
    """
    # "auto" comes last: it is the exception that the field allows beside its numbers or names.
    ordered = sorted(problems, key=lambda problem: problem.get("ctx", {}).get("expected") == "'auto'")
    predicates = list(dict.fromkeys(requirement(problem) for problem in ordered))
    if len(predicates) == 1 or not all(predicate.startswith("must be ") for predicate in predicates):
        return predicates[0]
    options = [option for predicate in predicates for option in re.split(", | or ", predicate[8:])]
    return f"must be {', '.join(options[:-1])} or {options[-1]}"


def refusal(place: str, problem: ErrorDetails) -> str:
    """`limit must be at least 1 (got 0).`"""
    if problem["type"] == "missing":
        return f"{place} is missing; it is required."
    if problem["type"] == "extra_forbidden":
        return f"{place} is unknown."
    return f"{place} {requirement(problem)} (got {shown(problem['input'])})."


def shown(value: Any) -> str:
    """A value as a sentence quotes it, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}…"


def _as_written(limit: Any) -> Any:
    """3600 for the limit of a float, which pydantic gives as 3600.0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
