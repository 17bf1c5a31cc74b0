"""The methods that a spec can name: for a new one, a class in `methods/` and a line in the union here."""

from typing import Annotated, get_args

from pydantic import Field

from ..errors import SpecError
from .methods.adalora import AdaLoRASpec
from .methods.ba_lora import BALoRASpec
from .methods.base import AdapterSpec
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
from .serving import MAX_EXPORT_RANK, WHERE_TOO_WIDE

_OneMethod = (
    OLoRASpec
    | LoRASpec
    | PiSSASpec
    | MELoRASpec
    | BALoRASpec
    | PRILoRASpec
    | TTLoRASpec
    | SoRASpec
    | AdaLoRASpec
    | RMLoRASpec
    | COLASpec
    | XGBLoRASpec
    | MoRASpec
)
AnyAdapterSpec = Annotated[_OneMethod, Field(discriminator="method")]
ADAPTER_SPECS: dict[str, type[AdapterSpec]] = {
    spec.model_fields["method"].default: spec for spec in get_args(_OneMethod)
}
"""A method's spec by its name, in the order of the union."""
DEFAULT_METHOD = "olora"


def check_export(spec: AdapterSpec) -> None:
    """Raises SpecError for an export that this method cannot produce, or that no server can load."""
    if spec.export == "merged":
        if spec.export_rank is not None:
            raise SpecError(
                "adapter.export_rank truncates an adapter, and adapter.export = 'merged' exports none; leave "
                "one of the two out.",
                param="adapter.export_rank",
            )
        return
    if not spec.has_pair:
        raise SpecError(
            "adapter.export = 'adapter': an update of adapter.type = 6 is not a LoRA that servers can load; "
            "export the whole model with adapter.export = 'merged', or use another adapter.type.",
            param="adapter.export",
        )
    if spec.export_rank is not None and spec.export_rank > MAX_EXPORT_RANK:
        raise SpecError(
            f"adapter.export_rank = {spec.export_rank} is more than servers load; "
            f"use at most {MAX_EXPORT_RANK}.",
            param="adapter.export_rank",
        )
    if spec.is_too_wide(spec.pair_rank):
        widest = MAX_EXPORT_RANK * spec.rank // spec.pair_rank
        raise SpecError(
            f"adapter.rank = {spec.rank} exports a LoRA of rank {spec.pair_rank}, and servers load at most "
            f"{MAX_EXPORT_RANK}; use a rank up to {widest}, {WHERE_TOO_WIDE}.",
            param="adapter.rank",
        )
