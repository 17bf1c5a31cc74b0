"""`olora methods`: the fine-tuning methods and their options. Needs no service."""

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from olora_core.errors import SpecError
from olora_core.specs import ADAPTER_SPECS, AdapterSpec, nearest

from .tables import print_rows


def methods(
    method: Annotated[
        str | None, typer.Argument(help="Show the cost, use and options of this method.")
    ] = None,
) -> None:
    """List the fine-tuning methods, or the options of one. Piped output is tab-separated."""
    console = Console()
    if method is None:
        rows = [[name, spec.paper, spec.summary] for name, spec in ADAPTER_SPECS.items()]
        print_rows(console, ["method", "paper", "summary"], rows)
        return
    if method not in ADAPTER_SPECS:
        raise SpecError(
            f"There is no method '{method}'{nearest(method, ADAPTER_SPECS)}. "
            f"Available: {', '.join(ADAPTER_SPECS)}."
        )
    spec = ADAPTER_SPECS[method]
    if console.is_terminal:
        _describe(console, method, spec)
    rows = [
        [name, json.dumps(option["default"]), _values(option), option["description"]]
        for name, option in spec.options()["properties"].items()
        if name != "method"
    ]
    print_rows(console, ["option", "default", "values", "meaning"], rows)


def _describe(console: Console, method: str, spec: type[AdapterSpec]) -> None:
    facts = (method, spec.summary), ("paper", spec.paper), ("cost", spec.cost), ("choose it", spec.choose)
    table = Table.grid(padding=(0, 2))
    for name, sentence in facts:
        table.add_row(Text(name, style="bold"), Text(sentence))
    console.print(table)
    console.print()


def _values(option: dict[str, Any]) -> str:
    """The accepted values, from a JSON schema: `integer, 1 to 4096`, `number above 0`, `"auto" or list`."""
    if "anyOf" in option:
        return " or ".join(_values(choice) for choice in option["anyOf"])
    if "const" in option or "enum" in option:
        return " or ".join(json.dumps(value) for value in option.get("enum", [option.get("const")]))
    if option["type"] in ("integer", "number"):
        return f"{option['type']}{_bounds(option)}"
    return {"array": "list", "object": "names and values"}.get(option["type"], str(option["type"]))


def _bounds(option: dict[str, Any]) -> str:
    if "minimum" in option and "maximum" in option:
        return f", {option['minimum']:g} to {option['maximum']:g}"
    words = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }
    bounds = " and ".join(f"{word} {option[name]:g}" for name, word in words.items() if name in option)
    return bounds and f" {bounds}"
