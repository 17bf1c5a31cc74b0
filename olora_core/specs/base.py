"""What every spec is: a pydantic model that refuses what it does not know and names the place."""

import difflib
from collections.abc import Mapping
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import SpecError

Auto = Literal["auto"]


class Spec(BaseModel):
    """Refuses unknown names and non-finite numbers; never changes once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


SpecT = TypeVar("SpecT", bound=Spec)


def read(model: type[SpecT], values: Mapping[str, Any], place_of: Any) -> SpecT:
    for name, value in values.items():
        place = place_of(name)
        param = f"{place}.{name}" if place else name
        if name not in model.model_fields:
            raise SpecError(f"{param} is unknown{nearest(name, model.model_fields)}.", param=param)
        # Python counts true as 1, pydantic too.
        annotation = model.model_fields[name].annotation
        if isinstance(value, bool) and bool not in (annotation, *get_args(annotation)):
            raise SpecError(f"{param} takes a value, not true or false.", param=param)
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise spec_error(error, place_of) from None


def spec_error(error: ValidationError, place_of: Any = lambda name: "") -> SpecError:
    """The first complaint of pydantic as one sentence, with the number of the others."""
    problems = error.errors(include_url=False, include_context=False)
    name = str(problems[0]["loc"][0]) if problems[0]["loc"] else ""
    mine = [p for p in problems if p["loc"] and str(p["loc"][0]) == name] or problems[:1]
    # A field that takes "auto" or a number complains once for each; the complaint about the number says more.
    numeric = [p for p in mine if p["type"] != "literal_error"] or mine
    says_auto = len(numeric) < len(mine)
    place = place_of(name)
    param = f"{place}.{name}" if place else name
    wish = str(numeric[0]["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    others = len({p["loc"][0] for p in problems if p["loc"]}) - 1
    message = f"{param} = {mine[0]['input']!r} does not fit: expected {wish}" + (
        ' or "auto".' if says_auto else "."
    )
    if others > 0:
        message += f" {others} more value{'s' if others > 1 else ''} did not fit either."
    return SpecError(message, param=param)


def nearest(name: str, known: Any) -> str:
    """` (did you mean 'x'?)`, or nothing when no known name is near."""
    matches = difflib.get_close_matches(str(name).lower(), list(known), n=1, cutoff=0.6)
    return f" (did you mean '{matches[0]}'?)" if matches else ""
