"""Pages of a list in a stable total order, each starting after the last id that the client has seen."""

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

    The row `after` must satisfy `within`, but may have left the list since (say, a deleted file), so that a
    client can delete while it pages. Raises UnknownCursor.
    """
    if after is not None:
        seq = session.scalar(select(model.seq).where(model.id == after, within))
        if seq is None:
            raise UnknownCursor(after)
        rows = rows.where(model.seq < seq if newest_first else model.seq > seq)
    order = model.seq.desc() if newest_first else model.seq.asc()
    found = session.scalars(rows.where(within).order_by(order).limit(limit + 1)).all()
    return RowPage(found[:limit], len(found) > limit)
