"""The gate in front of every route: request id, host, key, body size, and unexpected errors.

It is plain ASGI, so that a caller without a key is answered before any of the body is read.
"""

import logging
import re
import secrets
from fnmatch import fnmatchcase

from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from store.keys import find_key
from store.session import Sessions
from store.settings import Settings

from .encodings import unpacked
from .errors import KEY_REMEDY, ApiError, BadKey, BadRequest, ServerError, TooLarge, as_api_error

logger = logging.getLogger("olora.api")

OPEN_PATHS = frozenset({"/healthz", "/readyz"})
JSON_BODY_BYTES = 1_000_000
FORM_OVERHEAD_BYTES = 1_000_000
"""What a multipart body may contain besides its file: boundaries and small fields."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Gate:
    """Admits requests with a known host, a known key and a body within the limit; answers all errors."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["type"] != "http":
            await self.app(scope, receive, send)
        else:
            await self._answer(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = f"req_{secrets.token_hex(16)}"
        scope.setdefault("state", {})["request_id"] = request_id
        started = False

        async def send_marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(raw=message["headers"])
                headers["x-request-id"] = request_id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await _admit(scope)
            await self.app(scope, _counted(scope, unpacked(scope, receive)), send_marked)
        except ClientDisconnect:
            logger.info("%s %s %s: the client went away", request_id, scope["method"], scope["path"])
        except Exception as error:
            if started:
                raise
            await _explain(error, request_id, scope).response()(scope, receive, send_marked)


async def _admit(scope: Scope) -> None:
    """Raises ApiError unless the request has a known host, a known key and a body within the limit."""
    if "\x00" in scope["path"] or b"%00" in scope["query_string"]:
        raise BadRequest("The URL contains a NUL character; remove it.")
    headers, settings = Headers(scope=scope), scope["app"].state.services.settings
    if settings.allowed_hosts and not _is_known_host(headers.get("host", ""), settings.allowed_hosts):
        raise BadRequest("This service does not accept that host name.", code="unknown_host")
    if scope["path"] not in OPEN_PATHS:
        scope["state"]["project_id"], scope["state"]["key_id"] = await _owner(scope, headers)
    length, limit = headers.get("content-length", ""), _body_limit(scope)
    if length.isdecimal() and int(length) > limit:
        raise _too_large(limit)


def _is_known_host(host: str, patterns: tuple[str, ...]) -> bool:
    name = re.sub(r":\d*$", "", host).lower()
    return any(fnmatchcase(name, pattern.lower()) for pattern in patterns)


async def _owner(scope: Scope, headers: Headers) -> tuple[str, str]:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise BadKey(KEY_REMEDY)
    return await run_in_threadpool(_find_owner, scope["app"].state.services.reads, token.strip())


def _find_owner(reads: Sessions, token: str) -> tuple[str, str]:
    with reads() as session:
        key = find_key(session, token)
        if key is None:
            raise BadKey(KEY_REMEDY)
        return key.project_id, key.id


def _body_limit(scope: Scope) -> int:
    if scope["method"] == "POST" and scope["path"] == "/v1/files":
        settings: Settings = scope["app"].state.services.settings
        return settings.max_upload_bytes + FORM_OVERHEAD_BYTES
    return JSON_BODY_BYTES


def _counted(scope: Scope, receive: Receive) -> Receive:
    """The same stream; raises TooLarge where it exceeds the limit, unpacked."""
    limit, total = _body_limit(scope), 0

    async def receive_counted() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise _too_large(limit)
        return message

    return receive_counted


def _too_large(limit: int) -> TooLarge:
    if limit == JSON_BODY_BYTES:
        return TooLarge(f"The request's body is larger than {limit} bytes, the limit of this route.")
    return large_file(limit - FORM_OVERHEAD_BYTES)


def large_file(max_bytes: int) -> TooLarge:
    """The error that names the limit and its setting."""
    return TooLarge(
        f"The file is larger than {max_bytes >> 20} MB, the limit of this service (OLORA_MAX_UPLOAD_MB). "
        "Split it, or ask the operator to raise the limit.",
        param="file",
        code="file_too_large",
    )


def _explain(error: Exception, request_id: str, scope: Scope) -> ApiError:
    """The answer to an error; an unexpected one is logged with its traceback."""
    expected = as_api_error(error)
    if expected is not None:
        return expected
    logger.error("%s %s %s failed", request_id, scope["method"], scope["path"], exc_info=error)
    return ServerError(f"Internal error. The service's log has the details under {request_id}.")
