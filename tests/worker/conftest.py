"""A service for each test file, so that its tests share a warm trainer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from store.settings import read_settings
from tests.worker.service import Service, model_folder
from worker.supervisor.supervisor import Supervisor


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OLORA_MODELS_DIR with the base model `tiny`."""
    return model_folder(tmp_path_factory.getbasetemp())


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Matrices this small only lose by threads; trainers inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, models_dir: Path
) -> Iterator[Service]:
    """A home with an empty database, shared by the tests of a file."""
    home = tmp_path_factory.mktemp("home")
    shutil.copyfile(sqlite_template, home / "olora.db")
    settings = read_settings(
        home=home,
        database_url=f"sqlite:///{home / 'olora.db'}",
        broker_url=f"folder://{home / 'queue'}",
        storage_url=f"file://{home / 'storage'}",
        models_dir=models_dir,
        lease_seconds=5,
        checkpoint_seconds=0.3,
    )
    service = Service(settings)
    yield service
    service.engine.dispose()


@pytest.fixture(scope="module")
def supervisor(service: Service) -> Iterator[Supervisor]:
    supervisor = Supervisor(service.settings)
    yield supervisor
    supervisor.close()
