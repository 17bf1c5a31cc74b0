"""Reports that earlier versions stored are read and drawn."""

import json
from pathlib import Path
from typing import Any

from olora_core.comparison.page import page
from olora_core.comparison.report_format import FORMAT, RENAMED, read_report

STORED = Path(__file__).parents[3] / "docs" / "comparison" / "comparison.json"
"""A whole report of commit 0558508, in format 2."""
UNKNOWN = ("alpha", "scale", "scale_range", "options", "match_budget", "before_budget")


def stored() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(STORED.read_text())
    return found


def in_format_1(value: Any) -> Any:
    old = {name: earlier for earlier, name in RENAMED.items()}
    if isinstance(value, dict):
        return {old.get(name, name): in_format_1(item) for name, item in value.items()}
    return [in_format_1(item) for item in value] if isinstance(value, list) else value


def test_a_report_of_format_2_keeps_all_it_says_and_invents_no_scale() -> None:
    found = read_report(stored())
    assert found["format"] == FORMAT == 3
    for method in found["methods"]:
        assert [method.pop(name) for name in UNKNOWN] == [None] * len(UNKNOWN)
    assert {**found, "format": 2} == stored()


def test_a_report_of_format_1_says_the_same() -> None:
    assert read_report({**in_format_1(stored()), "format": 1}) == read_report(stored())


def test_a_report_of_this_format_is_left_as_it_is() -> None:
    assert read_report(read_report(stored())) == read_report(stored())


def test_its_page_has_every_figure_that_it_knows_and_says_what_it_does_not() -> None:
    whole = page(read_report(stored()))
    for method in stored()["methods"]:
        assert f">{method['label']}</th>" in whole
        assert f"{method['final']['mean']:.4f}" in whole
    assert "<dt>Rank</dt><dd>8</dd>" in whole
    assert "did not record alphas" in whole
    assert "None" not in whole
