"""The official client, in its oldest and newest supported versions, works here with `base_url` changed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.serving import KEY, ROOT, service, worker

from .client_script import CHECKS
from .lossy import lossy_proxy

OLDEST, MIDDLE = "1.109.1", "2.54.0"
VERSIONS = (OLDEST, "newest", *([MIDDLE] if os.environ.get("OLORA_TEST_PROGRAMS") == "all" else []))
CACHE = ROOT / ".venv" / "clients"


def installed(version: str) -> Path:
    """A folder with a version of the client and its dependencies, installed once."""
    folder = CACHE / f"openai-{version}"
    if not (folder / "complete").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(folder)]
        subprocess.run([*command, "--upgrade", f"openai=={version}"], check=True)
        (folder / "complete").touch()
    return folder


@pytest.fixture(scope="session")
def running(tmp_path_factory: pytest.TempPathFactory) -> int:
    home = tmp_path_factory.mktemp("service")
    with service(home, wandb_mode="offline") as api, worker(home, wandb_mode="offline"):
        yield api.port


@pytest.fixture(scope="session", params=VERSIONS)
def outcome(
    request: pytest.FixtureRequest, running: int, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str | None]:
    """The output of each check of the script with one version of the client."""
    environ = {**os.environ, "OPENAI_API_KEY": KEY, "PYTHONPATH": ""}
    if request.param != "newest":
        environ["PYTHONPATH"] = str(installed(request.param))
    files = _training_files(tmp_path_factory.mktemp("data"))
    with lossy_proxy(running) as lossy:
        script = Path(__file__).with_name("client_script.py")
        urls = [f"http://127.0.0.1:{port}/v1" for port in (running, lossy)]
        done = subprocess.run(
            [sys.executable, str(script), *urls, *map(str, files)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=400,
        )
    assert done.returncode == 0, done.stderr
    version, *checks = map(json.loads, done.stdout.splitlines())
    assert version["version"] == request.param if request.param != "newest" else version["version"] > "3"
    return {line["check"]: line["trouble"] for line in checks}


def _training_files(folder: Path) -> list[Path]:
    """The first rows of the shipped example, enough for a few steps."""
    paths = []
    for name, rows in (("train.jsonl", 24), ("valid.jsonl", 6)):
        lines = (ROOT / "examples" / "docstrings" / name).read_text().splitlines()[:rows]
        paths.append(folder / name)
        paths[-1].write_text("\n".join(lines) + "\n")
    return paths


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_the_official_client_works(check: str, outcome: dict[str, str | None]) -> None:
    assert outcome[check] is None, outcome[check]
