"""Lists and deletions, the same for every kind of object."""

from typing import Generic, Literal, TypeVar

from pydantic import BaseModel

T = TypeVar("T", bound=BaseModel)


class Page(BaseModel, Generic[T]):
    """One page. While `has_more` is true, get the next one with `after` = `last_id`."""

    object: Literal["list"] = "list"
    data: list[T]
    has_more: bool
    first_id: str | None
    last_id: str | None

    @classmethod
    def of(cls, items: list[T], has_more: bool) -> "Page[T]":
        ids = [str(getattr(item, "id")) for item in items]  # noqa: B009
        return cls(
            data=items,
            has_more=has_more,
            first_id=ids[0] if ids else None,
            last_id=ids[-1] if ids else None,
        )


class Deleted(BaseModel):
    id: str
    object: str
    deleted: bool = True
