"""Sample answers of the base and the tuned model, a few lines for each row."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console

WIDTH = 100


def show_samples(console: Console, samples: Mapping[str, Any] | None) -> None:
    """`samples` as in a job's `olora` object; None prints nothing."""
    if not samples:
        return
    rows = "held-out rows" if samples.get("held_out") else "rows"
    console.print(f"Sample answers to {rows} of the {samples['file']} file:", highlight=False, soft_wrap=True)
    for row in samples["rows"]:
        _line(console, f"line {row['line']}", _one_line(row["prompt"], from_the_end=True), "dim")
        _line(console, "in the file", _one_line(row["reference"]))
        _line(console, "base", _one_line(row["base"]))
        _line(console, "tuned", _one_line(row["tuned"]), "green")


def _line(console: Console, name: str, text: str, style: str = "") -> None:
    console.print(f"  {name:<12} {text}", style=style, markup=False, highlight=False, soft_wrap=True)


def _one_line(text: str, *, from_the_end: bool = False) -> str:
    """Shortened, and without control characters."""
    words = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    if len(words) <= WIDTH:
        return words
    return f"…{words[-WIDTH:]}" if from_the_end else f"{words[:WIDTH]}…"
