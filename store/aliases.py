"""Other names for base models: those that programs written for another service ask for.

OLORA_MODEL_ALIASES maps names, or patterns of names with `*` and `?`, to base models.
"""

from collections import deque
from fnmatch import fnmatchcase

from olora_core.errors import ModelError

from .bases import base_models, find_base
from .errors import SettingsError
from .settings import Settings

VARIABLE = "OLORA_MODEL_ALIASES"
OPENAIS_NAMES = (
    *("gpt-4.1", "gpt-4.1-2025-04-14", "gpt-4.1-mini", "gpt-4.1-mini-2025-04-14"),
    *("gpt-4.1-nano", "gpt-4.1-nano-2025-04-14", "gpt-4o", "gpt-4o-2024-08-06"),
    *("gpt-4o-mini", "gpt-4o-mini-2024-07-18", "gpt-4-0613", "o4-mini", "o4-mini-2025-04-16"),
    *("gpt-3.5-turbo", "gpt-3.5-turbo-0125", "gpt-3.5-turbo-1106", "gpt-3.5-turbo-0613"),
    *("davinci-002", "babbage-002"),
)
"""What OpenAI has let fine-tune: a list of models names those that match a pattern."""


def base_id(settings: Settings, name: str) -> str:
    """The id of the base model that a name stands for, itself or as an alias.

    Raises ModelError if it stands for none.
    """
    target = _followed(settings, _ids(settings), name)
    try:
        return find_base(settings, target).id
    except ModelError as error:
        if target != name:
            raise
        example = next((ref.id for ref in base_models(settings)), "a-base-model")
        hint = f"To let programs keep the name, set {VARIABLE}, such as '{name[:80]}={example}'."
        raise ModelError(f"{error.message} {hint}", param=error.param) from None


def listed_aliases(settings: Settings) -> list[tuple[str, str]]:
    """(alias, base model) for a list of models: names as they are, patterns by the names of OpenAI's."""
    names = [pattern for pattern, _ in settings.model_aliases if not set("*?") & set(pattern)]
    names += [name for name in OPENAIS_NAMES if name not in names]
    bases = _ids(settings)
    targets = ((name, _followed(settings, bases, name)) for name in names)
    return [(name, target) for name, target in targets if target != name]


def check_aliases(settings: Settings) -> None:
    """Raises SettingsError if a name could stand for two base models, or for one that is not there."""
    bases = _ids(settings)
    for number, (pattern, target) in enumerate(settings.model_aliases):
        if pattern in bases:
            raise _refusal(f"{pattern!r} is a base model itself; remove this alias")
        for other, _ in settings.model_aliases[number + 1 :]:
            common = common_name(pattern, other)
            if common is not None:
                raise _refusal(f"{pattern!r} and {other!r} both match {common!r}; narrow or remove one")
        try:
            find_base(settings, _followed(settings, bases, target))
        except ModelError as error:
            raise _refusal(f"{pattern!r} stands for a missing model. {error.message.rstrip('.')}") from None


def _ids(settings: Settings) -> set[str]:
    """The ids of the base models, which are no aliases. Without aliases nobody asks."""
    return {ref.id for ref in base_models(settings)} if settings.model_aliases else set()


def _followed(settings: Settings, bases: set[str], name: str) -> str:
    """What a name stands for in the end: an alias may stand for another one; ids of models are no aliases.

    Raises SettingsError for a circle.
    """
    way = [name]
    while way[-1] not in bases and not name.startswith("ft:"):
        found = next((to for pattern, to in settings.model_aliases if fnmatchcase(way[-1], pattern)), None)
        if found is None:
            break
        if found in way:
            circle = " = ".join([*way, found])
            raise _refusal(f"{circle} is a circle; let it end in a base model")
        way.append(found)
    return way[-1]


def _refusal(problem: str) -> SettingsError:
    return SettingsError(f"{VARIABLE}: {problem}.", param=VARIABLE)


def common_name(one: str, other: str) -> str | None:
    """A name that both patterns match, or None: a search through the places in both at once."""
    waiting, seen = deque([(0, 0, "")]), set()
    while waiting:
        i, j, name = waiting.popleft()
        if (i, j) in seen:
            continue
        seen.add((i, j))
        a, b = one[i : i + 1], other[j : j + 1]
        if not a and not b:
            return name
        if a == "*":
            waiting.append((i + 1, j, name))
        if b == "*":
            waiting.append((i, j + 1, name))
        letter = next((x for x in (a, b) if x not in "*?"), "x")
        if a in (letter, "*", "?") and b in (letter, "*", "?"):
            waiting.append((i + (a != "*"), j + (b != "*"), name + letter))
    return None
