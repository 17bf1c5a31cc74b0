"""The specs of training runs and comparisons, free of torch.

The request body, the row, the command line, the list of methods and the adapter's manifest are views of the
models here. `read_spec` turns untyped input into a `TrainSpec`; `resolve` turns "auto" into numbers.
"""

from .adapters import ADAPTER_SPECS, DEFAULT_METHOD, check_export
from .base import Spec, nearest, spec_error
from .compared_methods import ComparedMethod
from .comparison import MAX_SEEDS, ComparisonSpec, check_judging, read_comparison
from .hyperparameters import MAX_CONTEXT, Hyperparameters
from .methods.base import AdapterSpec
from .resolving import RunFacts, auto_batch_size, auto_epochs, learning_rate_for, resolve, with_learning_rate
from .serving import MAX_EXPORT_RANK, WHERE_TOO_WIDE
from .training import (
    ADAPTER_ALIASES,
    MAX_SEED,
    Columns,
    GroupBy,
    TrainSpec,
    ValidationShare,
    check_validation,
    known_hyperparameters,
    read_spec,
)

__all__ = [
    "ADAPTER_ALIASES",
    "ADAPTER_SPECS",
    "DEFAULT_METHOD",
    "MAX_CONTEXT",
    "MAX_EXPORT_RANK",
    "MAX_SEED",
    "MAX_SEEDS",
    "WHERE_TOO_WIDE",
    "AdapterSpec",
    "Columns",
    "ComparedMethod",
    "ComparisonSpec",
    "GroupBy",
    "Hyperparameters",
    "RunFacts",
    "Spec",
    "TrainSpec",
    "ValidationShare",
    "auto_batch_size",
    "auto_epochs",
    "check_export",
    "check_judging",
    "check_validation",
    "known_hyperparameters",
    "learning_rate_for",
    "nearest",
    "read_comparison",
    "read_spec",
    "resolve",
    "spec_error",
    "with_learning_rate",
]
