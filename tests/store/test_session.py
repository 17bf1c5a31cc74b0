"""Transactions lose nothing; the schema is what the models say."""

import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.operations import Operations
from sqlalchemy import Engine, select, text
from sqlalchemy.exc import DBAPIError

from store.errors import SchemaBehind
from store.models import Job, Project, Row
from store.session import (
    Sessions,
    make_engine,
    migrate,
    migration_lock,
    reader,
    require_current_schema,
    schema_is_current,
    sessions,
)
from tests import services

ROOT = Path(__file__).resolve().parents[2]


def test_migrations_give_exactly_the_models_schema(empty_database_url: str) -> None:
    migrate(empty_database_url)
    engine = make_engine(empty_database_url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Row.metadata) == []
    engine.dispose()


def test_jobs_of_the_first_schema_stay_and_have_nothing_of_the_later_ones(empty_database_url: str) -> None:
    migrate(empty_database_url, "0001")
    engine = make_engine(empty_database_url)
    texts = ("id", "status", "model", "training_file")
    numbers = ("seed", "created_at", "priority", "dispatches", "attempt", "failures", "step")
    columns = {**dict.fromkeys(texts, "'succeeded'"), **dict.fromkeys(numbers, "1")}
    columns |= {"project_id": "'p'", "spec": "'{}'", "options": "'{}'", "result_files": "'[]'"}
    names, values = ", ".join(columns), ", ".join(columns.values())
    with engine.begin() as connection:
        connection.execute(
            text("INSERT INTO projects (id, name, created_at, last_turn_at) VALUES ('p', 'p', 0, 0)")
        )
        connection.execute(text(f"INSERT INTO jobs ({names}) VALUES ({values})"))
    migrate(empty_database_url)
    with engine.connect() as connection:
        later = "kind, samples, integrations, at_run, findings"
        row = connection.execute(text(f"SELECT {later}, id, step FROM jobs")).one()
    assert tuple(row) == ("fine_tuning", None, None, None, None, "succeeded", 1)
    engine.dispose()


def test_a_schema_that_is_behind_is_refused_with_the_remedy(empty_database_url: str) -> None:
    engine = make_engine(empty_database_url)
    assert not schema_is_current(engine)
    with pytest.raises(SchemaBehind, match=r"`olora migrate`.*`olora serve`"):
        require_current_schema(engine)
    migrate(empty_database_url)
    require_current_schema(engine)
    engine.dispose()


def test_of_two_migrations_at_once_one_waits(empty_database_url: str) -> None:
    engine = make_engine(empty_database_url)
    with engine.connect() as connection, migration_lock(connection):
        second = threading.Thread(target=migrate, args=(empty_database_url,))
        second.start()
        second.join(0.7)
        assert second.is_alive()
        assert not schema_is_current(engine)
    second.join(30)
    assert schema_is_current(engine)
    engine.dispose()


