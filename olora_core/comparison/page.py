"""A comparison's report as one self-contained HTML page: the verdict, charts and tables.

A chart's shapes are SVG that stretches with the page; its labels are HTML around it, so that they keep their
size on a phone. Every value from outside is escaped by `text`.
"""

import html
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Report = Mapping[str, Any]
IN_WORDS = ("What the budget changed", "Other options")
"""Columns of words, not numbers."""
COLOURED = 6
"""Methods with their own colour in the chart of all curves; the others are grey."""

STYLE = Path(__file__).with_suffix(".css")


def page(report: Report) -> str:
    """The whole page. Methods are sorted by final loss, those without one last."""
    ranked = sorted(
        (method for method in report["methods"] if method["final"]), key=lambda m: m["final"]["mean"]
    )
    failed = [method for method in report["methods"] if not method["final"]]
    colours = _colours(ranked, report)
    parts = [
        f"<h1>{text(_title(report))}</h1>",
        f'<p class="verdict">{text(report["verdict"]["sentence"])}</p>',
        _facts(report),
        *([_finals(ranked, colours, report), _curves(ranked, colours, report)] if ranked else []),
        _results([*ranked, *failed], report),
        _adapters([*ranked, *failed], report),
        *([_one_by_one(ranked, report)] if len(ranked) > 2 else []),
        _searches([*ranked, *failed], report),
        _recipe(report),
        _rules(report),
        _footer(report),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{text(_title(report))}</title>\n<style>\n{STYLE.read_text(encoding='utf-8')}</style>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(parts) + "\n</main>\n</body>\n</html>\n"
    )


def text(value: Any) -> str:
    """Any value as the text of an element or an attribute."""
    return html.escape(str(value), quote=True)


def _title(report: Report) -> str:
    return f"Comparison of {len(report['methods'])} methods on {report['model']}"


def _colours(ranked: Sequence[Report], report: Report) -> dict[str, str]:
    """LoRA is grey, the method to take has the first colour; the others follow by loss."""
    chosen = {report["baseline"]: "var(--c1)"}
    chosen.setdefault(report["verdict"]["take"], "var(--c0)")
    free = iter(["var(--c0)"] * (len(chosen) == 1) + [f"var(--c{i})" for i in range(2, COLOURED)])
    for method in ranked:
        if method["label"] not in chosen:
            chosen[method["label"]] = next(free, "var(--rest)")
    return chosen


# --- the recommended method -----------------------------------------------------------------------------


def _facts(report: Report) -> str:
    taken = _find(report, report["verdict"]["take"])
    if taken is None:
        return ""
    steps = taken["steps_to_baseline"]
    facts = [
        ("Method", taken["label"]),
        ("Rank, scale", f"{taken['rank']}, {_scale(taken)}")
        if _tells_scale(report)
        else ("Rank", taken["rank"]),
        ("Learning rate", f"{taken['learning_rate']:g}"),
        ("Final validation loss", _loss(taken["final"]["mean"])),
    ]
    if taken["label"] != report["baseline"] and steps is not None:
        facts.append(("Reaches LoRA's final loss after", f"{steps:,.0f} of {report['steps']:,} steps"))
    shown = "".join(f"<div><dt>{text(name)}</dt><dd>{text(value)}</dd></div>" for name, value in facts)
    return f'<dl class="facts">{shown}</dl>'


def _find(report: Report, label: str | None) -> Report | None:
    return next((method for method in report["methods"] if method["label"] == label), None)


# --- final losses ------------------------------------------------------------------------------------------


def _finals(ranked: Sequence[Report], colours: Mapping[str, str], report: Report) -> str:
    """A row for each method, a dot for each seed."""
    low, high = _range([loss for method in ranked for loss in method["final"]["losses"]], ranked)

    def at(loss: float) -> str:
        return f"{100 * min(1.0, (loss - low) / (high - low)):.2f}%"

    baseline = _find(report, report["baseline"])
    mark = ""
    if baseline and baseline["final"]:
        mark = f'<span class="mark" style="left:{at(baseline["final"]["mean"])}"></span>'
    rows = []
    for method in ranked:
        colour, final = colours[method["label"]], method["final"]
        dots = "".join(
            f'<span class="dot" style="left:{at(loss)};background:{colour}"></span>'
            for loss in final["losses"]
        )
        tick = f'<span class="tick" style="left:{at(final["mean"])};background:{colour}"></span>'
        if final["mean"] > high:
            dots, tick = "", '<span class="far">→</span>'
        spread = "" if final["deviation"] is None else f"<small>± {_loss(final['deviation'])}</small>"
        rows.append(
            f'<b>{text(method["label"])}</b><div class="track">{mark}{dots}{tick}</div>'
            f'<span class="value">{_loss(final["mean"])}{spread}</span>'
        )
    scale = "".join(f'<span style="left:{at(tick)}">{tick:g}</span>' for tick in ticks(low, high, 5))
    return _section(
        "Final validation loss",
        f"In {report['unit']}; lower is better. A dot is a seed, a bar the mean over {_seeds(report)}, the "
        "dashed line LoRA's mean. Numbers: mean ± standard deviation. An arrow: beyond the scale.",
        f'<div class="dots">{"".join(rows)}<span></span><div class="scale">{scale}</div><span></span></div>',
    )


