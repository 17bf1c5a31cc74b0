"""What the final losses of several methods allow to be said: which to take, and how sure that is."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

STUDENT_95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093),
)
"""Two-sided 95 % points of Student's t with 1, 2, … degrees of freedom."""


@dataclass(frozen=True)
class Difference:
    """How much lower one method's loss is than another's, paired by seed."""

    mean: float
    half_width: float | None
    """Of the 95 % interval around the mean; None with a single seed, which tells nothing of it."""

    @property
    def is_beyond(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.half_width is not None and abs(self.mean) > self.half_width

    @property
    def bounds(self) -> tuple[float, float] | None:
        width = self.half_width
        return None if width is None else (self.mean - width, self.mean + width)


def difference(lower: Sequence[float], higher: Sequence[float]) -> Difference:
    """`higher - lower`, seed by seed, whose mean is taken to follow Student's t."""
    pairs = [b - a for a, b in zip(lower, higher, strict=True)]
    if len(pairs) == 1:
        return Difference(pairs[0], None)
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return Difference(statistics.fmean(pairs), STUDENT_95[len(pairs) - 2] * error)


def steps_to(curve: Sequence[tuple[int, float]], loss: float) -> float | None:
    """Where a curve of (step, loss) first comes down to that loss, on straight lines; None: never."""
    for (step, before), (next_step, after) in pairwise(curve):
        if before <= loss:
            return float(step)
        if after <= loss:
            return step + (next_step - step) * (before - loss) / (before - after)
    return float(curve[-1][0]) if curve and curve[-1][1] <= loss else None


@dataclass(frozen=True)
class Verdict:
    """Which method to take, and why."""

    take: str
    best: str
    """The lowest mean loss; not the one to take where LoRA's is within the spread."""
    sentence: str
    against_baseline: Difference | None
    """The best against LoRA; None where it is LoRA, or LoRA has no result."""
    runner_up: str | None
    against_runner_up: Difference | None


def judge(losses: Mapping[str, Sequence[float]], baseline: str, unit: str) -> Verdict:
    """From each method's final losses, one a seed in the same order; those without a result are left out."""
    means = {method: statistics.fmean(values) for method, values in losses.items()}
    best, *others = sorted(means, key=means.__getitem__)
    runner_up = others[0] if others else None
    behind = difference(losses[best], losses[runner_up]) if runner_up else None
    against = difference(losses[best], losses[baseline]) if baseline in others else None
    take = best
    if against is not None and against.half_width is not None and not against.is_beyond:
        take = baseline
    seeds = len(losses[best])
    sentence = _sentence(best, baseline, runner_up, means[best], against, behind, seeds, unit)
    return Verdict(take, best, sentence, against, runner_up, behind)


def _sentence(
    best: str,
    baseline: str,
    runner_up: str | None,
    mean: float,
    against: Difference | None,
    behind: Difference | None,
    seeds: int,
    unit: str,
) -> str:
    """One, that says which to take or that the difference is within the seeds' spread."""
    if behind is None:
        return f"Take {best}: no other method has a result to compare it with."
    its = f"its final validation loss, {mean:.4f} {unit},"
    if seeds == 1:
        told, other = (against, baseline) if against else (behind, runner_up)
        return (
            f"Take {best} for now: {its} is {told.mean:.4f} below {other}'s, but one seed tells nothing of "
            "the spread; compare with three or more."
        )
    if against is None:
        return (
            f"Take {best}: {its} is the lowest; {runner_up}'s is {behind.mean:.4f} higher, {_spread(behind)}."
        )
    if not against.is_beyond:
        return (
            f"The difference is within the seeds' spread: {best} is best, but {its} is only "
            f"{against.mean:.4f} below {baseline}'s ({_interval(against)}); nothing here speaks against "
            f"plain {baseline}."
        )
    next_best = ""
    if runner_up != baseline:
        next_best = f"; the runner-up, {runner_up}, is {behind.mean:.4f} behind, {_spread(behind)}"
    return f"Take {best}: {its} is {against.mean:.4f} below {baseline}'s, {_spread(against)}{next_best}."


def _spread(found: Difference) -> str:
    return f"{'beyond' if found.is_beyond else 'within'} the seeds' spread ({_interval(found)})"


def _interval(found: Difference) -> str:
    low, high = found.bounds or (found.mean, found.mean)
    return f"95 % interval {low:.4f} to {high:.4f}"
