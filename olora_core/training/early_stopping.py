"""Early stopping: what the evaluations of the whole validation file so far say about going on.

Everything follows from their list, so that a resumed run decides as an unbroken one.
"""

import math
from collections.abc import Sequence

from ..progress import Evaluated
from ..specs import Hyperparameters


def best_of(evaluations: Sequence[Evaluated]) -> Evaluated | None:
    """The lowest loss after any training, the earlier one of two equals."""
    return min((e for e in evaluations if e.step), key=lambda e: e.loss, default=None)


def is_over(evaluations: Sequence[Evaluated], hyperparameters: Hyperparameters) -> bool:
    """Whether `early_stopping_patience` evaluations in a row have brought no improvement.

    An improvement is lower than the last one by more than `early_stopping_min_delta`; the first evaluation
    after any training is one.
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
