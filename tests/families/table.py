"""The table of families in docs/models.md, made of the results of their trials.

`python -m tests.families.table` tries every family and writes both; with names of families, only theirs.
"""

import json
import sys
from pathlib import Path
from typing import Any

from tests.families.configs import KINDS
from tests.families.exceptions import EXCEPTIONS
from tests.families.trials import trial

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families: python -m tests.families.table -->\n", "<!-- families: end -->\n"
PACKED = {"segments": "by segment", "positions": "by a mask", None: "no, padded"}


def results() -> dict[str, dict[str, Any]]:
    """The facts about each family as they were last written."""
    stored: dict[str, dict[str, Any]] = (
        json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    )
    return stored


def table(facts: dict[str, dict[str, Any]]) -> str:
    """The page's two lists: families that are trained, and the others with the reason."""
    trained = {kind: each for kind, each in facts.items() if each["outcome"] == "trained"}
    lines = ["| family (`model_type`) | adapted by `auto` | left out | packed |", "|---|---|---|---|"]
    lines += [_row(kind, each) for kind, each in trained.items()]
    lines += ["", "| family | not trained, because |", "|---|---|"]
    lines += [f"| `{kind}` | {EXCEPTIONS[kind].reason} |" for kind in facts if kind in EXCEPTIONS]
    return "\n".join(lines) + "\n"


def _row(kind: str, facts: dict[str, Any]) -> str:
    adapted = ", ".join(f"`{name}`" for name in facts["adapted"])
    return (
        f"| `{kind}` | {adapted} | {', '.join(facts['left_out']) or 'nothing'} | {PACKED[facts['packing']]} |"
    )


def written(page: str) -> str:
    """The part of the page that is made here."""
    return page.partition(BEGIN)[2].partition(END)[0]


def main(kinds: list[str]) -> None:
    """Tries the families, all if none is named, and writes the results and the page."""
    facts = results()
    for kind in kinds or KINDS:
        found = trial(kind)
        print(f"{kind:28} {found['outcome']:8} {found.get('reason', '')}", flush=True)  # noqa: T201
        facts[kind] = found if found["outcome"] == "trained" else {"outcome": found["outcome"]}
    facts = {kind: facts[kind] for kind in KINDS if kind in facts}
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    page = PAGE.read_text(encoding="utf-8")
    before, after = page.partition(BEGIN)[0], page.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}{table(facts)}{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
