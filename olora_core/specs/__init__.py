"""Everything a caller may ask for, said once and free of torch.

The REST body, the row, the command line, the list of methods and the adapter's manifest are views of the
models here. `read_spec` turns loose input into a `TrainSpec`; `resolve` turns "auto" into numbers.
"""

from .adapters import ADAPTER_SPECS, DEFAULT_METHOD, check_export
from .base import Spec, nearest, spec_error
from .comparison import MAX_SEEDS, ComparedMethod, ComparisonSpec, read_comparison
from .methods.adalora import AdaLoRASpec
from .methods.ba_lora import BALoRASpec
from .methods.base import AdapterSpec, FactorsSpec, Start, SVDSpec
from .methods.cola import COLASpec
from .methods.lora import LoRASpec
from .methods.melora import MELoRASpec
from .methods.mora import MoRASpec
from .methods.olora import OLoRASpec
from .methods.pissa import PiSSASpec
from .methods.prilora import PRILoRASpec
from .methods.rm_lora import RMLoRASpec
from .methods.sora import SoRASpec
from .methods.tt_lora import TTLoRASpec
from .methods.xgblora import XGBLoRASpec
from .resolving import Facts, auto_batch_size, auto_epochs, learning_rate_for, resolve
from .serving import MAX_EXPORT_RANK, WHERE_TOO_WIDE
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
    "MAX_SEEDS",
    "WHERE_TOO_WIDE",
    "AdaLoRASpec",
    "AdapterSpec",
    "BALoRASpec",
    "COLASpec",
    "ComparedMethod",
    "ComparisonSpec",
    "FactorsSpec",
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
    "check_export",
    "check_validation",
    "known_hyperparameters",
    "learning_rate_for",
    "nearest",
    "read_comparison",
    "read_spec",
    "resolve",
    "spec_error",
]
