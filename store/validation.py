"""What pydantic finds wrong with a value, worded as a requirement: `must be at least 1`."""

from typing import Any

from pydantic_core import ErrorDetails

REQUIREMENTS = {
    "int_type": "must be a whole number",
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "string_type": "must be a string",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "path_type": "must be a path",
    "literal_error": "must be {expected}",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "string_too_short": "must have {min_length} or more characters",
    "string_too_long": "must have at most {max_length} characters",
    "too_short": "must have {min_length} or more entries",
    "too_long": "must have at most {max_length} entries",
    "value_error": "{error}",
}
"""By pydantic's type of error. Our own validators raise ValueErrors that begin with "must"."""


def requirement(problem: ErrorDetails) -> str:
    """The predicate of a sentence about the value, such as `must be a whole number`."""
    words = REQUIREMENTS.get(problem["type"])
    if words is None:
        return f"must be {problem['msg'].removeprefix('Input should be ')}"
    limits = problem.get("ctx", {})
    return words.format(**{name: _as_written(limit) for name, limit in limits.items()})


def refusal(place: str, problem: ErrorDetails) -> str:
    """`limit must be at least 1 (got 0).`"""
    return f"{place} {requirement(problem)} (got {shown(problem['input'])})."


def shown(value: Any) -> str:
    """A value as a sentence quotes it, cut after 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _as_written(limit: Any) -> Any:
    """3600 for the limit of a float, which pydantic gives as 3600.0."""
    return int(limit) if isinstance(limit, float) and limit.is_integer() else limit
