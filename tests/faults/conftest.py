"""The two columns: everything in a home, and PostgreSQL with Redis."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.fleet import LEASE_SECONDS, Fleet, fleet_of
from tests.worker.service import service_settings


@pytest.fixture(scope="module")
def embedded(
    tmp_path_factory: pytest.TempPathFactory, sqlite_template: Path, models_dir: Path
) -> Iterator[Fleet]:
    """SQLite and a folder as the queue."""
    home = tmp_path_factory.mktemp("home")
    settings = service_settings(home, models_dir, sqlite_template, lease_seconds=LEASE_SECONDS)
    with fleet_of(settings, home) as fleet:
        yield fleet


@pytest.fixture
def production(tmp_path: Path, postgres_url: str, redis_url: str, models_dir: Path) -> Iterator[Fleet]:
    """PostgreSQL and Redis."""
    home, servers = tmp_path / "home", {"database_url": postgres_url, "broker_url": redis_url}
    settings = service_settings(home, models_dir, lease_seconds=LEASE_SECONDS, **servers)
    with fleet_of(settings, home) as fleet:
        yield fleet
