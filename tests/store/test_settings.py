"""Settings: defaults that need no setup, and messages for invalid values."""

import logging
from pathlib import Path

import pytest

from store.errors import SettingsError
from store.settings import Settings, get_settings, read_settings, settings_table, unknown_variables


def test_everything_has_a_default_in_the_home(tmp_path: Path) -> None:
    settings = read_settings(home=tmp_path)
    assert settings.database_url == f"sqlite:///{tmp_path}/olora.db"
    assert settings.storage_folder == tmp_path / "storage"
    assert settings.queue_folder == tmp_path / "queue"
    assert (settings.host, settings.port) == ("127.0.0.1", 8000)
    assert settings.allowed_hub_models == ()


def test_variables_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("OLORA_HOME", str(tmp_path / "somewhere"))
    monkeypatch.setenv("OLORA_DATABASE_URL", "postgresql://u:p@host/db")
    monkeypatch.setenv("OLORA_BROKER_URL", "redis://host:6379/0")
    monkeypatch.setenv("OLORA_ALLOWED_HUB_MODELS", "Qwen/*, gpt2")
    settings = get_settings()
    assert settings is get_settings()
    assert settings.home == tmp_path / "somewhere"
    assert settings.database_url == "postgresql+psycopg://u:p@host/db"
    assert settings.queue_folder is None
    assert settings.allowed_hub_models == ("Qwen/*", "gpt2")


def test_the_lease_is_shorter_on_sqlite_unless_it_is_set(tmp_path: Path) -> None:
    assert read_settings(home=tmp_path).lease_seconds == 15
    assert read_settings(home=tmp_path, database_url="postgresql://h/d").lease_seconds == 60
    assert read_settings(home=tmp_path, lease_seconds=7).lease_seconds == 7


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("OLORA_DATABASE_URL", "mysql://host/db", "must be sqlite:///path/to/file.db or postgresql://"),
        ("OLORA_DATABASE_URL", "sqlite://", "sqlite:///path"),
        ("OLORA_DATABASE_URL", "sqlite:///:memory:", "sqlite:///path"),
        ("OLORA_BROKER_URL", "amqp://host", "redis://"),
        ("OLORA_STORAGE_URL", "s3://bucket", "not supported yet"),
        ("OLORA_PORT", "abc", "OLORA_PORT must be a whole number, got 'abc'."),
        ("OLORA_PORT", "8000.5", "OLORA_PORT must be a whole number, got '8000.5'."),
        ("OLORA_PORT", "70000", "OLORA_PORT must be at most 65535, got '70000'."),
        ("OLORA_MAX_FAILURES", "0", "OLORA_MAX_FAILURES must be at least 1, got '0'."),
        ("OLORA_LEASE_SECONDS", "0", "OLORA_LEASE_SECONDS must be greater than 0, got '0'."),
        ("OLORA_LEASE_SECONDS", "7200", "OLORA_LEASE_SECONDS must be at most 3600, got '7200'."),
        ("OLORA_IDLE_SECONDS", "long", "OLORA_IDLE_SECONDS must be a number, got 'long'."),
        ("OLORA_API_KEY", "two words", "without spaces"),
        ("OLORA_ORGANIZATION", "A:B", "must be 1 to 32 lower-case letters, digits and hyphens"),
        ("OLORA_LOG_LEVEL", "loud", "must be debug, info, warning or error, got 'loud'."),
        ("OLORA_WANDB_MODE", "off", "must be 'online' or 'offline', got 'off'."),
        ("OLORA_WANDB_API_KEY", "k" * 257, "1 to 256"),
        ("OLORA_WANDB_BASE_URL", "wandb.local", "https://host"),
        ("OLORA_MLFLOW_TRACKING_URI", "mlruns", "sqlite:///path"),
        ("OLORA_MLFLOW_TOKEN", "two words", "without spaces"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_what_may_stand_there(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        get_settings()
    assert says in caught.value.message
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OLORA_DATABASE_URL", "mysql://me:hidden@host/db"),
        ("OLORA_BROKER_URL", "amqp://me:hidden@host"),
        ("OLORA_STORAGE_URL", "s3://me:hidden@host"),
        ("OLORA_WANDB_BASE_URL", "ftp://me:hidden@host"),
        ("OLORA_MLFLOW_TRACKING_URI", "ftp://me:hidden@host"),
        ("OLORA_API_KEY", "hidden key"),
        ("OLORA_WANDB_API_KEY", "hidden key"),
        ("OLORA_MLFLOW_TOKEN", "hidden token"),
    ],
)
def test_a_bad_url_or_key_is_not_repeated(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=name) as caught:
        get_settings()
    assert "hidden" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_addresses_and_keys_of_trackers_are_not_shown() -> None:
    settings = read_settings(
        wandb_api_key="hidden-1",
        wandb_base_url="https://hidden-2",
        mlflow_tracking_uri="https://me:hidden-3@host",
        mlflow_token="hidden-4",
    )
    assert "hidden" not in repr(settings)


def test_an_unknown_variable_is_named_with_the_nearest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OLORA_DATABSE_URL", "sqlite:///x.db")
    with caplog.at_level(logging.WARNING):
        get_settings()
    assert "OLORA_DATABSE_URL is not a setting" in caplog.text
    assert "OLORA_DATABASE_URL?" in caplog.text
    assert unknown_variables({"OLORA_PORT": "1", "OLORA_TEST_REDIS_URL": "x", "HOME": "/"}) == []


@pytest.mark.parametrize("name", ["OLORA_FOO", "OLORA_X", "OLORA_VERBOSE"])
def test_a_name_that_is_near_to_none_is_only_said_to_be_unknown(name: str) -> None:
    assert unknown_variables({name: "1"}) == [f"{name} is not a setting and is ignored."]


def test_an_empty_variable_is_one_that_is_not_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("OLORA_HOME")
    unset = read_settings()
    for name in Settings.model_fields:
        monkeypatch.setenv(f"OLORA_{name.upper()}", "")
    assert read_settings() == unset
    assert unset.home == tmp_path / ".olora"


def test_every_setting_is_described() -> None:
    table = settings_table()
    assert len(table) == len(Settings.model_fields)
    assert all(name.startswith("OLORA_") and len(text) > 20 for name, _, text in table)


def test_a_folder_with_a_space_works(tmp_path: Path) -> None:
    settings = read_settings(home=tmp_path / "my home")
    assert settings.storage_folder == tmp_path / "my home" / "storage"
    assert settings.queue_folder == tmp_path / "my home" / "queue"
