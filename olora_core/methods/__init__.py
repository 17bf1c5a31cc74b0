"""The methods on offer, by the name a spec gives."""

from typing import Any

from .base import Method, Outputs, place
from .cola import COLA
from .lora import LoRA
from .olora import OLoRA
from .xgblora import XGBLoRA

METHODS: dict[str, type[Method[Any]]] = {"olora": OLoRA, "lora": LoRA, "cola": COLA, "xgblora": XGBLoRA}

__all__ = ["METHODS", "Method", "Outputs", "place"]
