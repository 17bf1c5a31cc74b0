"""Fixtures for the whole suite: databases, Redis, settings, base models.

Every test gets its own database and home.
"""

import gc
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path

import pytest
from filelock import FileLock
from sqlalchemy import Engine, create_engine, make_url, text

from store.models import Row
from store.session import Sessions, make_engine, migrate, read_sessions, sessions
from store.settings import Settings, get_settings, read_settings
from tests import services

# Before torch is imported: matrices this small only lose by threads, and a fixed count keeps results bit for
# bit. Started processes inherit it.
os.environ["OMP_NUM_THREADS"] = "1"


SLOW = (
    *("faults", "worker", "upgrade", "conformance", "examples", "families"),
    *("cli/test_serve.py", "cli/test_train.py", "cli/test_compare.py", "cli/test_quickstart.py"),
    *("cli/test_models.py", "core/bases/test_gguf.py"),
    "deploy/test_images.py",
    *("core/test_devices.py", "core/bases/test_quantised.py", "core/bases/test_families.py"),
    *("core/each_method/test_methods_in_runs.py", "core/each_method/test_ba_lora.py"),
    *("core/comparison/test_compare.py", "core/export/test_merged.py", "core/export/test_certificate.py"),
    "core/training",
    *("api/test_start.py", "api/test_uploads.py", "api/test_security.py", "store/test_races.py"),
)
"""Starts services, trainers or runs. Slow tests elsewhere have a mark of their own."""
BY_TURNS = (
    ("deploy", "cli/test_serve.py", "conformance/programs", "worker/test_trackers.py", "bench/test_start.py"),
    (
        *("cli/test_train.py", "bench/test_gpu.py", "worker/test_peers.py"),
        "core/each_method/test_methods_in_runs.py",
    ),
    (
        *("faults/test_faults.py", "faults/test_comparisons.py", "faults/test_two_workers.py"),
        *("faults/test_database_away.py", "cli/test_quickstart.py", "core/test_devices.py"),
        *("core/bases/test_quantised.py", "bench/test_train.py"),
    ),
)
"""The longest files: `make test` runs one of these groups, another one every day, and `make test-all` all."""
LONGEST_FIRST = (
    *(file for group in BY_TURNS for file in group),
    *SLOW,
    *("bench", "core/bases", "core/each_method", "core/export", "core"),
    "api",
)


def pytest_configure(config: pytest.Config) -> None:
    # Before the processes of xdist start, so that all have the same day even at midnight.
    os.environ.setdefault("OLORA_TEST_DAY", str(date.today().toordinal()))


def pytest_report_header() -> str | None:
    if os.environ.get("OLORA_TEST_SHARE") != "today":
        return None
    return f"of the longest files, today: {', '.join(BY_TURNS[_turn()])}; make test-all runs all"


@pytest.hookimpl(tryfirst=True)  # before `-m` selects by marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the slow folders, leaves out the long files whose turn it is not, and puts the longest first.

    Each process takes a file at a time in this order: with short files last, none works alone at the end.
    """
    for item in items:
        if _place(item, SLOW) < len(SLOW):
            item.add_marker(pytest.mark.slow)
    if os.environ.get("OLORA_TEST_SHARE") == "today":
        others = [file for n, group in enumerate(BY_TURNS) if n != _turn() for file in group]
        left_out = [item for item in items if _place(item, others) < len(others)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _place(item, others) == len(others)]
    items.sort(key=lambda item: _place(item, LONGEST_FIRST))


def pytest_collection_finish() -> None:
    """A million objects of the libraries and test modules stay: the garbage collector need not visit them.

    Left alone, it takes a fifth of the processes' time.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)


def _turn() -> int:
    return int(os.environ["OLORA_TEST_DAY"]) % len(BY_TURNS)


