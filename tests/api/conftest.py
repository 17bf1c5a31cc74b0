"""An application over a real, migrated database in a home of its own: SQLite, unless a test asks for both."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from api.main import create_app
from store.keys import create_key
from store.models import Project
from store.session import make_engine, sessions
from store.settings import Settings, read_settings

from .serving import KEY, Service, service


@pytest.fixture
def settings(request: pytest.FixtureRequest, home: Path, tmp_path: Path) -> Settings:
    url = request.getfixturevalue(getattr(request, "param", "sqlite_url"))
    models = tmp_path / "models"
    models.mkdir()
    return read_settings(home=home, database_url=url, api_key=KEY, models_dir=models, max_upload_mb=1)


@pytest.fixture
def client(settings: Settings) -> Iterator[TestClient]:
    """Calls with the first project's key."""
    with TestClient(create_app(settings), headers={"authorization": f"Bearer {KEY}"}) as client:
        yield client


@pytest.fixture
def stranger(client: TestClient, settings: Settings) -> TestClient:
    """Calls with another project's key."""
    engine = make_engine(settings.database_url)
    with sessions(engine).begin() as session:
        session.add(Project(id="other", name="Other"))
        session.flush()
        _, token = create_key(session, "other", "other")
    engine.dispose()
    return TestClient(client.app, headers={"authorization": f"Bearer {token}"})


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service behind a real socket."""
    with service(tmp_path_factory.mktemp("served"), max_upload_mb="4") as running:
        yield running
