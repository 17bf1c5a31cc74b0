"""A creating request does its work once, however often a client that lost the answer sends it again."""

from collections.abc import Callable

from sqlalchemy.orm import Session

from olora_core.errors import OloraError
from store.idempotency import close_request, drop_request, open_request

from .deps import Call
from .errors import ApiError


def once(call: Call, route: str, content: str, make: Callable[[Session], str]) -> tuple[str, bool]:
    """Calls `make` in a transaction, unless an earlier try of this request did so.

    `content` is the digest of what was sent. Returns the object's id and whether it was made just now. A
    refusal is forgotten, so that a corrected request may follow; of a try whose outcome is not known (the
    database went away), the record stays, and a retry finds what was committed.
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
