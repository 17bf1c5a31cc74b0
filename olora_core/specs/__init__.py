"""Everything a caller may ask for, said once and free of torch.

The REST body, the row, the command line, the list of methods and the adapter's manifest are views of the
models here. `read_spec` turns loose input into a `TrainSpec`; `resolve` turns "auto" into numbers.
"""

from .adapters import (
    ADAPTER_SPECS,
    DEFAULT_METHOD,
    MAX_EXPORT_RANK,
    AdaLoRASpec,
    AdapterSpec,
    BALoRASpec,
    COLASpec,
    LoRASpec,
    MELoRASpec,
    MoRASpec,
    OLoRASpec,
    PiSSASpec,
    PRILoRASpec,
    RMLoRASpec,
    SoRASpec,
    Start,
    SVDSpec,
    TTLoRASpec,
    XGBLoRASpec,
    check_export_rank,
)
from .base import Spec, nearest, spec_error
from .resolving import Facts, auto_batch_size, auto_epochs, learning_rate_for, resolve
from .training import (
    ADAPTER_ALIASES,
    MAX_CONTEXT,
    MAX_SEED,
    Hyperparameters,
    TrainSpec,
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
    "AdaLoRASpec",
    "AdapterSpec",
    "BALoRASpec",
    "COLASpec",
    "Facts",
    "Hyperparameters",
    "LoRASpec",
    "MELoRASpec",
    "MoRASpec",
    "OLoRASpec",
    "PRILoRASpec",
    "PiSSASpec",
    "RMLoRASpec",
    "SVDSpec",
    "SoRASpec",
    "Spec",
    "Start",
    "TTLoRASpec",
    "TrainSpec",
    "XGBLoRASpec",
    "auto_batch_size",
    "auto_epochs",
    "check_export_rank",
    "check_validation",
    "known_hyperparameters",
    "learning_rate_for",
    "nearest",
    "read_spec",
    "resolve",
    "spec_error",
]
