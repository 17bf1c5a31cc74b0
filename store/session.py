"""The database: engine, sessions, the database's own clock, its schema."""

import contextlib
import fcntl
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, Float, create_engine, event, make_url, text
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import Session, sessionmaker
from sqlalchemy.sql.functions import FunctionElement

from .errors import SchemaBehind
from .home import make_folder, private

BUSY_SECONDS = 30
FROZEN_SECONDS = 30
POOL_SIZE = 16
MIGRATION_LOCK = 0x6F6C6F7261
"""PostgreSQL's advisory lock that a migration holds."""

Sessions = sessionmaker[Session]
DATABASE_AWAY = (OperationalError, InterfaceError, InternalError)
"""What a driver raises when the database cannot be reached or has dropped the connection."""


class db_now(FunctionElement[float]):
    """Unix seconds by the database's clock, the only clock used for leases."""

    type = Float(53)
    inherit_cache = True


@compiles(db_now, "sqlite")
def _sqlite_now(element: db_now, compiler: object, **kw: object) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(db_now, "postgresql")
def _postgresql_now(element: db_now, compiler: object, **kw: object) -> str:
    return "extract(epoch from clock_timestamp())::double precision"


def make_engine(url: str, *, foreign_keys: bool = True) -> Engine:
    """An engine whose transactions cannot lose an update.

    SQLite: a transaction begins with BEGIN IMMEDIATE, so that what it read is still true when it writes;
    one marked `read_only` begins with BEGIN and cannot write. `foreign_keys=False` is for migrations.
    """
    if make_url(url).get_backend_name() == "sqlite":
        return _sqlite_engine(url, foreign_keys)
    return create_engine(
        url,
        pool_size=POOL_SIZE,
        max_overflow=0,
        pool_pre_ping=True,
        connect_args={
            "connect_timeout": 5,
            "keepalives_idle": 15,
            "tcp_user_timeout": 30_000,
            # A process that freezes or is cut off in the middle of a transaction loses its locks.
            "options": f"-c idle_in_transaction_session_timeout={1000 * FROZEN_SECONDS}",
        },
    )


def _sqlite_engine(url: str, foreign_keys: bool) -> Engine:
    database = make_url(url).database
    if database:
        make_folder(Path(database).parent)
        # SQLite gives its journals the mode of this file, and itself reports a file that cannot be created.
        with contextlib.suppress(OSError), open(database, "xb", opener=private):
            pass
    engine = create_engine(url, pool_size=POOL_SIZE, max_overflow=0, connect_args={"timeout": BUSY_SECONDS})

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, record: object) -> None:
        connection.isolation_level = None  # the driver begins nothing by itself
        for pragma in (
            f"busy_timeout = {BUSY_SECONDS * 1000}",
            "journal_mode = WAL",
            "synchronous = FULL",
            f"foreign_keys = {'ON' if foreign_keys else 'OFF'}",
        ):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begins(connection: Connection) -> None:
        reads = bool(connection.get_execution_options().get("read_only"))
        connection.exec_driver_sql(f"PRAGMA query_only = {'ON' if reads else 'OFF'}")
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def sessions(engine: Engine) -> Sessions:
    """Sessions that may write. `with made.begin() as session:` is one transaction."""
    return sessionmaker(engine, expire_on_commit=False)


def settle(session: Session, row: object) -> None:
    """Flushes and refreshes a row, so that it can be used after its session has ended."""
    session.flush()
    session.refresh(row)


def read_sessions(engine: Engine) -> Sessions:
    """Read-only sessions, which wait for no lock; a write in one is an error."""
    return sessionmaker(reader(engine), expire_on_commit=False)


def reader(engine: Engine) -> Engine:
    """The same engine and pool, with read-only transactions."""
    return engine.execution_options(read_only=True, postgresql_readonly=True)


def _alembic_config(url: str) -> Any:
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(files("migrations")).replace("%", "%%"))
    config.attributes["url"] = url
    return config


def migrate(url: str, revision: str = "head") -> None:
    """Upgrades the schema to a revision. Concurrent migrations wait for each other (`migration_lock`)."""
    from alembic import command

    command.upgrade(_alembic_config(url), revision)


@contextlib.contextmanager
def migration_lock(connection: Connection) -> Iterator[None]:
    """Held while the schema changes: an advisory lock in PostgreSQL, or a locked file next to SQLite's."""
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_lock(:lock)"), {"lock": MIGRATION_LOCK})
        connection.commit()
        try:
            yield
        finally:
            connection.rollback()
            connection.execute(text("SELECT pg_advisory_unlock(:lock)"), {"lock": MIGRATION_LOCK})
            connection.commit()
        return
    with open(f"{connection.engine.url.database}.migrating", "w", opener=private) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def schema_is_current(engine: Engine) -> bool:
    """Whether the database has the newest revision of the schema."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    newest = ScriptDirectory.from_config(_alembic_config(str(engine.url))).get_current_head()
    with reader(engine).connect() as connection:
        return MigrationContext.configure(connection).get_current_revision() == newest


def require_current_schema(engine: Engine) -> None:
    """Raises SchemaBehind, with the remedy, unless the schema is the newest."""
    if not schema_is_current(engine):
        raise SchemaBehind(
            "The database's schema is not the one that this version needs. "
            "Run `olora migrate`, or start the service with `olora serve`, which migrates it."
        )
