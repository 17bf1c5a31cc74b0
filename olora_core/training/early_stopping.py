"""Early stopping, decided from the evaluations of the whole validation file so far.

Everything is a function of their list, so that a resumed run decides as an uninterrupted one.
"""

import math
from collections.abc import Sequence

from ..progress import Evaluated
from ..specs import Hyperparameters


def best_of(evaluations: Sequence[Evaluated]) -> Evaluated | None:
    """The evaluation with the lowest loss after a training step; the earlier of two equals."""
    return min((e for e in evaluations if e.step), key=lambda e: e.loss, default=None)


def is_over(evaluations: Sequence[Evaluated], hyperparameters: Hyperparameters) -> bool:
    """Whether `early_stopping_patience` evaluations in a row have brought no improvement.

    An improvement is a loss lower than the last improvement's by more than `early_stopping_min_delta`; the
    first evaluation after a training step counts as one.
    """
    patience, least = hyperparameters.early_stopping_patience, math.inf
    waited = 0
    for evaluation in evaluations:
        if not evaluation.step:
            continue
        if evaluation.loss < least - hyperparameters.early_stopping_min_delta:
            least, waited = evaluation.loss, 0
        else:
            waited += 1
    return patience is not None and waited >= patience
