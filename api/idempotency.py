"""A request that creates an object does so once, even if a client that lost the answer repeats it."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from store.idempotency import close_request, drop_request, open_request

from .deps import Call
from .errors import ApiError


def once(call: Call, route: str, content: str, make: Callable[[Session], str]) -> tuple[str, bool]:
    """Calls `make` in a transaction, unless an earlier try of this request did so.

    `content` is the digest of the body. Returns the object's id and whether this call created it. A refused
    request is forgotten, so that a corrected one can follow; if the outcome is unknown (the database went
    away), the record stays, and a retry finds what was committed.
    """
    writes = call.services.writes
    opened = open_request(
        writes,
        key_id=call.key_id,
        route=route,
        content=content,
        idempotency_key=call.idempotency_key,
        retry_count=call.retry_count,
    )
    if opened.object_id is not None:
        return opened.object_id, False
    try:
        with writes.begin() as session:
            made = make(session)
            close_request(session, opened, made)
    except (ApiError, OloraError):
        drop_request(writes, opened)
        raise
    return made, True
