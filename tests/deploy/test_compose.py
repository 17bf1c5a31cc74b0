"""docker-compose.yml follows the specification, and starts nothing unsafe."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from store.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
SCHEMA = json.loads((Path(__file__).parent / "compose_spec" / "compose_spec.json").read_text())
TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(TEXT)
SERVICES: dict[str, Any] = COMPOSE["services"]
SECRETS = {"POSTGRES_PASSWORD", "REDIS_PASSWORD", "OLORA_API_KEY"}


def test_it_follows_the_compose_specification() -> None:
    validator = jsonschema.Draft201909Validator(SCHEMA)
    assert [error.message for error in validator.iter_errors(COMPOSE)] == []


def test_the_schema_finds_a_mistake() -> None:
    broken = {"services": {"api": {"depends_on": {"redis": {"condition": "service_happy"}}}}}
    assert list(jsonschema.Draft201909Validator(SCHEMA).iter_errors(broken))


def test_secrets_have_no_defaults() -> None:
    for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", TEXT):
        if name in SECRETS or re.search("PASSWORD|SECRET|KEY", name):
            assert rest.startswith(":?"), f"{name} must stop the start when it is not set"
    assert set(re.findall(r"\$\{(\w+):\?", TEXT)) == SECRETS


def test_every_variable_is_explained_in_the_example_file() -> None:
    used = set(re.findall(r"(?<!\$)\$\{(\w+)", TEXT))
    explained = set(re.findall(r"^#?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert used == explained
    filled = re.findall(r"^(\w+)=(.+)$", (ROOT / ".env.example").read_text(), re.MULTILINE)
    assert filled == []


def test_services_take_settings_that_exist() -> None:
    known = {f"OLORA_{name.upper()}" for name in Settings.model_fields}
    for name in ("api", "worker", "worker-gpu", "migrate"):
        given = {key for key in SERVICES[name]["environment"] if key.startswith("OLORA_")}
        assert given <= known


def test_settings_accept_what_compose_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, value in SERVICES["api"]["environment"].items():
        monkeypatch.setenv(
            key, re.sub(r"\$\{\w+:-(.*?)\}", r"\1", re.sub(r"\$\{\w+:\?.*?\}", "secret", value))
        )
    settings = Settings()
    assert settings.database_url.startswith("postgresql+psycopg://olora:secret@postgres")
    assert settings.queue_folder is None
    assert str(settings.storage_folder) == "/data/storage"


def test_nothing_starts_before_the_migration() -> None:
    for name in ("api", "worker", "worker-gpu"):
        needs = SERVICES[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully"
        assert needs["redis"]["condition"] == needs["postgres"]["condition"] == "service_healthy"


def test_everything_that_stays_up_has_a_health_check() -> None:
    for name, service in SERVICES.items():
        if service.get("restart") == "no":
            continue
        # The API's health check is in its image.
        assert "healthcheck" in service or service["build"]["target"] == "api", name
    assert "HEALTHCHECK" in (ROOT / "Dockerfile").read_text().partition("AS api")[2].partition("FROM")[0]


def test_redis_is_durable() -> None:
    command = SERVICES["redis"]["command"][-1]
    assert "--appendonly yes" in command
    assert "--maxmemory-policy noeviction" in command
    assert "--requirepass" in command


def test_files_are_shared_and_outlive_containers() -> None:
    for name in ("api", "worker", "worker-gpu"):
        assert "storage:/data" in SERVICES[name]["volumes"]
    named = {str(v).split(":")[0] for service in SERVICES.values() for v in service.get("volumes", [])}
    assert {name for name in named if not name.startswith("${")} <= set(COMPOSE["volumes"])


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"api": ["${PUBLISH:-127.0.0.1:8000}:8000"]}


def test_the_gpu_worker_is_the_worker_with_a_gpu() -> None:
    gpu = dict(SERVICES["worker-gpu"])
    assert gpu.pop("profiles") == ["gpu"]
    assert gpu.pop("deploy")["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]
    assert gpu == SERVICES["worker"]
