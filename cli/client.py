"""The client commands' connection to the service: its URL, the key, and errors as sentences."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer

from olora_core.errors import OloraError

BaseUrl = Annotated[
    str | None,
    typer.Option(
        "--base-url",
        envvar="OLORA_BASE_URL",
        help="URL of the service (default: http://OLORA_HOST:OLORA_PORT/v1).",
        show_default=False,
    ),
]
UPLOAD_TIMEOUT = 600.0


class ServiceError(OloraError):
    """The service returned an error, or did not answer."""

    code = "service_error"


@contextmanager
def connect(base_url: str | None) -> Iterator[httpx.Client]:
    """A client with the key in OLORA_API_KEY, or in the key file in OLORA_HOME.

    Raises ServiceError if there is no key, or if the service cannot be reached.
    """
    from store.settings import get_settings

    settings = get_settings()
    url = (base_url or f"http://{reachable(settings.host)}:{settings.port}/v1").rstrip("/")
    key = settings.api_key.get_secret_value() if settings.api_key else _kept_key(settings.key_file)
    timeout = httpx.Timeout(UPLOAD_TIMEOUT, connect=5)
    headers = {"Authorization": f"Bearer {key}"}
    try:
        client = httpx.Client(base_url=url, headers=headers, timeout=timeout, follow_redirects=True)
    except httpx.InvalidURL as error:
        raise ServiceError(f"{url} is not a valid URL ({error}); check --base-url.") from None
    with client:
        try:
            yield client
        except httpx.TransportError as error:
            raise ServiceError(
                f"Cannot reach the service at {url} ({error}). Start it with `olora serve`, or set "
                "--base-url or OLORA_BASE_URL."
            ) from None


def reachable(host: str) -> str:
    """The address at which a client reaches a service that listens on `host`."""
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def _kept_key(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        raise ServiceError(
            f"No API key: set OLORA_API_KEY, or set OLORA_HOME to the home of the service ({path} cannot be "
            "read)."
        ) from None


def send(client: httpx.Client, method: str, path: str, **options: Any) -> Any:
    """The JSON response to one request. Raises ServiceError with the service's message."""
    response = client.request(method, path, **options)
    raise_for(response)
    try:
        return response.json()
    except ValueError:
        raise _not_this_service(response) from None


def raise_for(response: httpx.Response) -> None:
    if response.is_success:
        return
    response.read()
    try:
        error = response.json()["error"]
        message, code, param = error["message"], error.get("code"), error.get("param")
    except (ValueError, KeyError, TypeError):
        raise _not_this_service(response) from None
    raise ServiceError(message, code=code, param=param)


def _not_this_service(response: httpx.Response) -> ServiceError:
    return ServiceError(
        f"{response.request.url} returned {response.status_code} {response.reason_phrase}, which is not a "
        "response of this service; check --base-url."
    )