def _range(values: Sequence[float], ranked: Sequence[Report]) -> tuple[float, float]:
    """Limits of the loss axis. One method far behind must not squeeze all others into a corner."""
    low, high = min(values), max(values)
    means = [method["final"]["mean"] for method in ranked]
    middle = means[len(means) // 2]
    if middle > low:
        high = min(high, low + 8 * (middle - low))
    margin = 0.06 * (high - low) or 0.01 * abs(low) or 0.01
    return low - margin, high + margin


# --- curves --------------------------------------------------------------------------------------------


def _curves(ranked: Sequence[Report], colours: Mapping[str, str], report: Report) -> str:
    drawn = [(m, colours[m["label"]], m["label"] == report["baseline"]) for m in reversed(ranked)]
    items = "".join(
        f'<li><i class="{"dash" if is_baseline else ""}" style="border-color:{colour}"></i>'
        f"{text(method['label'])}</li>"
        for method, colour, is_baseline in reversed(drawn)
        if colour != "var(--rest)"
    )
    rest = sum(colour == "var(--rest)" for _, colour, _ in drawn)
    if rest:
        items += f'<li><i style="border-color:var(--rest)"></i>{rest} more, shown below</li>'
    return _section(
        "Validation loss during training",
        f"On {_judging_rows(report)}, {report['validation']['examples']:,} rows, after the same steps for "
        f"every method. Lines are means over {_seeds(report)}; bands span the lowest to the highest seed.",
        _chart(drawn, report) + f'<ul class="legend">{items}</ul>',
    )


def _one_by_one(ranked: Sequence[Report], report: Report) -> str:
    baseline = _find(report, report["baseline"])
    charts = []
    for method in ranked:
        if method is baseline:
            continue
        behind = [(baseline, "var(--c1)", True)] if baseline and baseline["final"] else []
        drawn = [*behind, (method, "var(--c0)", False)]
        charts.append(
            f'<div class="small"><h3>{text(method["label"])} <i>{_loss(method["final"]["mean"])}</i></h3>'
            f"{_chart(drawn, report, all_of=ranked, ticks_y=3)}</div>"
        )
    return _section(
        "Each method against LoRA",
        "LoRA is dashed; all charts have the same scale. The number is the final loss.",
        f'<div class="many">{"".join(charts)}</div>',
    )


def _chart(
    drawn: Sequence[tuple[Report, str, bool]],
    report: Report,
    *,
    all_of: Sequence[Report] | None = None,
    ticks_y: int = 5,
) -> str:
    """Bands and lines of (method, colour, is dashed), the last on top; the axis fits `all_of`, if given."""
    steps = report["steps"]
    low, high = _heights([method for method, _, _ in drawn] if all_of is None else all_of)

    def points(xs: Iterable[float], ys: Iterable[float]) -> str:
        return " ".join(
            f"{100 * x / steps:.2f},{100 * (high - y) / (high - low):.2f}"
            for x, y in zip(xs, ys, strict=True)
        )

    lines = [f'<path class="grid" d="M0 {_up(y, low, high)}H100"/>' for y in ticks(low, high, ticks_y)]
    for method, colour, _ in drawn:
        curve = method["curve"]
        around = points(
            [*curve["steps"], *reversed(curve["steps"])], [*curve["max"], *reversed(curve["min"])]
        )
        if colour != "var(--rest)":
            lines.append(f'<polygon class="band" style="fill:{colour}" points="{around}"/>')
    for method, colour, is_dashed in drawn:
        kind = "mean" + (" rest" if colour == "var(--rest)" else "") + (" dashed" if is_dashed else "")
        line = points(method["curve"]["steps"], method["curve"]["mean"])
        lines.append(f'<polyline class="{kind}" style="stroke:{colour}" points="{line}"/>')
    y_labels = "".join(
        f'<span class="y" style="top:{_up(y, low, high)}%">{y:g}</span>' for y in ticks(low, high, ticks_y)
    )
    x_labels = "".join(
        f'<span class="x" style="left:{100 * x / steps:.2f}%">{x:,g}</span>' for x in _step_ticks(steps)
    )
    name = '<span class="x name">optimizer steps</span>' if all_of is None else ""
    labels = ", ".join(method["label"] for method, _, _ in drawn)
    return (
        f'<div class="chart"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" '
        f'aria-label="Validation loss of {text(labels)} over {steps} steps">{"".join(lines)}</svg>'
        f"{y_labels}{x_labels}{name}</div>"
    )


def _heights(methods: Sequence[Report]) -> tuple[float, float]:
    """Limits of the loss axis: the better half of the methods fits from the first quarter of the run on."""
    curves = sorted((method["curve"] for method in methods), key=lambda curve: curve["mean"][-1])
    better = curves[: len(curves) // 2 + 1]
    low = min(min(curve["min"]) for curve in curves)
    high = max(max(curve["max"][len(curve["max"]) // 4 :]) for curve in better)
    margin = 0.05 * (high - low) or 0.01 * abs(low) or 0.01
    return low - margin, high + margin


def _up(y: float, low: float, high: float) -> str:
    return f"{100 * (high - y) / (high - low):.2f}"


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw)
    first = math.ceil(low / step)
    return [float(f"{i * step:.10g}") for i in range(first, math.floor(high / step) + 1)]


def _step_ticks(steps: int) -> list[int]:
    return sorted({round(tick) for tick in ticks(0, steps, 4)} | {0})


# --- the tables ----------------------------------------------------------------------------------------


def _results(methods: Sequence[Report], report: Report) -> str:
    heads = [
        "Method",
        "Final loss",
        "Improvement on LoRA",
        "Learning rate",
        "Steps to LoRA's loss",
        "Accuracy",
        "Training time",
        "Peak memory",
    ]
    return _section(
        "All results",
        "“Beyond” or “within”: whether the difference exceeds the spread across seeds (±, half the 95 % "
        f"interval of Student's t, paired by seed).{_detectable(report)} Time is the median over seeds, "
        "training steps only; memory is the device's peak, or the process's on a CPU.",
        _table(heads, [_result(method, report, len(heads)) for method in methods]),
    )


def _table(heads: Sequence[str], rows: Sequence[str]) -> str:
    head = "".join(
        f'<th scope="col"{" class=words" if name in IN_WORDS else ""}>{name}</th>' for name in heads
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _result(method: Report, report: Report, columns: int) -> str:
    if not method["final"]:
        problem = f'<td class="plain" colspan="{columns - 1}">{text(method["problem"])}</td>'
        return _row(method, report, problem)
    final, is_baseline = method["final"], method["label"] == report["baseline"]
    steps = method["steps_to_baseline"]
    cells = [
        _loss(final["mean"])
        + ("" if final["deviation"] is None else f"<small>± {_loss(final['deviation'])}</small>"),
        "–" if is_baseline else _below(final["below_baseline"]),
        f"{method['learning_rate']:g}",
        "never" if steps is None else f"{steps:,.0f}",
        f"{final['accuracy']:.1%}",
        _seconds(method["seconds"]),
        _memory(method["peak_memory_bytes"]),
    ]
    return _row(method, report, "".join(f"<td>{cell}</td>" for cell in cells))


def _row(method: Report, report: Report, cells: str) -> str:
    kind = ' class="taken"' if method["label"] == report["verdict"]["take"] else ""
    return f'<tr{kind}><th scope="row">{text(method["label"])}</th>{cells}</tr>'


def _below(found: Report | None) -> str:
    if found is None:
        return "–"
    width = _half_width(found)
    spread = "beyond" if found["beyond_spread"] else "within"
    told = "one seed" if width is None else f"±\N{NO-BREAK SPACE}{_loss(width)}, {spread}"
    return f"{found['mean']:+.4f}<small>{told}</small>"


def _half_width(found: Report) -> float | None:
    """Of the interval of a difference; None with one seed."""
    return None if found["low"] is None else (found["high"] - found["low"]) / 2


def _detectable(report: Report) -> str:
    """How large a difference from LoRA had to be to exceed the spread, as a sentence; nothing if unknown."""
    compared = [
        method["final"]["below_baseline"]
        for method in report["methods"]
        if method["final"] and method["label"] != report["baseline"]
    ]
    widths = [width for found in compared if found and (width := _half_width(found)) is not None]
    if not widths:
        return ""
    by_method = f" (median; {_loss(min(widths))} to {_loss(max(widths))})" if len(widths) > 1 else ""
    return (
        f" With {_seeds(report)}, a difference had to exceed {_loss(statistics.median(widths))}{by_method} "
        "to be beyond it; a smaller one cannot be told from chance."
    )


def _adapters(methods: Sequence[Report], report: Report) -> str:
    heads = [
        "Method",
        "Rank",
        "Alpha",
        "Scale",
        "Trainable parameters",
        "Exported rank",
        "What the budget changed",
        "Other options",
    ]
    untold = "" if _tells_scale(report) else " The version that made this report did not record alphas."
    return _section(
        "Rank and scale of each method",
        f"The budget of {report['budget']:,} trainable parameters sets the rank of a method for which none "
        "was given. Alpha stays, so the scale changes: alpha / rank, or alpha / √rank with rsLoRA. Where "
        "layers or links have ranks of their own, it is a range. Other options: those that are not defaults, "
        f"and any dropout; comparison.json has all.{untold}",
        _table(heads, [_adapter(method, report) for method in methods]),
    )


def _adapter(method: Report, report: Report) -> str:
    trained, exported = method["trainable_parameters"], method["exported_rank"]
    share = "" if trained is None else f"<small>{trained / report['budget']:.0%} of budget</small>"
    numbers = [
        str(method["rank"]),
        "–" if method["alpha"] is None else f"{method['alpha']:g}",
        _scale(method),
        "–" if trained is None else f"{trained:,}{share}",
        "–" if not method["final"] else "merged only" if exported is None else str(exported),
    ]
    words = [_change(method), _other_options(method) or "–"]
    cells = [*(f"<td>{cell}</td>" for cell in numbers), *(f'<td class="words">{text(w)}</td>' for w in words)]
    return _row(method, report, "".join(cells))


def _tells_scale(report: Report) -> bool:
    """Not before format 3."""
    return any(method["scale"] is not None for method in report["methods"])


def _scale(told: Report) -> str:
    """Of a method, or of what it was before the budget; a dash in reports that do not tell it."""
    if told["scale"] is None:
        return "–"
    if told["scale_range"] is None:
        return f"{told['scale']:.3g}"
    low, high = told["scale_range"]
    return f"{low:.3g} to {high:.3g}"


def _change(method: Report) -> str:
    """What the budget did to a method's rank and scale."""
    before = method["before_budget"]
    if before is None or method["trainable_parameters"] is None:
        return "–"
    if not method["match_budget"]:
        return "nothing: the rank was given"
    if method["rank"] == before["rank"]:
        return "nothing: the default rank fits"
    scales = [_scale(before), _scale(method)]
    scale = f"scale {scales[0]} → {scales[1]}" if scales[0] != scales[1] else "the same scale"
    return f"rank {before['rank']} → {method['rank']}, {scale}"


def _other_options(method: Report) -> str:
    options = dict(method["adapter"])
    if method["options"] and method["options"]["dropout"]:
        options["dropout"] = method["options"]["dropout"]
    shown = {name: value for name, value in options.items() if name not in ("method", "rank", "alpha")}
    return ", ".join(f"{name} {_plain(value)}" for name, value in shown.items())


# --- the search ----------------------------------------------------------------------------------------


def _searches(methods: Sequence[Report], report: Report) -> str:
    searched = report["search"]
    asked = (
        "each method's default rate times 0.1, 0.32, 1, 3.2 and 10"
        if searched["learning_rates"] == "auto"
        else (", ".join(f"{rate:g}" for rate in searched["learning_rates"]))
    )
    tables = "".join(_search(method) for method in methods if method["search"])
    return _section(
        "Learning rate search",
        f"Tried: {asked}. Every rung trains the remaining rates for the steps shown, with a complete "
        f"schedule, and keeps the better half by the loss on {searched['examples']:,} held-out training rows "
        f"(seed {searched['seed']}; trained on the other {searched['trained_on']:,}). {_unused(report)} not "
        "used. The chosen rate is green, dropped ones are grey.",
        f'<div class="searches">{tables}</div>' if tables else "<p>No search: there was only one rate.</p>",
    )


def _search(method: Report) -> str:
    """One method's trials as a table: a row for each rate, a column for each rung."""
    rates = sorted({trial["learning_rate"] for rung in method["search"] for trial in rung["trials"]})
    head = "".join(f'<th scope="col">{rung["steps"]:,} steps</th>' for rung in method["search"])
    rows = []
    for rate in rates:
        cells = "".join(_trial(rung, rate) for rung in method["search"])
        kind = ' class="taken"' if rate == method["learning_rate"] else ""
        rows.append(f'<tr{kind}><th scope="row">{rate:g}</th>{cells}</tr>')
    return (
        f'<div class="wide"><h3>{text(method["label"])}</h3><table><thead><tr><th scope="col">rate</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _trial(rung: Report, rate: float) -> str:
    trial = next((trial for trial in rung["trials"] if trial["learning_rate"] == rate), None)
    if trial is None:
        return "<td></td>"
    shown = "diverged" if trial["loss"] is None else _loss(trial["loss"])
    return f"<td>{shown}</td>" if trial["kept"] else f'<td class="gone">{shown}</td>'


# --- the rest ------------------------------------------------------------------------------------------


def _recipe(report: Report) -> str:
    if report["winner"] is None:
        return ""
    spec = json.dumps(report["winner"], indent=2, ensure_ascii=False)
    return _section(
        "Train the recommended method",
        "Save this as winner.yaml next to the data and run “olora train winner.yaml”. For the API, copy "
        "model, adapter, hyperparameters and seed into the request.",
        f"<pre>{text(spec)}</pre>",
    )


def _rules(report: Report) -> str:
    training, validation = report["training"], report["validation"]
    shared = ", ".join(f"{name} {_plain(value)}" for name, value in report["hyperparameters"].items())
    rules = [
        f"All methods train on the same tokens of {training['file']} ({training['examples']:,} rows), in the "
        f"same order for the same seed, for {report['steps']:,} steps. They share: {shared}.",
        "A method without a given rank gets the rank whose parameter count is nearest to the budget of "
        f"{report['budget']:,}. Parameters that are trained one after another are added up. Other options, "
        "alpha among them, are the method's defaults, unless given.",
        f"All results are on {_judging_data(validation)} ({validation['examples']:,} rows), which was not "
        "used to choose anything.",
        "Two methods are compared seed by seed. A difference is beyond the spread if 0 lies outside the 95 % "
        "interval of Student's t. There is no correction, such as Holm's, for the number of "
        "methods: of twenty that are no different from LoRA, one is expected to seem different by chance.",
        "Steps to LoRA's loss: where a method's mean curve, interpolated between evaluations, first reaches "
        "LoRA's mean final loss.",
    ]
    items = "".join(f"<li>{text(rule)}</li>" for rule in rules)
    return _section("How it was measured", "", f'<ul class="rules">{items}</ul>')


def _judging_rows(report: Report) -> str:
    if "held_out" in report["validation"]:
        return f"the whole share held out of {report['training']['file']}"
    return "the whole validation file"


def _unused(report: Report) -> str:
    return "The validation rows are" if "held_out" in report["validation"] else "The validation file is"


def _judging_data(validation: Report) -> str:
    if held_out := validation.get("held_out"):
        by = "" if held_out["group_by"] is None else f", grouped by {held_out['group_by']}"
        return f"a share of {held_out['share']:g} of that file, held out by seed {held_out['seed']}{by}"
    return str(validation["file"])


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, bool | list | dict) else str(value)


def _footer(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return (
        f"<footer>{text(report['model'])} ({text(report['base_sha256'][:12])}) in {text(report['dtype'])} on "
        f"{text(report['device'])}; {text(versions)}. Files: {text(report['training']['sha256'][:12])} and "
        f"{text(report['validation']['sha256'][:12])}. All numbers on this page are in comparison.json."
        "</footer>"
    )


def _section(title: str, caption: str, content: str) -> str:
    paragraph = f'<p class="caption">{text(caption)}</p>' if caption else ""
    return f"<section><h2>{text(title)}</h2>{paragraph}{content}</section>"


def _seeds(report: Report) -> str:
    count = len(report["seeds"])
    return "one seed" if count == 1 else f"{count} seeds"


def _loss(loss: float) -> str:
    return f"{loss:.4f}"


def _seconds(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _memory(size: int) -> str:
    return f"{size / 2**20:,.0f} MB" if size < 2**33 else f"{size / 2**30:,.1f} GB"
