"""The images' own install and start commands, in a clean virtual environment."""

import re
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.deploy.dockerfile import ROOT, Image, build, instructions

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(image: Image, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """The image's start command, until the block ends; it must stop in order on SIGTERM."""
    environment = image.environment | {f"OLORA_{name.upper()}": value for name, value in settings.items()}
    program, *options = image.command
    with log.open("wb") as output:
        process = subprocess.Popen(
            [image.path_of(program), *options], cwd=image.app, env=environment, stdout=output, stderr=output
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def health(port: int, process: subprocess.Popen[bytes], log: Path) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=5) as answer:
                return int(answer.status)
        except OSError:
            time.sleep(0.2)
    raise AssertionError(f"no answer in a minute:\n{log.read_text()}")


def test_the_api_image_installs_starts_and_answers_without_torch(tmp_path: Path) -> None:
    image = build("api", tmp_path)
    names = ("torch", "transformers", "worker", "psycopg", "uvicorn")
    found = image.python(f"from importlib.util import find_spec; print([n for n in {names} if find_spec(n)])")
    assert found == "['psycopg', 'uvicorn']"
    port, log = free_port(), tmp_path / "api.log"
    home = {"home": str(tmp_path / "home"), "models_dir": str(tmp_path), "host": "127.0.0.1"}
    with started(image, log, port=str(port), **home) as process:
        assert health(port, process, log) == 200
    assert "Traceback" not in log.read_text()


def test_both_images_install_from_the_one_lock() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    for stage in ("api", "worker"):
        installs = [rest for word, rest in instructions(stage) if word == "RUN" and "pip install" in rest]
        assert installs
        assert all("constraints.txt" in install for install in installs)
    assert re.search(r"^torch==", lock, re.MULTILINE)


def test_images_hold_no_room_they_do_not_use() -> None:
    copied = {
        stage: {rest.split()[0] for word, rest in instructions(stage) if word == "COPY"}
        for stage in ("api", "worker")
    }
    assert "worker" not in copied["api"]
    assert "api" not in copied["worker"]


def test_the_ignore_file_lets_pass_what_is_copied() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in ("api", "worker"):
        for word, rest in instructions(stage):
            if word == "COPY":
                assert set(rest.split()[:-1]) <= allowed
