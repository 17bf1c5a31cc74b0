"""A service for each test file, so that its tests share a warm trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.worker.service import Service, service_settings
from worker.supervisor.supervisor import Supervisor


@pytest.fixture(scope="module")
def service(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, models_dir: Path
) -> Iterator[Service]:
    """A home with an empty database, shared by the tests of a file."""
    home = tmp_path_factory.mktemp("home")
    service = Service(service_settings(home, models_dir, sqlite_template, lease_seconds=5))
    yield service
    service.engine.dispose()


@pytest.fixture(scope="module")
def supervisor(service: Service) -> Iterator[Supervisor]:
    supervisor = Supervisor(service.settings)
    yield supervisor
    supervisor.close()
