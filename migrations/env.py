"""Runs the migrations, from the command line or from `store.session.migrate`."""

import logging.config

from alembic import context
from sqlalchemy import Connection

from store.models import Row
from store.session import make_engine, migration_lock
from store.settings import get_settings


def upgrade(connection: Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Row.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        transactional_ddl=True,
    )
    with context.begin_transaction():
        context.run_migrations()


def check_references(connection: Connection) -> None:
    """SQLite's foreign keys are off while tables are rebuilt; afterwards they must hold."""
    broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
    if broken:
        raise RuntimeError(f"The migration left rows that refer to nothing: {broken[:5]}")


def main() -> None:
    if context.config.config_file_name:
        logging.config.fileConfig(context.config.config_file_name, disable_existing_loggers=False)
    url = context.config.attributes.get("url") or get_settings().database_url
    # With foreign keys on, rebuilding a parent table would delete its children's rows.
    engine = make_engine(url, foreign_keys=False)
    try:
        with engine.connect() as connection, migration_lock(connection):
            upgrade(connection)
            if connection.dialect.name == "sqlite":
                check_references(connection)
    finally:
        engine.dispose()


main()
