"""A page of a list: total and stable order, continued after the last id that a client has seen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.orm import Session

from .errors import UnknownCursor
from .models import Row

RowT = TypeVar("RowT", bound=Row)


@dataclass(frozen=True)
class RowPage(Generic[RowT]):
    data: Sequence[RowT]
    has_more: bool


def read_page(
    session: Session,
    rows: Select[RowT],
    model: Any,
    *,
    within: Any,
    after: str | None,
    limit: int,
    newest_first: bool = True,
) -> RowPage[RowT]:
    """`limit` rows of `model` in the order of their sequence numbers, after the row with id `after`.

    The row `after` must lie `within` the same owner, but it may have left the list since (a deleted file,
    a cancelled job), so that a client that walks and deletes goes on. Raises UnknownCursor.
    """
    if after is not None:
        seq = session.scalar(select(model.seq).where(model.id == after, within))
        if seq is None:
            raise UnknownCursor(after)
        rows = rows.where(model.seq < seq if newest_first else model.seq > seq)
    order = model.seq.desc() if newest_first else model.seq.asc()
    found = session.scalars(rows.where(within).order_by(order).limit(limit + 1)).all()
    return RowPage(found[:limit], len(found) > limit)
