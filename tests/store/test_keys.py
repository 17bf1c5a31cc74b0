"""Keys: created once, readable only by their owner, and never stored in the database."""

import stat
import threading
from pathlib import Path

import pytest
from sqlalchemy import func, select

from store import keys
from store.errors import SettingsError
from store.models import Key, Row
from store.session import Sessions
from store.settings import Settings, read_settings


def first(sessions: Sessions, settings: Settings) -> str | None:
    with sessions.begin() as session:
        return keys.first_key(session, settings)


def find(sessions: Sessions, token: str) -> Key | None:
    with sessions() as session:
        return keys.find_key(session, token)


def dump(sessions: Sessions, url: str) -> bytes:
    """The database's whole content: SQLite's files as they are, or every row of every table."""
    with sessions() as session:
        rows = [str(session.execute(select(table)).all()) for table in Row.metadata.sorted_tables]
    files = Path(url.removeprefix("sqlite:///")).parent.glob("olora.db*") if url.startswith("sqlite") else ()
    return "\n".join(rows).encode() + b"".join(path.read_bytes() for path in files)


def test_the_first_start_makes_a_key_that_only_its_owner_can_read(
    sessions: Sessions, settings: Settings
) -> None:
    token = first(sessions, settings)
    assert token is not None
    assert settings.key_file.read_text().strip() == token
    assert stat.S_IMODE(settings.key_file.stat().st_mode) == 0o600
    assert token.startswith("sk-olora-")
    assert len(token) > 48
    key = find(sessions, token)
    assert key is not None
    assert key.project_id == "default"
    assert first(sessions, settings) is None


def test_the_database_holds_no_key(sessions: Sessions, settings: Settings, database_url: str) -> None:
    token = first(sessions, settings)
    with sessions.begin() as session:
        _, other = keys.create_key(session, "default", "laptop")
    held = dump(sessions, database_url)
    assert keys.digest_of(other).encode() in held
    for secret in (token, other):
        assert secret
        assert secret.encode() not in held
        assert secret.removeprefix(keys.PREFIX).encode() not in held


@pytest.mark.parametrize("token", ["", "sk-olora-wrong", "sk-olora-" + "x" * 10_000, "\udcff", "ключ"])
def test_an_unknown_token_finds_nothing(sessions: Sessions, settings: Settings, token: str) -> None:
    first(sessions, settings)
    assert find(sessions, token) is None


def test_a_revoked_key_finds_nothing(sessions: Sessions, settings: Settings) -> None:
    first(sessions, settings)
    with sessions.begin() as session:
        key, token = keys.create_key(session, "default", "laptop")
    assert find(sessions, token) is not None
    with sessions.begin() as session:
        keys.revoke_key(session, session.merge(key))
    assert find(sessions, token) is None


def test_the_variable_wins_and_makes_no_file(sessions: Sessions, home: Path, database_url: str) -> None:
    settings = read_settings(home=home, database_url=database_url, api_key="my-own-key")
    assert first(sessions, settings) is None
    assert not settings.key_file.exists()
    assert find(sessions, "my-own-key") is not None


def test_another_variable_takes_the_place_of_the_one_before(
    sessions: Sessions, home: Path, database_url: str
) -> None:
    for token in ("key-one", "key-two", "key-two"):
        first(sessions, read_settings(home=home, database_url=database_url, api_key=token))
    assert find(sessions, "key-one") is None
    assert find(sessions, "key-two") is not None
    made = first(sessions, read_settings(home=home, database_url=database_url))
    assert find(sessions, "key-two") is None
    assert made is not None
    assert find(sessions, made) is not None


def test_a_new_database_takes_the_key_of_the_home(sessions: Sessions, settings: Settings) -> None:
    settings.home.mkdir(exist_ok=True)
    settings.key_file.write_text("sk-olora-kept\n")
    assert first(sessions, settings) is None
    assert find(sessions, "sk-olora-kept") is not None


def test_an_empty_key_file_is_an_error_with_its_remedy(sessions: Sessions, settings: Settings) -> None:
    settings.home.mkdir(exist_ok=True)
    settings.key_file.write_text("")
    with pytest.raises(SettingsError, match="delete it"):
        first(sessions, settings)


def test_two_first_starts_at_once_make_one_key(sessions: Sessions, settings: Settings) -> None:
    made: list[str | None] = []
    threads = [threading.Thread(target=lambda: made.append(first(sessions, settings))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len([token for token in made if token]) == 1
    assert len(made) == 6
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Key)) == 1


def test_settings_never_show_a_key_or_a_password(home: Path) -> None:
    settings = read_settings(
        home=home,
        api_key="my-own-key",
        database_url="postgresql://me:hidden@host/db",
        broker_url="redis://:hidden@host/0",
    )
    assert "my-own-key" not in repr(settings)
    assert "hidden" not in repr(settings)
    assert "hidden" not in str(settings)


def test_the_home_holds_the_key_file_and_nothing_half_written(settings: Settings, sessions: Sessions) -> None:
    first(sessions, settings)
    assert [path.name for path in settings.home.iterdir() if "key" in path.name] == ["api_key"]


def test_a_revoked_key_does_not_come_back(sessions: Sessions, settings: Settings) -> None:
    token = first(sessions, settings)
    assert token is not None
    with sessions.begin() as session:
        key = keys.find_key(session, token)
        assert key is not None
        keys.revoke_key(session, key)
    with pytest.raises(SettingsError, match=r"holds a revoked key; delete it"):
        first(sessions, settings)
    with pytest.raises(SettingsError, match=r"OLORA_API_KEY is a revoked key"):
        first(sessions, read_settings(home=settings.home, api_key=token))
    settings.key_file.unlink()
    assert first(sessions, settings) not in (None, token)
