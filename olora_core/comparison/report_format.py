"""The version of a report's JSON, and a reader for reports of earlier versions. Free of torch."""

from collections.abc import Mapping
from typing import Any

FORMAT = 3
RENAMED = {
    "trained_numbers": "trainable_parameters",
    "yardstick": "baseline",
    "steps_to_yardstick": "steps_to_baseline",
    "below_yardstick": "below_baseline",
}
"""Keys of format 1, and their names since format 2."""
ADDED = ("alpha", "scale", "scale_range", "options", "match_budget", "before_budget")
"""Keys of a method since format 3. Earlier reports name only the options that were not defaults then."""


def read_report(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored report in the present format, whichever version wrote it; what it does not tell is None."""
    if stored["format"] == FORMAT:
        return dict(stored)
    report = _renamed(stored) if stored["format"] == 1 else stored
    methods = [{**dict.fromkeys(ADDED), **method} for method in report["methods"]]
    return {**report, "methods": methods, "format": FORMAT}


def _renamed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {RENAMED.get(name, name): _renamed(item) for name, item in value.items()}
    return [_renamed(item) for item in value] if isinstance(value, list) else value
