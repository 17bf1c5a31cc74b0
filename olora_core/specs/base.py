"""The base class of all specs, and how untyped input is read into one."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SpecError
from .validation import any_requirement, refusal, shown

Auto = Literal["auto"]


class Spec(BaseModel):
    """Rejects unknown fields and numbers that are not finite; immutable."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=Spec)


def read(model: type[SpecT], values: Mapping[str, Any], place_of: Any) -> SpecT:
    """Reads `values` into a spec; `place_of` gives a field's place in the request, such as "adapter".

    Raises SpecError for an unknown field, with the nearest known name, and for an invalid value.
    """
    for name, value in values.items():
        place = place_of(name)
        param = f"{place}.{name}" if place else name
        if name not in model.model_fields:
            raise SpecError(f"{param} is unknown{nearest(name, model.model_fields)}.", param=param)
        # Python takes true for 1, and so does pydantic.
        annotation = model.model_fields[name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise SpecError(f"{param} must not be true or false (got {value}).", param=param)
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise spec_error(error, place_of) from None


def spec_error(error: ValidationError, place_of: Any = lambda name: "") -> SpecError:
    """The first of pydantic's errors as one sentence, with the number of the other fields that have one."""
    problems = error.errors(include_url=False)
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    own = [p for p in problems if p["loc"] and str(p["loc"][0]) == name] or problems[:1]
    place = place_of(name)
    param = f"{place}.{name}" if place else name
    if len(own) == 1:
        message = refusal(_inside(param, own[0]["loc"][1:]), own[0])
    else:  # one error for each type that the field takes, such as "auto" and a number
        message = f"{param} {any_requirement(own)} (got {shown(own[0]['input'])})."
    if others := len({p["loc"][0] for p in problems if p["loc"]}) - 1:
        message += f" {others} more value{'s are' if others > 1 else ' is'} invalid."
    return SpecError(message, param=param)


def _inside(param: str, path: tuple[int | str, ...]) -> str:
    """The place of an entry of a list or an object, as pydantic names it: `link_ranks[0]`, `modes.768[1]`."""
    if path[-1:] == ("[key]",):
        return f"{param}: the name {path[-2]!r}"
    return param + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)


def nearest(name: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
