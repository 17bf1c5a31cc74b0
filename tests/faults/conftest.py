"""The two columns: everything in a home, and PostgreSQL with Redis."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.settings import read_settings
from tests.faults.fleet import LEASE_SECONDS, Fleet, fleet_of
from tests.worker.service import model_folder


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Matrices this small only lose by threads; workers and trainers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLORA_MODELS_DIR with the base model `tiny`."""
    return model_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def embedded(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, models_dir: Path
) -> Iterator[Fleet]:
    """SQLite and a folder as the queue."""
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(sqlite_template, home / "olora.db")
    settings = read_settings(
        home=home,
        database_url=f"sqlite:///{home / 'olora.db'}",
        broker_url=f"folder://{home / 'queue'}",
        storage_url=f"file://{home / 'storage'}",
        models_dir=models_dir,
        lease_seconds=LEASE_SECONDS,
        checkpoint_seconds=0.3,
    )
    with fleet_of(settings, home) as fleet:
        yield fleet


@pytest.fixture
def production(tmp_path: Path, postgres_url: str, redis_url: str, models_dir: Path) -> Iterator[Fleet]:
    """PostgreSQL and Redis."""
    home = tmp_path / "home"
    home.mkdir()
    settings = read_settings(
        home=home,
        database_url=postgres_url,
        broker_url=redis_url,
        storage_url=f"file://{home / 'storage'}",
        models_dir=models_dir,
        lease_seconds=LEASE_SECONDS,
        checkpoint_seconds=0.3,
    )
    with fleet_of(settings, home) as fleet:
        yield fleet
