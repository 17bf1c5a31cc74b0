"""The model object."""

from typing import Literal

from pydantic import BaseModel


class ModelObject(BaseModel):
    """A base model, owned by the service, or a fine-tuned one, owned by its project.

    Of an alias, `olora.base` is the base model that it stands for; of a checkpoint, `olora` has its `job`,
    `checkpoint`, and the `status` of its adapter.
    """

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    shutdown_date: str | None = None
    olora: dict[str, str] | None = None


class ModelList(BaseModel):
    """Every model at once; this list has no pages."""

    object: Literal["list"] = "list"
    data: list[ModelObject]