def test_the_command_line_migrates_the_database_of_the_settings(
    empty_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OLORA_DATABASE_URL", empty_database_url)
    command = [sys.executable, "-m", "alembic", "upgrade", "head"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=60)
    engine = make_engine(empty_database_url)
    assert schema_is_current(engine)
    engine.dispose()


def test_a_migration_that_fails_leaves_no_table_behind(empty_database_url: str) -> None:
    engine = make_engine(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE models (id integer)"))  # the last table to be made
    with pytest.raises(DBAPIError):
        migrate(empty_database_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE models"))
    migrate(empty_database_url)
    assert schema_is_current(engine)
    engine.dispose()


def test_a_write_in_a_reading_transaction_is_an_error(engine: Engine) -> None:
    with reader(engine).connect() as connection, pytest.raises(DBAPIError):
        connection.execute(text("INSERT INTO projects (id, name) VALUES ('p', 'p')"))
    with engine.begin() as connection:  # the same pool still writes
        connection.execute(
            text("INSERT INTO projects (id, name, created_at, last_turn_at) VALUES ('p', 'p', 0, 0)")
        )


def test_a_database_file_is_its_owners_alone(tmp_path: Path) -> None:
    path = tmp_path / "new" / "home" / "olora.db"
    migrate(f"sqlite:///{path}")
    engine = make_engine(f"sqlite:///{path}")
    with engine.connect() as connection:
        connection.execute(text("CREATE TABLE t (id integer)"))
        connection.commit()
        made = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.parent.iterdir()}
    engine.dispose()
    assert {"olora.db", "olora.db-wal", "olora.db-shm"} <= set(made)
    assert set(made.values()) == {0o600}
    for folder in (path.parent, path.parent.parent):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_the_mode_of_a_database_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "olora.db"
    path.touch()
    path.chmod(0o640)
    tmp_path.chmod(0o750)
    migrate(f"sqlite:///{path}")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o750


def test_readers_do_not_wait_for_a_writer(engine: Engine, read_sessions: Sessions) -> None:
    with engine.begin() as writer:
        writer.execute(
            text("INSERT INTO projects (id, name, created_at, last_turn_at) VALUES ('p', 'p', 0, 0)")
        )
        with read_sessions() as session:
            assert session.scalars(select(Project)).all() == []


def test_references_must_hold(sessions: Sessions) -> None:
    job = Job(id="j", project_id="nobody", status="queued", model="m", training_file="f", seed=0, spec={})
    with pytest.raises(DBAPIError, match=r"(?i)foreign key"), sessions.begin() as session:
        session.add(job)


def test_a_status_that_does_not_exist_is_refused(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.add(Project(id="p", name="p"))
    job = Job(id="j", project_id="p", status="runing", model="m", training_file="f", seed=0, spec={})
    with pytest.raises(DBAPIError, match="ck_jobs_status"), sessions.begin() as session:
        session.add(job)


def test_a_kind_of_job_that_does_not_exist_is_refused(sessions: Sessions) -> None:
    with sessions.begin() as session:
        session.add(Project(id="p", name="p"))
    values = {"status": "queued", "model": "m", "training_file": "f", "seed": 0, "spec": {}}
    with pytest.raises(DBAPIError, match="ck_jobs_kind"), sessions.begin() as session:
        session.add(Job(id="j", project_id="p", kind="merging", **values))


def _add_one(url: str, times: int) -> None:
    """Reads, then writes: the careless way that loses updates unless the transaction holds a lock."""
    engine = make_engine(url)
    made = sessions(engine)
    for _ in range(times):
        with made.begin() as session:
            project = session.get_one(Project, "p")
            project.name = str(int(project.name) + 1)
    engine.dispose()


def test_no_update_is_lost_between_processes_and_threads_on_sqlite(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with sessions(engine).begin() as session:
        session.add(Project(id="p", name="0"))
    context = services.process_context()
    workers = [context.Process(target=_add_one, args=(sqlite_url, 60)) for _ in range(2)]
    workers += [threading.Thread(target=_add_one, args=(sqlite_url, 60)) for _ in range(3)]  # type: ignore[misc]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    with sessions(engine).begin() as session:
        assert session.get_one(Project, "p").name == "300"
    engine.dispose()


def test_sqlite_keeps_what_it_has_confirmed(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
        assert connection.exec_driver_sql("PRAGMA busy_timeout").scalar() == 30_000
    engine.dispose()


def test_rebuilding_a_table_keeps_the_rows_that_refer_to_it(sqlite_url: str) -> None:
    """SQLite changes a table by rebuilding it; with foreign keys on, its children would be deleted."""
    engine = make_engine(sqlite_url, foreign_keys=False)
    made = sessions(engine)
    with made.begin() as session:
        session.add(Project(id="p", name="p"))
        session.flush()
        session.add(
            Job(id="j", project_id="p", status="queued", model="m", training_file="f", seed=0, spec={})
        )
    with engine.begin() as connection:
        operations = Operations(MigrationContext.configure(connection))
        with operations.batch_alter_table("projects", recreate="always") as table:
            table.alter_column("name", nullable=True)
    with made.begin() as session:
        assert session.scalars(select(Job.id)).all() == ["j"]
    engine.dispose()
