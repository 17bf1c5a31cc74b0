"""Liveness and readiness: the two routes that need no key."""

import logging
from typing import Literal

from fastapi import APIRouter, Request
from pydantic import BaseModel
from sqlalchemy import Engine, text
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import JSONResponse

from store.queue import wake
from store.session import reader, schema_is_current

from ..deps import Services

logger = logging.getLogger("olora.api")

router = APIRouter(tags=["health"])


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """`broker` may be false: jobs then wait in the database, and none is lost."""

    ready: bool
    database: bool
    schema_current: bool
    broker: bool


@router.get("/healthz")
async def healthz() -> Health:
    """The process answers."""
    return Health()


@router.get("/readyz", responses={503: {"model": Readiness}})
def readyz(request: Request) -> JSONResponse:
    """The database can be reached and has the schema that this version needs."""
    services: Services = request.app.state.services
    database = _answers(services.engine)
    current = database and schema_is_current(services.engine)
    found = Readiness(
        ready=current, database=database, schema_current=current, broker=wake(services.queue, 0)
    )
    return JSONResponse(found.model_dump(), status_code=200 if found.ready else 503)


def _answers(engine: Engine) -> bool:
    try:
        with reader(engine).connect() as connection:
            connection.execute(text("SELECT 1"))
    except SQLAlchemyError as error:
        logger.warning("the database does not answer: %s", type(error).__name__)
        return False
    return True
