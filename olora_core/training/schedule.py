"""Learning-rate schedules."""

import math
from functools import partial

from ..methods.base import Schedule
from ..specs import Hyperparameters


def schedule_of(hyperparameters: Hyperparameters) -> Schedule:
    """`schedule(i, n)`: the multiplier of the peak rate at optimizer step i = 1…n of n."""
    return partial(_multiplier, hyperparameters.schedule, hyperparameters.warmup_ratio)


def _multiplier(kind: str, warmup_ratio: float, i: int, n: int) -> float:
    """As in transformers, a function of the i − 1 finished steps, so a run with warm-up begins at rate 0.

    The warm-up takes ceil(warmup_ratio n) steps, but leaves at least one step at the peak.
    """
    done, warmup = i - 1, min(math.ceil(warmup_ratio * n), n - 1)
    if done < warmup:
        return done / warmup
    share = (done - warmup) / max(1, n - warmup)
    if kind == "linear":
        return 1 - share
    return (1 + math.cos(math.pi * share)) / 2 if kind == "cosine" else 1.0
