"""Idempotent creation: a client's retry gets the object that the first try created.

`open_request` records a request before the work, `close_request` the created object in the transaction that
creates it. If a try dies in between, its retry takes over after a while, and the dead try can no longer
commit.
"""

import hashlib
import time
from dataclasses import dataclass

from sqlalchemy import delete, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from .errors import RequestMismatch, RequestPending
from .models import Request
from .session import Sessions, db_now

RETRY_WINDOW_SECONDS = 3600.0
"""How long a retry without an Idempotency-Key is recognised; a client may try for half an hour."""
KEEP_SECONDS = 86_400.0
"""How long an Idempotency-Key is remembered."""
DEAD_SECONDS = 10.0
"""A try without an answer for this long has died: there is one transaction between open and close."""
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Opened:
    """A recorded request; `object_id` is set if an earlier try has already created the object."""

    seq: int
    turn: int
    object_id: str | None = None


def content_digest(*parts: bytes | str) -> str:
    """SHA-256 over several parts, each with its length, such as a form's fields and its file's digest."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def open_request(
    sessions: Sessions,
    *,
    key_id: str,
    route: str,
    content: str,
    idempotency_key: str | None = None,
    retry_count: int = 0,
    wait_seconds: float = 30.0,
    dead_seconds: float = DEAD_SECONDS,
) -> Opened:
    """Records a request, or finds its earlier try and waits for the answer.

    `content` is the `content_digest` of the body. Requests with the same Idempotency-Key are the same
    request; without a key, a request is a retry if the client says so (`retry_count` > 0).
    Raises RequestMismatch (another body under the same key) and RequestPending (no answer in time).
    """
    key_digest = content_digest(key_id, route, idempotency_key) if idempotency_key else None
    mine = content_digest(key_id, route, content)
    deadline = time.monotonic() + wait_seconds
    while True:
        opened = _try_to_open(sessions, key_digest, mine, retry_count, dead_seconds)
        if opened is not None:
            return opened
        if time.monotonic() > deadline:
            raise RequestPending("The first try of this request has not been answered yet; try again soon.")
        time.sleep(_POLL_SECONDS)


def _try_to_open(
    sessions: Sessions, key_digest: str | None, content: str, retry_count: int, dead_seconds: float
) -> Opened | None:
    """None while an earlier try is still running."""
    with sessions.begin() as session:
        earlier = _earlier(session, key_digest, content, retry_count)
        if earlier is not None:
            return _follow(session, earlier, content, dead_seconds)
    try:
        with sessions.begin() as session:
            request = Request(key_digest=key_digest, content_digest=content)
            session.add(request)
            session.flush()
            return Opened(request.seq, request.turn)
    except IntegrityError:  # the same Idempotency-Key, a moment earlier
        return None


def _earlier(session: Session, key_digest: str | None, content: str, retry_count: int) -> Request | None:
    if key_digest is not None:
        return session.scalar(select(Request).where(Request.key_digest == key_digest).with_for_update())
    if retry_count == 0:
        return None
    recent = select(Request).where(
        Request.content_digest == content, Request.created_at > db_now() - RETRY_WINDOW_SECONDS
    )
    return session.scalar(recent.order_by(Request.seq.desc()).limit(1).with_for_update())


def _follow(session: Session, earlier: Request, content: str, dead_seconds: float) -> Opened | None:
    if earlier.content_digest != content:
        raise RequestMismatch(
            "This Idempotency-Key was used before with another request; use a new key for a new request.",
            param="Idempotency-Key",
        )
    if earlier.object_id is not None:
        return Opened(earlier.seq, earlier.turn, earlier.object_id)
    taken = session.execute(
        update(Request)
        .where(Request.seq == earlier.seq, Request.turn_at < db_now() - dead_seconds)
        .values(turn=Request.turn + 1, turn_at=db_now())
        .returning(Request.turn)
        .execution_options(synchronize_session=False)
    ).scalar()
    return None if taken is None else Opened(earlier.seq, taken)


def close_request(session: Session, opened: Opened, object_id: str) -> None:
    """Records the object that the request created. Call it in the transaction that creates it.

    Raises RequestPending if a retry has taken over; the transaction must then be rolled back.
    """
    closed = session.execute(
        update(Request)
        .where(Request.seq == opened.seq, Request.turn == opened.turn, Request.object_id.is_(None))
        .values(object_id=object_id)
        .returning(Request.seq)
        .execution_options(synchronize_session=False)
    ).scalar()
    if closed is None:
        raise RequestPending("A retry of this request has taken over; use its answer.")


def drop_request(sessions: Sessions, opened: Opened) -> None:
    """Forgets a refused request, so that a corrected one can follow."""
    with sessions.begin() as session:
        session.execute(
            delete(Request).where(
                Request.seq == opened.seq, Request.turn == opened.turn, Request.object_id.is_(None)
            )
        )


def forget_old_requests(session: Session) -> None:
    session.execute(delete(Request).where(Request.created_at < db_now() - KEEP_SECONDS))
