"""What the sweeps show: how near each rule comes to the best rate, and what a miss costs.

The best rate of a sweep is the vertex of a parabola through the lowest loss and its neighbours, over the
logarithm of the rate. What another rate costs is read from the parabola through the three swept rates nearest
to it, so it is an interpolation; beyond the swept rates it is a bound from below, and counted as such.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

Line = dict[str, Any]
Rule = Callable[[Line], float]
WITHIN = 2.0


def points(line: Line) -> list[tuple[float, float]]:
    """(log10 rate, loss) of the runs that did not diverge, by rising rate."""
    return sorted((math.log10(rate), loss) for rate, loss in line["losses"] if math.isfinite(loss))


def parabola(three: list[tuple[float, float]]) -> tuple[float, float, float]:
    """(a, b, c) of `a x² + b x + c` through three points."""
    (x0, y0), (x1, y1), (x2, y2) = three
    first, second = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    a = (second - first) / (x2 - x0)
    b = first - a * (x0 + x1)
    return a, b, y0 - a * x0**2 - b * x0


def best(line: Line) -> tuple[float, float]:
    """The best rate, and the loss there."""
    found = points(line)
    lowest = min(range(len(found)), key=lambda i: found[i][1])
    if lowest in (0, len(found) - 1):
        return 10 ** found[lowest][0], found[lowest][1]
    a, b, c = parabola(found[lowest - 1 : lowest + 2])
    x = -b / (2 * a)
    return 10**x, a * x**2 + b * x + c


def lost(line: Line, rate: float) -> tuple[float, bool]:
    """Nats above the lowest loss of the sweep, and whether this rate lies beyond those that were swept."""
    found, x = points(line), math.log10(rate)
    lowest = min(loss for _, loss in found)
    if not found[0][0] <= x <= found[-1][0]:
        edge = found[0] if x < found[0][0] else found[-1]
        return edge[1] - lowest, True
    middle = min(range(1, len(found) - 1), key=lambda i: abs(found[i][0] - x), default=None)
    if middle is None:
        return 0.0, True
    a, b, c = parabola(found[middle - 1 : middle + 2])
    return max(0.0, a * x**2 + b * x + c - lowest), False


def group(line: Line) -> str:
    """The base, with what makes the sweep another kind than the most."""
    return " ".join([line["base"], *(line[name] for name in ("type", "quantization") if name in line)])


def summary(lines: list[Line], rules: dict[str, Rule]) -> list[str]:
    """A line for each group and rule, then one for all groups together."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[group(line)].append(line)
    rows = []
    for label, own in [*groups.items(), ("all", lines)]:
        for name, rule in rules.items():
            factors = [rule(line) / best(line)[0] for line in own]
            costs = [lost(line, rule(line)) for line in own]
            near = sum(1 / WITHIN <= factor <= WITHIN for factor in factors)
            spread = math.exp(statistics.pstdev(math.log(factor) for factor in factors))
            nats = sorted(cost for cost, _ in costs)
            high = nats[math.ceil(0.9 * len(nats)) - 1]
            beyond = sum(outside for _, outside in costs)
            rows.append(
                f"{label:12} {name:18} {near:3} of {len(own):3} within a factor {WITHIN:g}; "
                f"rate / best: median {statistics.median(factors):.2f}, spread ×{spread:.2f}; "
                f"nats lost: median {statistics.median(nats):.3f}, "
                f"nine tenths {high:.3f}, most {nats[-1]:.3f}; {beyond} beyond the sweep"
            )
    return rows


def details(lines: Iterable[Line], rules: dict[str, Rule]) -> list[str]:
    """A line for each triple."""
    rows = []
    for line in lines:
        rate, loss = best(line)
        told = ", ".join(
            f"{name} {rule(line):.2e} (×{rule(line) / rate:.2f}, +{lost(line, rule(line))[0]:.3f})"
            for name, rule in rules.items()
        )
        seeds = [loss, *line.get("others", ())]
        mean = f"{statistics.mean(seeds):.3f}" + (
            f" ± {statistics.stdev(seeds):.3f}" if len(seeds) > 1 else ""
        )
        rows.append(
            f"{group(line):12} {line['task']:10} {line['method']:8} {line['rank']:3}  best {rate:.2e} "
            f"({mean}): {told}"
        )
    return rows
