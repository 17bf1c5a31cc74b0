"""What routes depend on: the caller, and the JSON body, checked for text that rows cannot hold."""

import hashlib
import json
import sys
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Event
from typing import Annotated, Any

from celery import Celery
from fastapi import Depends, Header, Query, Request
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from store.dispatch import Dispatcher
from store.session import Sessions
from store.settings import Settings
from store.storage import Storage

from .errors import BadRequest

MAX_DEPTH = 32
"""How deep a JSON body may nest."""


@dataclass(frozen=True)
class Services:
    """The shared objects of a running API, created when it starts."""

    settings: Settings
    engine: Engine
    writes: Sessions
    reads: Sessions
    storage: Storage
    queue: Celery
    dispatcher: Dispatcher
    closing: Event
    """Set when the server is shutting down; long waits then end."""


@dataclass(frozen=True)
class Call:
    """One request: its project and key, its retry headers, and the services that answer it."""

    project_id: str
    key_id: str
    retry_count: int
    idempotency_key: str | None
    services: Services

    @property
    def settings(self) -> Settings:
        return self.services.settings

    @property
    def storage(self) -> Storage:
        return self.services.storage

    def reading(self) -> AbstractContextManager[Session]:
        """A read-only session, which waits for no lock."""
        return self.services.reads.begin()

    def writing(self) -> AbstractContextManager[Session]:
        """One transaction, committed at the end of its block."""
        return self.services.writes.begin()

    def nudge(self) -> None:
        """Wakes the dispatcher after a commit that created work."""
        self.services.dispatcher.nudge()


async def read_call(
    request: Request,
    x_stainless_retry_count: Annotated[str, Header(include_in_schema=False)] = "0",
    idempotency_key: Annotated[str | None, Header(max_length=255)] = None,
) -> Call:
    """The request's `Call`; the gate has already checked the key."""
    retries = x_stainless_retry_count
    return Call(
        project_id=request.state.project_id,
        key_id=request.state.key_id,
        retry_count=int(retries) if retries.isdecimal() and len(retries) < 4 else 0,
        idempotency_key=idempotency_key,
        services=request.app.state.services,
    )


@dataclass(frozen=True)
class Body:
    """A JSON object as it was sent, and the digest of its bytes."""

    values: dict[str, Any]
    digest: str


async def read_body(request: Request) -> Body:
    """Reads the body as one JSON object, whatever its content type. Raises BadRequest."""
    return _read(await request.body())


async def read_optional_body(request: Request) -> Body:
    """As `read_body`; nothing at all is an empty object."""
    return _read(await request.body() or b"{}")


def _read(raw: bytes) -> Body:
    try:
        values = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError:
        raise BadRequest("The body is not UTF-8; send a JSON object in UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"The body is not JSON: {_where(error)}. Send a JSON object.") from None
    if not isinstance(values, dict):
        raise BadRequest(f"The body must be a JSON object, not {_kind(values)}.")
    check_text(values)
    return Body(values, hashlib.sha256(raw).hexdigest())


def _where(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (line {error.lineno}, column {error.colno})"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return f"it contains a number with more than {sys.get_int_max_str_digits()} digits"


def _refuse_constant(name: str) -> Any:
    raise BadRequest(f"The body contains {name}, which is not JSON; send a finite number.")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null")


def check_text(value: Any, place: str = "", depth: int = 0) -> None:
    """Refuses text that no database column can hold: NUL characters and lone surrogates."""
    if depth > MAX_DEPTH:
        raise BadRequest(
            f"{place[:80]} is nested more than {MAX_DEPTH} levels deep.", param=place[:80] or None
        )
    if isinstance(value, str) and ("\x00" in value or any("\ud800" <= char <= "\udfff" for char in value)):
        raise BadRequest(
            f"{place or 'A name'} contains a NUL or an invalid character; remove it.", param=place or None
        )
    if isinstance(value, dict):
        for name, item in value.items():
            check_text(name, place, depth + 1)
            check_text(item, f"{place}.{name}" if place else name, depth + 1)
    if isinstance(value, list):
        for index, item in enumerate(value):
            check_text(item, f"{place}[{index}]", depth + 1)


CallDep = Annotated[Call, Depends(read_call)]
BodyDep = Annotated[Body, Depends(read_body)]
OptionalBodyDep = Annotated[Body, Depends(read_optional_body)]
After = Annotated[str | None, Query(max_length=64, description="Id of the last item of the previous page.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="Items per page.")]
