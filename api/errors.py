"""The API's errors, always sent as `{"error": {message, type, param, code}}`.

ApiError               a request that cannot be served, in words its sender can act on
├── BadRequest         400  something in it is invalid
├── BadKey             401  the key is missing or unknown
├── Forbidden          403  not allowed for this object
├── NotFound           404  no such thing in this project
├── MethodNotAllowed   405  the path exists, the method does not
├── Pending            409  the first try of this request is still being answered; try again
├── TooLarge           413  the body is larger than the limit
├── ServerError        500  an error that the sender cannot fix
├── Unavailable        503  the database cannot be reached; try again
│   └── Exporting      503  a worker is making the file; try again
└── NoSpace            507  the storage is full

`as_api_error` maps the expected errors of the core and the store to these.
"""

from collections.abc import Callable, Iterable
from typing import Any

from fastapi.exceptions import RequestValidationError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from olora_core.errors import OloraError
from olora_core.specs.validation import refusal
from store import errors as store_errors
from store.session import DATABASE_AWAY

KEY_REMEDY = (
    "The API key is missing or unknown. Send it as 'Authorization: Bearer <key>'; "
    "the service wrote its first key to the file 'api_key' in OLORA_HOME."
)


class ApiError(Exception):
    """A request that cannot be served: `message` for people, `code` for programs, `param` for the place."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None
    headers: dict[str, str] = {}  # noqa: RUF012

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        details: list[dict[str, Any]] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code or type(self).code
        self.details = details

    def body(self) -> dict[str, Any]:
        error: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        if self.details is not None:
            error["details"] = self.details
        return {"error": error}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), status_code=self.status, headers=dict(self.headers))


class BadRequest(ApiError):
    """Something in the request is invalid."""


class BadKey(ApiError):
    """The key is missing or unknown; both get the same answer."""

    status = 401
    code = "invalid_api_key"
    headers = {"www-authenticate": "Bearer"}  # noqa: RUF012


class Forbidden(ApiError):
    """Not allowed for this object."""

    status = 403
    code = "permission_denied"


class NotFound(ApiError):
    """No such thing in this project."""

    status = 404
    code = "not_found"


class MethodNotAllowed(ApiError):
    """The path exists, the method does not."""

    status = 405
    code = "method_not_allowed"

    @classmethod
    def of(cls, methods: Iterable[str]) -> "MethodNotAllowed":
        allowed = ", ".join(sorted(methods))
        refusal = cls(f"This route does not support that method; it supports {allowed}.")
        refusal.headers = {"allow": allowed}
        return refusal


class Pending(ApiError):
    """The first try of this request is still being answered; try again."""

    status = 409
    code = "request_pending"
    headers = {"retry-after": "2", "x-should-retry": "true"}  # noqa: RUF012


class TooLarge(ApiError):
    """The body is larger than the limit."""

    status = 413
    code = "request_too_large"


class ServerError(ApiError):
    """An error that the sender cannot fix."""

    status = 500
    type = "server_error"
    code = "internal_error"


class Unavailable(ApiError):
    """The database cannot be reached; try again."""

    status = 503
    type = "server_error"
    code = "unavailable"
    headers = {"retry-after": "2"}  # noqa: RUF012


class Exporting(Unavailable):
    """A worker is making the file; ask again."""

    code = "exporting"
    headers = {"retry-after": "3"}  # noqa: RUF012


class NoSpace(ApiError):
    """The storage is full; an immediate retry does not help."""

    status = 507
    type = "server_error"
    code = "storage_full"
    headers = {"x-should-retry": "false"}  # noqa: RUF012


ANSWERS: dict[type[OloraError], type[ApiError]] = {
    store_errors.NotFound: NotFound,
    store_errors.RequestPending: Pending,
    store_errors.StorageFull: NoSpace,
    store_errors.TooLarge: TooLarge,
    store_errors.StorageError: ServerError,
}
"""How an error of the store is answered, the first that fits; any other, and the core's, is a bad request."""

BY_STATUS: dict[int, type[ApiError]] = {
    kind.status: kind
    for kind in (
        BadRequest,
        BadKey,
        Forbidden,
        NotFound,
        MethodNotAllowed,
        TooLarge,
        ServerError,
        Unavailable,
    )
}


def as_api_error(error: Exception) -> ApiError | None:
    """The answer to an expected error; None for any other."""
    answer = next((EXPECTED[known] for known in EXPECTED if isinstance(error, known)), None)
    return None if answer is None else answer(error)


def _itself(error: ApiError) -> ApiError:
    return error


def _from_olora(error: OloraError) -> ApiError:
    kind = next((ANSWERS[known] for known in ANSWERS if isinstance(error, known)), BadRequest)
    return kind(error.message, param=error.param, code=error.code)


def _unavailable(error: Exception) -> Unavailable:
    return Unavailable("The database cannot be reached at the moment. Try again in a few seconds.")


def _from_validation(error: RequestValidationError) -> BadRequest:
    """FastAPI's error about a query, path or header value, as one sentence that names it."""
    problem = error.errors()[0]
    param = ".".join(str(part) for part in problem["loc"][1:])
    return BadRequest(refusal(param, problem), param=param)


def _from_http(error: HTTPException) -> ApiError:
    """An error of the framework itself, such as an unknown route."""
    if error.status_code == 404:
        return NotFound(
            "There is no such route. The API is under /v1; see /openapi.json.", code="unknown_url"
        )
    kind = BY_STATUS.get(error.status_code, BadRequest if error.status_code < 500 else ServerError)
    return kind(str(error.detail))


EXPECTED: dict[type[Exception], Callable[[Any], ApiError]] = {
    ApiError: _itself,
    OloraError: _from_olora,
    RequestValidationError: _from_validation,
    HTTPException: _from_http,
    **dict.fromkeys((*DATABASE_AWAY, PoolTimeout), _unavailable),
}
"""How each expected error is answered. Anything else is logged and answered with a 500 by the gate."""
