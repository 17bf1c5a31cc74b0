"""Runs `olora` commands, and a service as a process, with their own home and port."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from cli import main
from store.settings import get_settings

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = ROOT / "examples" / "base"
ROWS = ROOT / "examples" / "docstrings" / "train.jsonl"
_SERVES = re.compile(r"serves at http://127\.0\.0\.1:(\d+)/v1")


def environment(home: Path, **settings: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLORA_")}
    given = {f"OLORA_{name.upper()}": value for name, value in settings.items()}
    return {**inherited, "OLORA_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "200", **given}


def olora(home: Path, *arguments: str | Path, **settings: str) -> "subprocess.CompletedProcess[str]":
    """A command in this process, which has imported torch already: its exit code and what it printed."""
    words = ["olora", *map(str, arguments)]
    with (
        mock.patch.dict(os.environ, environment(home, **settings), clear=True),
        mock.patch.object(sys, "argv", words),
        open(os.devnull) as nothing,
        mock.patch.object(sys, "stdin", nothing),
        contextlib.chdir(ROOT),
        _captured("stdout", 1) as out,
        _captured("stderr", 2) as err,
    ):
        get_settings.cache_clear()
        code: object = 0
        try:
            main.main()
        except SystemExit as exit:
            code = exit.code or 0
        finally:
            get_settings.cache_clear()
        return subprocess.CompletedProcess(words, code, out(), err())  # type: ignore[arg-type]


@contextmanager
def _captured(name: str, number: int) -> Iterator[Callable[[], str]]:
    """Reads what is written to a standard stream, by this process and by those that it starts."""
    getattr(sys, name).flush()
    before = os.dup(number)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as file:
        os.dup2(file.fileno(), number)
        try:
            with (
                open(number, "w", encoding="utf-8", buffering=1, closefd=False) as stream,
                mock.patch.object(sys, name, stream),
            ):

                def read() -> str:
                    stream.flush()
                    file.seek(0)
                    return file.read()

                yield read
        finally:
            os.dup2(before, number)
            os.close(before)


def olora_process(
    home: Path, *arguments: str | Path, timeout: float = 120, **settings: str
) -> "subprocess.CompletedProcess[str]":
    """A command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cli.main", *map(str, arguments)],
        cwd=ROOT,
        env=environment(home, **settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@dataclass
class Serving:
    """A running `olora serve`."""

    process: "subprocess.Popen[bytes]"
    home: Path
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def run(self, *arguments: str | Path) -> "subprocess.CompletedProcess[str]":
        return olora(self.home, *arguments, port=str(self.port))


@contextmanager
def serving(home: Path, *options: str, **settings: str) -> Iterator[Serving]:
    """`olora serve` on a free port until the block ends; it must then exit with code 0."""
    home.mkdir(parents=True, exist_ok=True)
    log = home / "serve.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "serve", "--port", "0", *options],
            cwd=ROOT,
            env=environment(home, **settings),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        yield Serving(process, home, log, _port(process, log))
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0, log.read_text()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _port(process: "subprocess.Popen[bytes]", log: Path) -> int:
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        if found := _SERVES.search(log.read_text()):
            return int(found[1])
        time.sleep(0.05)
    raise AssertionError(f"the service did not start:\n{log.read_text()}")


def descendants(pid: int) -> dict[int, str]:
    """The process's descendants, with their command lines."""
    found: dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and _parent(folder) in {pid, *found}:
            found[int(folder.name)] = _command(folder)
    return found


def _parent(folder: Path) -> int:
    try:
        return int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def _command(folder: Path) -> str:
    try:
        return folder.joinpath("cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def lives(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(happens: Callable[[], object], seconds: float = 60, what: str = "it") -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if happens():
            return
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {seconds:g} s")
