"""The methods on offer, by the name a spec gives."""

from typing import Any

from .adalora import AdaLoRA
from .ba_lora import BALoRA
from .base import Method, Outputs, place
from .cola import COLA
from .lora import LoRA
from .melora import MELoRA
from .mora import MoRA
from .olora import OLoRA
from .pissa import PiSSA
from .prilora import PRILoRA
from .rm_lora import RMLoRA
from .sora import SoRA
from .tt_lora import TTLoRA
from .xgblora import XGBLoRA

METHODS: dict[str, type[Method[Any, Any]]] = {
    "olora": OLoRA,
    "lora": LoRA,
    "pissa": PiSSA,
    "melora": MELoRA,
    "ba_lora": BALoRA,
    "prilora": PRILoRA,
    "tt_lora": TTLoRA,
    "sora": SoRA,
    "adalora": AdaLoRA,
    "rm_lora": RMLoRA,
    "cola": COLA,
    "xgblora": XGBLoRA,
    "mora": MoRA,
}

__all__ = ["METHODS", "Method", "Outputs", "place"]
