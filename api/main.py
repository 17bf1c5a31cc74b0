"""The API as an application: `uvicorn api.main:create_app --factory`.

The schema is served at /openapi.json, behind the same key as every route but /healthz and /readyz. There are
no browsable docs pages: a browser cannot send the key, and they would load scripts from elsewhere.
"""

import logging
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from threading import Event, current_thread, main_thread
from types import FrameType

import anyio.to_thread
from fastapi import FastAPI, Request
from sqlalchemy import Engine
from sqlalchemy.exc import OperationalError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from store.aliases import check_aliases
from store.dispatch import Dispatcher
from store.errors import StoreError
from store.keys import first_key
from store.queue import celery_app
from store.session import POOL_SIZE, make_engine, read_sessions, require_current_schema, sessions
from store.settings import Settings, get_settings
from store.storage import storage

from .deps import Services
from .errors import EXPECTED, MethodNotAllowed, as_api_error
from .routes import adapter_methods, comparisons, events, files, health, jobs, later, models
from .security import Gate

logger = logging.getLogger("olora.api")

ROUTES = (health, files, jobs, comparisons, events, models, adapter_methods, later)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The application. Without `settings` it reads them from the environment when it starts."""
    app = FastAPI(
        title="olora",
        summary="Fine-tuning jobs that produce adapters, in the format of OpenAI's API.",
        version="1",
        lifespan=_lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.settings = settings
    app.add_middleware(Gate)
    app.add_middleware(PlainStart)
    for kind in EXPECTED:
        app.add_exception_handler(kind, _explain)
    for module in ROUTES:
        app.include_router(module.router)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Checks the database, then runs the dispatcher while the server runs."""
    settings = app.state.settings or get_settings()
    # As many threads as connections: more would only wait for a connection.
    anyio.to_thread.current_default_thread_limiter().total_tokens = POOL_SIZE
    engine = make_engine(settings.database_url)
    try:
        services = await anyio.to_thread.run_sync(_prepare, settings, engine)
        app.state.services = services
        services.dispatcher.start()
        try:
            with _closing_on_signals(services.closing):
                yield
        finally:
            await anyio.to_thread.run_sync(services.dispatcher.stop)
    finally:
        engine.dispose()


def _prepare(settings: Settings, engine: Engine) -> Services:
    """Raises StoreError or OperationalError if the service cannot start."""
    require_current_schema(engine)
    check_aliases(settings)
    writes = sessions(engine)
    with writes.begin() as session:
        made = first_key(session, settings)
    if made is not None:
        logger.warning("The first API key was written to %s.", settings.key_file)
    stored, queue = storage(settings), celery_app(settings)
    stored.remove_part_leftovers()
    return Services(
        settings=settings,
        engine=engine,
        writes=writes,
        reads=read_sessions(engine),
        closing=Event(),
        storage=stored,
        queue=queue,
        dispatcher=Dispatcher(settings, engine, store=stored, app=queue),
    )


@contextmanager
def _closing_on_signals(closing: Event) -> Iterator[None]:
    """Sets `closing` on SIGTERM and SIGINT: the server would otherwise wait for open event streams."""
    if current_thread() is not main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def close(number: int, frame: FrameType | None) -> None:
        closing.set()
        handler = handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, frame)

    servers = [number for number, handler in handlers.items() if callable(handler)]
    for number in servers:
        signal.signal(number, close)
    try:
        yield
    finally:
        for number in servers:
            signal.signal(number, handlers[number])


async def _explain(request: Request, error: Exception) -> JSONResponse:
    if isinstance(error, HTTPException) and error.status_code == 405:
        error = MethodNotAllowed.of(_methods(request))
    answer = as_api_error(error)
    assert answer is not None
    return answer.response()


def _methods(request: Request) -> set[str]:
    """The methods that the routes at this path support."""
    found: set[str] = set()
    for module in ROUTES:
        for route in module.router.routes:
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
                found |= route.methods or set()
    return found


class PlainStart:
    """Reports in one sentence, instead of a traceback, why the service cannot start."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self.app(scope, receive, send)
            return
        held: list[Message] = []

        async def hold_failure(message: Message) -> None:
            if message["type"] == "lifespan.startup.failed":
                held.append(message)
            else:
                await send(message)

        try:
            await self.app(scope, receive, hold_failure)
        except StoreError as error:
            await send({"type": "lifespan.startup.failed", "message": error.message})
        except OperationalError:
            sentence = "The database cannot be reached. Start it, or correct OLORA_DATABASE_URL."
            await send({"type": "lifespan.startup.failed", "message": sentence})
        except BaseException:
            for message in held:
                await send(message)
            raise
