"""A real service for tests: its own home, a migrated database, `uvicorn` and workers as processes."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from store.session import migrate
from store.settings import read_settings

ROOT = Path(__file__).resolve().parents[2]
KEY = "test-key-of-the-first-project"
_LISTENING = re.compile(r"running on http://127\.0\.0\.1:(\d+)")


@dataclass
class Service:
    """One running API."""

    process: subprocess.Popen[bytes]
    port: int
    home: Path
    log: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def resident_mib(self) -> float:
        """The process's current memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024

    def stored_bytes(self) -> int:
        """Bytes of every file below the home but the database's own."""
        files = (path for path in self.home.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files if "olora.db" not in path.name)


def environment(home: Path, **settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLORA_")}
    return {
        **inherited,
        "OLORA_HOME": str(home),
        "OLORA_API_KEY": KEY,
        "OLORA_DATABASE_URL": f"sqlite:///{home / 'olora.db'}",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        **{f"OLORA_{name.upper()}": value for name, value in settings.items()},
    }


@contextmanager
def service(home: Path, **settings: str) -> Iterator[Service]:
    """A service on a free port until the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    environ = environment(home, **settings)
    migrate(environ["OLORA_DATABASE_URL"])
    log = home / "api.log"
    command = [sys.executable, "-m", "uvicorn", "api.main:create_app", "--factory", "--port", "0"]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environ, stdout=output, stderr=output)
    try:
        yield Service(process, _port(process, log), home, log)
    finally:
        stop(process)


@contextmanager
def worker(home: Path, **settings: str) -> Iterator[subprocess.Popen[bytes]]:
    """A real worker of the service in `home` until the block ends."""
    from worker.launch import worker_command, worker_environment

    environ = environment(home, **settings)
    command = worker_command(read_settings(home=home, **settings), name="tested")
    with (home / "worker.log").open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=worker_environment(environ, parent=os.getpid()),
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        stop(process)


def stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _port(process: subprocess.Popen[bytes], log: Path) -> int:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if found := _LISTENING.search(log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{log.read_text()}")
