"""Startup: what the API loads, creates and cleans up, and how it refuses to start."""

import subprocess
import sys
import time
from pathlib import Path

import psycopg
from sqlalchemy import make_url, text
from starlette.testclient import TestClient

from api.main import create_app
from store.session import make_engine
from store.settings import read_settings

from .serving import KEY, ROOT, environment, service

SERVE = [sys.executable, "-m", "uvicorn", "api.main:create_app", "--factory", "--port", "0"]


def test_starting_the_api_leaves_torch_unloaded(home: Path, sqlite_url: str) -> None:
    script = """
import sys
from starlette.testclient import TestClient
from api.main import create_app
with TestClient(create_app()) as client:
    assert client.get("/readyz").status_code == 200
heavy = {"torch", "transformers", "accelerate", "safetensors", "numpy", "worker"} & set(sys.modules)
assert not heavy, heavy
"""
    environ = environment(home, database_url=sqlite_url)
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def refused_start(environ: dict[str, str]) -> str:
    done = subprocess.run(SERVE, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "Uvicorn running" not in done.stderr
    return done.stderr


def test_a_database_that_was_never_migrated_stops_the_start_with_the_remedy(home: Path) -> None:
    home.mkdir()
    said = refused_start(environment(home))
    assert "olora serve" in said
    assert "`olora migrate`" in said


def test_a_database_of_an_older_version_stops_the_start(home: Path, sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    engine.dispose()
    assert "`olora migrate`" in refused_start(environment(home, database_url=sqlite_url))


def test_a_database_that_is_away_stops_the_start(home: Path, free_port: int) -> None:
    home.mkdir()
    url = f"postgresql://olora:secret@127.0.0.1:{free_port}/olora"
    said = refused_start(environment(home, database_url=url))
    assert "OLORA_DATABASE_URL" in said
    assert "secret" not in said


def test_a_setting_that_does_not_fit_stops_the_start(home: Path) -> None:
    home.mkdir()
    assert "OLORA_MAX_UPLOAD_MB must be a whole number, got 'many'." in refused_start(
        environment(home, max_upload_mb="many")
    )


def test_the_first_start_writes_a_key_that_works(home: Path, sqlite_url: str) -> None:
    settings = read_settings(home=home, database_url=sqlite_url)
    with TestClient(create_app(settings)) as client:
        key = settings.key_file.read_text().strip()
        assert settings.key_file.stat().st_mode & 0o777 == 0o600
        assert client.get("/v1/files", headers={"authorization": f"Bearer {key}"}).status_code == 200
    with TestClient(create_app(settings)) as client:
        assert settings.key_file.read_text().strip() == key
        assert client.get("/v1/files", headers={"authorization": f"Bearer {key}"}).status_code == 200


def test_what_a_killed_upload_left_is_removed(home: Path, sqlite_url: str) -> None:
    settings = read_settings(home=home, database_url=sqlite_url, api_key=KEY)
    leftover = settings.storage_folder / ".incoming" / "dead.part"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half a file")
    with TestClient(create_app(settings)):
        assert not leftover.exists()


def test_readiness_tells_its_parts(home: Path, sqlite_url: str, free_port: int) -> None:
    settings = read_settings(home=home, database_url=sqlite_url, api_key=KEY)
    ready = {"ready": True, "database": True, "schema_current": True, "broker": True}
    with TestClient(create_app(settings)) as client:
        assert client.get("/healthz").json() == {"status": "ok"}
        assert client.get("/readyz").json() == ready
    without = read_settings(
        home=home, database_url=sqlite_url, api_key=KEY, broker_url=f"redis://127.0.0.1:{free_port}/0"
    )
    with TestClient(create_app(without)) as client:
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()) == (200, {**ready, "broker": False})


def test_readiness_sees_a_schema_that_another_version_left(home: Path, sqlite_url: str) -> None:
    settings = read_settings(home=home, database_url=sqlite_url, api_key=KEY)
    with TestClient(create_app(settings)) as client:
        engine = make_engine(sqlite_url)
        with engine.begin() as connection:
            connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
        engine.dispose()
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["schema_current"]) == (503, False)


def test_a_database_that_went_away_is_a_503_until_it_is_back(
    home: Path, postgres_server: str, postgres_url: str
) -> None:
    settings = read_settings(home=home, database_url=postgres_url, api_key=KEY)
    with TestClient(create_app(settings), headers={"authorization": f"Bearer {KEY}"}) as client:
        assert client.get("/v1/files").status_code == 200
        _let_in(postgres_server, postgres_url, False)
        answer = client.get("/v1/files")
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "2")
        assert answer.json()["error"]["code"] == "unavailable"
        assert "psycopg" not in answer.text
        assert client.get("/healthz").status_code == 200
        assert client.get("/readyz").json()["database"] is False
        _let_in(postgres_server, postgres_url, True)
        assert client.get("/v1/files").status_code == 200


def _let_in(server: str, url: str, allowed: bool) -> None:
    """Opens or closes a database; closing ends every connection to it."""
    name = str(make_url(url).database)
    with psycopg.connect(server.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {allowed}")
        if not allowed:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name]
            )


def test_the_service_stops_within_seconds_of_a_sigterm(home: Path) -> None:
    with service(home) as running:
        begun = time.monotonic()
        running.process.terminate()
        assert running.process.wait(15) in (0, -15)
    assert time.monotonic() - begun < 10
