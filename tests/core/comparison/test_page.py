"""A comparison's page: self-contained, escaped, and legible on any screen."""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from olora_core.comparison.entrants import Entrant, Trial, untrainable
from olora_core.comparison.page import page, ticks
from olora_core.comparison.report import Setup, report_of
from olora_core.comparison.runs import RunResult
from olora_core.specs import ADAPTER_SPECS
from olora_core.specs.compared_methods import ComparedMethod
from olora_core.specs.methods.olora import OLoRASpec
from olora_core.specs.methods.prilora import PRILoRASpec
from tests.browser import Chromium, chromium

STEPS = 120
ENDS = {
    "olora": 1.21,
    "lora": 1.26,
    "pissa": 1.22,
    "cola": 1.25,
    "tt_lora": 1.4,
    "sora": 1.31,
    "xgblora": 2.6,
}
SLY = '<script>alert("x")</script>'


def entrant(label: str, end: float, seeds: int) -> Entrant:
    finals = []
    for seed in range(seeds):
        shift = 0.004 * ((seed + len(label)) % 3)
        points = [STEPS * i // 12 for i in range(13)]
        curve = [(step, end + shift + (3 - end) * math.exp(-step / 25), 0.5 + step / 400) for step in points]
        finals.append(
            RunResult(
                label, "final", 1e-3, seed, STEPS, curve[-1][1], None, curve, 30.0 + seed, 9000, 2**30, 16
            )
        )
    trials = [Trial(rate, 30, loss) for rate, loss in ((1e-4, 1.9), (3.2e-4, 1.7), (1e-3, 1.6), (1e-2, None))]
    trials += [Trial(rate, STEPS, loss) for rate, loss in ((3.2e-4, 1.5), (1e-3, 1.4))]
    method = ADAPTER_SPECS[label.split()[0]]
    return Entrant(
        label,
        ComparedMethod(adapter=method()),
        method(rank=8),
        trainable_parameters=98_304,
        default_rate=1e-3,
        trials=trials,
        best_rate=1e-3,
        finals=finals,
    )


def report(seeds: int = 3, model: str = "olora-tiny", **more: Entrant) -> dict[str, Any]:
    file = {"file": "train.jsonl", "sha256": "a" * 64, "examples": 160}
    setup = Setup(
        model=model,
        type="supervised",
        base_sha256="b" * 64,
        device="cpu",
        dtype="float32",
        hyperparameters={"n_epochs": 3, "batch_size": 4, "packing": True},
        asked={"n_epochs": 3, "batch_size": 4},
        steps=STEPS,
        seeds=list(range(seeds)),
        budget=98_304,
        baseline="lora",
        training=file,
        validation=file | {"file": "valid.jsonl", "examples": 60},
        search={"learning_rates": "auto", "seed": 0, "trained_on": 144, "examples": 16},
        versions={"olora": "0.1.0"},
    )
    failed = untrainable("adalora", ComparedMethod(adapter=ADAPTER_SPECS["adalora"]()), "It has no step.")
    entrants = [entrant(label, end, seeds) for label, end in ENDS.items()]
    return report_of(setup, [*entrants, failed, *more.values()])


@pytest.fixture
def browser(tmp_path: Path) -> Chromium:
    return chromium(tmp_path)


def test_it_needs_nothing_beside_itself() -> None:
    whole = page(report())
    for foreign in ("http:", "https:", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert foreign not in whole, foreign


def test_every_text_from_outside_is_escaped() -> None:
    label = f"lora ({SLY})"
    sly = entrant(label, 1.1, 3)
    whole = page(report(model=SLY, sly=sly))
    assert "<script" not in whole
    assert whole.count("&lt;script&gt;") > 4


def test_it_says_the_sentence_and_every_method_with_its_figures() -> None:
    found = report()
    whole = page(found)
    assert found["verdict"]["sentence"].replace("'", "&#x27;") in whole
    for method in found["methods"]:
        assert f">{method['label']}</th>" in whole
        if method["final"]:
            assert f"{method['final']['mean']:.4f}" in whole
    assert "It has no step." in whole
    assert "diverged" in whole


def test_it_shows_what_the_budget_made_of_rank_and_scale() -> None:
    """Alpha is 16 in all of them; the scale is alpha / rank."""
    olora = entrant("olora (rank 8 by budget)", 1.3, 3)
    olora.asked = ComparedMethod(adapter=OLoRASpec(rank=32, dropout=0.1))
    olora.adapter = OLoRASpec(rank=8, dropout=0.1)
    given = entrant("olora (rank 8)", 1.3, 3)
    given.asked = ComparedMethod(adapter=OLoRASpec(rank=8), match_budget=False)
    prilora = entrant("prilora", 1.3, 3)
    prilora.asked, prilora.adapter = ComparedMethod(adapter=PRILoRASpec(rank=8)), PRILoRASpec(rank=4)
    found = report(olora=olora, given=given, prilora=prilora)
    assert cells(found, "olora (rank 8 by budget)") == [
        *("8", "16", "2", "98,304 100% of budget", "16", "rank 32 → 8, scale 0.5 → 2", "dropout 0.1"),
    ]
    assert cells(found, "olora (rank 8)")[5:] == ["nothing: the rank was given", "–"]
    assert cells(found, "prilora")[2] == "2.67 to 8"
    assert cells(found, "prilora")[5] == "rank 8 → 4, scale 1.33 to 4 → 2.67 to 8"
    assert cells(found, "lora")[5] == "nothing: the default rank fits"
    assert cells(found, "adalora")[3:] == ["–", "–", "–", "–"], "it could not be trained"


def cells(found: dict[str, Any], label: str) -> list[str]:
    """Of the method's row in the table of ranks and scales."""
    table = page(found).partition("<h2>Rank and scale of each method</h2>")[2].partition("</table>")[0]
    row = table.partition(f">{label}</th>")[2].partition("</tr>")[0]
    return [
        re.sub(r"<[^>]+>", " ", cell).strip().replace("  ", " ")
        for cell in re.findall("<td[^>]*>(.*?)</td>", row)
    ]


def test_it_says_how_large_a_difference_had_to_be() -> None:
    """Half of Student's 95 % interval with 2 degrees of freedom: 4.303 standard errors of the differences."""
    uneven = {name: entrant(name, 1.3, 3) for name in ("melora", "mora", "rm_lora")}
    for i, each in enumerate(uneven.values()):
        each.finals = [replace(run, loss=1.3 + (i + 1) * run.seed**2 / 100) for run in each.finals]
    found = report(**uneven)
    losses = {m["label"]: m["final"]["losses"] for m in found["methods"] if m["final"]}
    lora, widths = losses.pop("lora"), []
    for own in losses.values():
        pairs = [b - a for a, b in zip(own, lora, strict=True)]
        mean = sum(pairs) / 3
        widths.append(4.303 * math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / 2 / 3))
    low, middle, high = min(widths), sorted(widths)[len(widths) // 2], max(widths)
    assert len(widths) % 2 == 1
    assert low < middle < high
    assert f"had to exceed {middle:.4f} (median; {low:.4f} to {high:.4f}) to be beyond it" in page(found)
    assert "had to exceed" not in page(report(seeds=1))


def test_it_says_that_many_comparisons_are_not_corrected_for() -> None:
    assert "no correction, such as Holm&#x27;s, for the number of methods" in page(report())


def test_methods_stand_by_their_loss_and_those_without_one_last() -> None:
    table = page(report()).partition("<h2>All results</h2>")[2].partition("</table>")[0]
    found = re.findall(r'<th scope="row">([^<]+)</th>', table)
    assert found == [*sorted(ENDS, key=ENDS.__getitem__), "adalora"]


def test_a_curve_and_its_band_are_drawn_where_they_belong() -> None:
    """The y of a point, read back by the labels of the axis."""
    chart = page(report()).partition("<h2>Validation loss during training</h2>")[2].partition("</section>")[0]
    labels = re.findall(r'<span class="y" style="top:([\d.]+)%">([\d.]+)</span>', chart)
    (top, high), (bottom, low) = ((float(at), float(value)) for at, value in (labels[0], labels[-1]))
    line = re.findall(r'<polyline class="mean" style="stroke:var\(--c0\)" points="([^"]+)"', chart)[0]
    x, y = (float(number) for number in line.split()[-1].split(","))
    assert x == 100
    last = high + (low - high) * (y - top) / (bottom - top)
    own = next(method for method in report()["methods"] if method["label"] == "olora")
    assert last == pytest.approx(own["final"]["mean"], abs=2e-3)
    assert chart.count('class="band"') >= len(ENDS) - 1


@pytest.mark.parametrize(("low", "high"), [(1.2, 1.4), (0.0, 17.0), (-0.002, 0.0041), (800.0, 1200.0)])
def test_ticks_are_a_few_round_numbers_inside(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 6
    assert all(low <= tick <= high for tick in found)
    assert all(len(f"{tick:g}".replace("-", "").replace(".", "").strip("0")) <= 3 for tick in found)


@pytest.mark.parametrize("seeds", [1, 2])
def test_few_seeds_and_a_lone_method_have_a_page_too(seeds: int) -> None:
    assert "seed" in page(report(seeds=seeds))


@pytest.mark.slow
def test_chromium_opens_it_and_it_fits_a_phone(browser: Chromium, tmp_path: Path) -> None:
    path = tmp_path / "comparison.html"
    path.write_text(page(report()), encoding="utf-8")
    document = browser.document(path)
    assert "Take olora" in document
    assert document.count("<polyline") == len(re.findall("<polyline", path.read_text()))
    assert browser.overflow(path, 1200) == 0
    assert browser.overflow(path, 500) == 0
    assert browser.hidden(path, 900) == 0, "no column has to be scrolled to"
    assert browser.screenshot(path).stat().st_size > 50_000
