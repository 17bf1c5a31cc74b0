"""PostgreSQL and Redis for the tests: named by a variable, or started from installed programs."""

import contextlib
import ctypes
import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PR_SET_PDEATHSIG = 1


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def unavailable(sentence: str) -> None:
    """Skips the test, or fails it where services are a must (OLORA_REQUIRE_SERVICES=1)."""
    if os.environ.get("OLORA_REQUIRE_SERVICES") == "1":
        pytest.fail(sentence)
    pytest.skip(sentence)


def process_context() -> Any:
    """Processes that are forked from one that has imported what they need, and has nothing else."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pytest", "store.dispatch", "tests.store.making", "psycopg"])
    return context


def die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@contextlib.contextmanager
def running(
    command: list[str], user: str | None = None, end_with: signal.Signals = signal.SIGINT
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that ends with the block, or with this process."""
    account = pwd.getpwnam(user) if user else None
    process = subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd="/",
        user=account.pw_uid if account else None,
        group=account.pw_gid if account else None,
        extra_groups=[] if account else None,
        start_new_session=True,
        preexec_fn=die_with_parent,
    )
    try:
        yield process
    finally:
        process.send_signal(end_with)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until(ready: Callable[[], object], what: str, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            pytest.fail(f"{what} did not happen within {seconds:g} s.")
        time.sleep(0.05)


def _unprivileged_user() -> str | None:
    """PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in names else "nobody"


def _postgres_program(name: str) -> str | None:
    installed = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(installed[0]) if installed else None)


@contextlib.contextmanager
def postgres_server() -> Iterator[str]:
    """The URL of a private PostgreSQL that forgets everything."""
    initdb, postgres = _postgres_program("initdb"), _postgres_program("postgres")
    if initdb is None or postgres is None:
        unavailable("No PostgreSQL: install it, or name one with OLORA_TEST_POSTGRES_URL.")
    assert initdb
    assert postgres
    user = _unprivileged_user()
    with tempfile.TemporaryDirectory(prefix="olora-pg-", ignore_cleanup_errors=True) as folder:
        if user:
            shutil.chown(folder, user)
        data, port = f"{folder}/data", free_port()
        options = ["-A", "trust", "-U", "olora", "-E", "UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        with running([initdb, "-D", data, *options], user) as init:
            if init.wait(60):
                unavailable("PostgreSQL's initdb failed; name a server with OLORA_TEST_POSTGRES_URL.")
        fast = ["fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200"]
        settings = [part for setting in fast for part in ("-c", setting)]
        command = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, *settings]
        with running(command, user, signal.SIGQUIT):  # at once: nothing is worth saving
            url = f"postgresql+psycopg://olora@127.0.0.1:{port}/postgres"
            wait_until(lambda: postgres_answers(url), "The start of PostgreSQL")
            yield url


def postgres_answers(url: str) -> bool:
    import psycopg

    try:
        psycopg.connect(url.replace("+psycopg", ""), connect_timeout=2).close()
    except psycopg.OperationalError:
        return False
    return True


@contextlib.contextmanager
def redis_server(port: int | None = None) -> Iterator[str]:
    """The URL of a private Redis that forgets everything."""
    program = shutil.which("redis-server")
    if program is None:
        unavailable("No Redis: install redis-server, or name one with OLORA_TEST_REDIS_URL.")
    assert program
    port = port or free_port()
    command = [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    with running(command):
        url = f"redis://127.0.0.1:{port}/0"
        wait_until(lambda: redis_answers(url), "The start of Redis")
        yield url


def redis_answers(url: str) -> bool:
    import redis

    with redis.Redis.from_url(url, socket_timeout=2) as client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False