def _place(item: pytest.Item, folders: Sequence[str]) -> int:
    """The position of the first folder or file that the test is in, or their number."""
    path = item.path.relative_to(Path(__file__).parent)
    return next((i for i, name in enumerate(folders) if path.is_relative_to(name)), len(folders))


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No test reads the settings, or the home, of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("OLORA_") and not name.startswith(("OLORA_TEST_", "OLORA_REQUIRE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OLORA_HOME", str(tmp_path / "home"))
    get_settings.cache_clear()
    yield
    get_settings.cache_clear()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this test run have in common; whoever writes in it holds a lock."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def base_folders(shared_folder: Path) -> Mapping[str, Path]:
    """The folder of each tiny base model; tests only read them."""
    from tests.tiny_base import BaseFolders

    return BaseFolders(shared_folder / "bases")


@pytest.fixture(scope="session")
def models_dir(shared_folder: Path) -> Path:
    """OLORA_MODELS_DIR with the base model `tiny`; tests only read it."""
    from tests.tiny_base import BaseFolders

    return BaseFolders(shared_folder / "models")["tiny"].parent


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL in which the tests may make databases."""
    if url := os.environ.get("OLORA_TEST_POSTGRES_URL"):
        yield url.replace("postgresql://", "postgresql+psycopg://", 1)
        return
    with services.postgres_server() as url:
        yield url


def _administer(server: str, statement: str) -> None:
    engine = create_engine(server, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.execute(text(statement))
    engine.dispose()


def _with_name(server: str, name: str) -> str:
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def _postgres_database(server: str) -> Iterator[str]:
    name = f"olora_{uuid.uuid4().hex[:12]}"
    _administer(server, f"CREATE DATABASE {name} TEMPLATE template0")
    yield _with_name(server, name)
    if "OLORA_TEST_POSTGRES_URL" in os.environ:  # a private server is thrown away as a whole
        _administer(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture(scope="session")
def sqlite_template(shared_folder: Path) -> Path:
    """A migrated database file that others are copied from."""
    path = shared_folder / "template.db"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            migrate(f"sqlite:///{path.with_suffix('.part')}")
            path.with_suffix(".part").rename(path)
    return path


@pytest.fixture(scope="session")
def postgres_database(postgres_server: str) -> Iterator[str]:
    """A migrated database, shared by the tests one after another."""
    for url in _postgres_database(postgres_server):
        migrate(url)
        yield url


@pytest.fixture(scope="module")
def own_postgres_url(postgres_server: str) -> Iterator[str]:
    """A PostgreSQL database without any table, for all tests of a file."""
    yield from _postgres_database(postgres_server)


@pytest.fixture
def postgres_url(postgres_server: str, postgres_database: str) -> str:
    """A migrated PostgreSQL database with nothing in it, and nobody else connected to it."""
    name = make_url(postgres_database).database
    others = f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'"
    _administer(postgres_server, others)
    tables = ", ".join(table.name for table in Row.metadata.sorted_tables)
    _administer(postgres_database, f"TRUNCATE {tables} RESTART IDENTITY CASCADE")
    return postgres_database


@pytest.fixture
def sqlite_url(tmp_path: Path, sqlite_template: Path) -> str:
    """A fresh, migrated SQLite database, where the settings expect it."""
    path = tmp_path / "home" / "olora.db"
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(sqlite_template, path)
    return f"sqlite:///{path}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """A fresh, migrated database of each kind in turn."""
    name = "sqlite_url" if request.param == "sqlite" else "postgres_url"
    return str(request.getfixturevalue(name))


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database of each kind without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'empty.db'}"
        return
    yield from _postgres_database(request.getfixturevalue("postgres_server"))


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = make_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture(name="sessions")
def _sessions(engine: Engine) -> Sessions:
    return sessions(engine)


@pytest.fixture(name="read_sessions")
def _read_sessions(engine: Engine) -> Sessions:
    return read_sessions(engine)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def settings(home: Path, database_url: str) -> Settings:
    """Settings on a fresh database of each kind; queue and storage are folders in the home."""
    return read_settings(home=home, database_url=database_url)


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The URL of a Redis that the tests may flush."""
    if url := os.environ.get("OLORA_TEST_REDIS_URL"):
        yield url
        return
    with services.redis_server() as url:
        yield url


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """An empty Redis."""
    import redis

    with redis.Redis.from_url(redis_server) as client:
        client.flushdb()
    return redis_server


@pytest.fixture
def free_port() -> int:
    return services.free_port()
