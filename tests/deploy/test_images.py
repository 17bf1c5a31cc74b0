"""The images' install and start commands, in a clean virtual environment."""

import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.running import ROWS, olora
from tests.deploy.dockerfile import ROOT, Image, build, instructions

pytestmark = pytest.mark.timeout(600)
ROOM_BYTES = 4 * 2**30


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(image: Image, log: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """The image's start command, until the block ends; it must then exit with code 0 on SIGTERM."""
    environment = image.environment | {f"OLORA_{name.upper()}": value for name, value in settings.items()}
    program, *options = image.command
    with log.open("wb") as output:
        process = subprocess.Popen(
            [image.path_of(program), *options], cwd=image.app, env=environment, stdout=output, stderr=output
        )
    try:
        yield process
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, log.read_text()
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


@pytest.fixture(scope="module")
def workshop() -> Iterator[Path]:
    """A folder for two environments; in memory if there is enough, since one of them has torch."""
    memory = Path("/dev/shm")
    plenty = memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES
    runs = plenty and not os.statvfs(memory).f_flag & os.ST_NOEXEC
    with tempfile.TemporaryDirectory(dir=memory if runs else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def api_image(workshop: Path) -> Image:
    return build("api", workshop / "api")


@pytest.fixture(scope="module")
def worker_image(workshop: Path) -> Image:
    return build("worker", workshop / "worker")


def held(image: Image, *names: str) -> list[str]:
    """The modules among `names` that are installed in the image."""
    code = f"from importlib.util import find_spec; print(*[n for n in {names} if find_spec(n)])"
    return image.python(code).split()


def test_the_api_image_starts_and_answers_without_torch(api_image: Image, tmp_path: Path) -> None:
    assert held(api_image, "torch", "transformers", "worker", "psycopg", "uvicorn") == ["psycopg", "uvicorn"]
    port, log = free_port(), tmp_path / "api.log"
    with started(api_image, log, **places(tmp_path), port=str(port)) as process:
        assert health(port, process, log) == 200
    assert "Traceback" not in log.read_text()


def test_both_images_together_train_an_adapter(api_image: Image, worker_image: Image, tmp_path: Path) -> None:
    assert held(worker_image, "torch", "psycopg", "api", "uvicorn", "openai") == ["torch", "psycopg"]
    port, rows = free_port(), tmp_path / "rows.jsonl"
    shared = places(tmp_path) | {"port": str(port), "api_key": "the-key-of-both"}
    rows.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:12]))
    with started(api_image, tmp_path / "api.log", **shared) as process:
        health(port, process, tmp_path / "api.log")
        with started(worker_image, tmp_path / "worker.log", **shared):
            home = Path(shared.pop("home"))
            asked = olora(home, "jobs", "create", rows, "--epochs", "1", "--rank", "2", "--watch", **shared)
    assert asked.returncode == 0, asked.stderr + (tmp_path / "worker.log").read_text()


def places(folder: Path) -> dict[str, str]:
    return {"home": str(folder / "home"), "models_dir": str(folder / "models"), "host": "127.0.0.1"}


def test_both_images_install_from_the_one_lock() -> None:
    lock = (ROOT / "constraints.txt").read_text()
    for stage in ("api", "worker"):
        installs = [rest for word, rest in instructions(stage) if word == "RUN" and "pip install" in rest]
        assert installs
        assert all("constraints.txt" in install for install in installs)
    assert re.search(r"^torch==", lock, re.MULTILINE)


@pytest.mark.parametrize(
    ("trackers", "extras"),
    [("", "worker,gpu,postgres"), ("wandb,mlflow", "worker,gpu,postgres,wandb,mlflow")],
)
def test_a_build_argument_adds_the_tracker_clients(trackers: str, extras: str) -> None:
    [install] = [rest for word, rest in instructions("worker") if word == "RUN" and "[worker" in rest]
    command = install.partition("pip install")[2]
    done = subprocess.run(
        f"echo {command}", shell=True, env={"TRACKERS": trackers}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == f".[{extras}]"


def test_images_contain_no_unused_folder() -> None:
    copied = {
        stage: {rest.split()[0] for word, rest in instructions(stage) if word == "COPY"}
        for stage in ("api", "worker")
    }
    assert "worker" not in copied["api"]
    assert "api" not in copied["worker"]


def test_the_ignore_file_allows_what_is_copied() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for stage in ("api", "worker"):
        for word, rest in instructions(stage):
            if word == "COPY":
                assert set(rest.split()[:-1]) <= allowed
