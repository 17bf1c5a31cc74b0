"""The adapter method object."""

from typing import Any, Literal

from pydantic import BaseModel


class AdapterMethodObject(BaseModel):
    """One value of `adapter.method`, with its options."""

    id: str
    object: Literal["adapter_method"] = "adapter_method"
    is_default: bool
    summary: str
    paper: str
    cost: str
    choose: str
    options: dict[str, Any]
    """JSON schema of the `adapter` object."""


class AdapterMethodList(BaseModel):
    """Every method at once; this list has no pages."""

    object: Literal["list"] = "list"
    data: list[AdapterMethodObject]
