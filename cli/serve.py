"""`olora serve`, `olora worker` and `olora migrate`: the service, or a part of it."""

import ipaddress
import logging
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from olora_core.errors import OloraError

from .client import reachable

if TYPE_CHECKING:
    from store.settings import Settings

console = Console(stderr=True, soft_wrap=True, highlight=False)
STREAM_GRACE_SECONDS = 5
"""How long a stopping server waits for open event streams."""


class ServeError(OloraError):
    """The service cannot start."""

    code = "cannot_serve"


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (default: OLORA_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one (default: OLORA_PORT).")] = None,
    with_worker: Annotated[
        bool, typer.Option("--worker/--no-worker", help="Also start workers: one per GPU, or one on the CPU.")
    ] = True,
) -> None:
    """Start the API and its workers. Ctrl-C checkpoints running jobs, then stops both."""
    import uvicorn

    from api.main import create_app
    from store.settings import read_settings

    if with_worker:
        from worker.launch import follow_parent

        follow_parent()
    settings = _settings(host, port)
    _log(settings)
    listener = _listen(settings.host, settings.port)
    settings = read_settings(host=settings.host, port=listener.getsockname()[1])
    _prepare(settings)
    if not _is_loopback(settings.host):
        _print(f"Listening on {settings.host} without TLS; put a TLS-terminating proxy in front.")
    server = uvicorn.Server(
        uvicorn.Config(
            create_app(settings),
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=STREAM_GRACE_SECONDS,
        )
    )
    with _signals() as received:
        stopped = threading.Event()
        workers = _start_workers(settings, stopped, received) if with_worker else None
        greeting = threading.Thread(target=_greet_when_up, args=(server, settings, stopped), daemon=True)
        greeting.start()
        try:
            server.run(sockets=[listener])
        finally:
            stopped.set()
            if workers:
                _print("Stopping. Running jobs are checkpointed and resume when a worker starts.")
                _join(workers)
    if not server.started:
        raise ServeError("The API did not start; see the log lines above.")


def worker() -> None:
    """Start workers: one per GPU, or one on the CPU. Ctrl-C checkpoints running jobs, then stops them."""
    from sqlalchemy.exc import SQLAlchemyError

    from store.session import make_engine, require_current_schema

    from .workers import Workers

    settings = _settings(None, None)
    engine = make_engine(settings.database_url)
    try:
        require_current_schema(engine)
    except SQLAlchemyError as error:
        raise _database_trouble(error) from None
    finally:
        engine.dispose()
    with _signals() as received:
        workers = Workers(settings, _print)
        _print(f"Workers: {', '.join(worker.name for worker in workers.workers)}. Ctrl-C stops them.")
        workers.run(lambda: bool(received), lambda: len(received) > 1)


def migrate() -> None:
    """Upgrade the database schema, then exit."""
    _prepare(_settings(None, None))
    _print("The database is up to date.")


def _settings(host: str | None, port: int | None) -> "Settings":
    from store.settings import get_settings, read_settings

    given: dict[str, Any] = {"host": host, "port": port}
    get_settings()  # refuses unknown variables
    return read_settings(**{name: value for name, value in given.items() if value is not None})


def _log(settings: "Settings") -> None:
    """Warnings and errors go to standard error."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("olora").setLevel(settings.log_level.upper())


def _listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises ServeError if the address is not available."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except OSError as error:
        listener.close()
        raise ServeError(
            f"Cannot listen on {host}, port {port}: {error.strerror or error}. Choose another with --port "
            "(0 takes a free one) or --host."
        ) from None
    return listener


def _prepare(settings: "Settings") -> None:
    """Creates the home folder and upgrades the schema. Raises StoreError or ServeError."""
    from sqlalchemy.exc import SQLAlchemyError

    from store.home import make_folder
    from store.session import migrate

    try:
        make_folder(settings.home)
    except OSError as error:
        raise ServeError(f"OLORA_HOME: cannot create {settings.home}: {error.strerror}.") from None
    try:
        migrate(settings.database_url)
    except SQLAlchemyError as error:
        raise _database_trouble(error) from None


def _database_trouble(error: Exception) -> ServeError:
    lines = str(getattr(error, "orig", None) or error).strip().splitlines()
    reason = lines[0] if lines else type(error).__name__
    return ServeError(f"The database does not answer ({reason}). Start it, or check OLORA_DATABASE_URL.")


def _start_workers(settings: "Settings", stopped: threading.Event, received: list[int]) -> threading.Thread:
    """The thread that runs the workers, and stops them when it ends."""
    from .workers import Workers

    workers = Workers(settings, _print, log=settings.home / "logs" / "worker.log")
    thread = threading.Thread(
        target=workers.run,
        args=(lambda: stopped.is_set() or bool(received), lambda: len(received) > 1),
        name="workers",
    )
    thread.start()
    return thread


def _join(thread: threading.Thread) -> None:
    while thread.is_alive():
        thread.join(0.2)  # a join without timeout would hold back a second Ctrl-C


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM instead of letting them end the process."""
    received: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _greet_when_up(server: Any, settings: "Settings", stopped: threading.Event) -> None:
    while not server.started:
        if stopped.wait(0.05):
            return
    _greet(settings)


def _greet(settings: "Settings") -> None:
    """Prints the URL, the key, and three examples to paste."""
    url = f"http://{reachable(settings.host)}:{settings.port}/v1"
    _print(f"OLoRA serves at {url}")
    if settings.api_key:
        key = "$OLORA_API_KEY"
        _print("API key: the value of OLORA_API_KEY")
    elif settings.key_file.exists():
        key = settings.key_file.read_text(encoding="utf-8").strip()
        _print(f"API key: {key}   (kept in {settings.key_file})")
    else:
        key = "sk-olora-…"
        _print(f"API key: an existing one ({settings.key_file} does not exist)")
    _print(f"Home: {settings.home}   Ctrl-C stops everything.\n\nTo paste:")
    _print(f'  client = openai.OpenAI(base_url="{url}", api_key="{key}")')
    _print(f'  curl {url}/models -H "Authorization: Bearer {key}"')
    home, command = shlex.quote(str(settings.home)), shlex.quote(_command())
    _print(f"  OLORA_HOME={home} {command} jobs list --base-url {url}\n")


def _command() -> str:
    """`olora` as it was called here; it may not be on the PATH."""
    return sys.argv[0] if sys.argv[0].endswith("olora") else "olora"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _print(message: str) -> None:
    console.print(message, markup=False)
