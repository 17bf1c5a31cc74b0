"""Uploads over real sockets: interrupted, too large, without a key, twice at once, in a service that dies."""

import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.rows import chat_file

from .calls import eventually, upload, uploaded
from .serving import KEY, Service, service

MIB = 2**20
HEAD = (
    b'--edge\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
    b'--edge\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
)
TAIL = b"\r\n--edge--\r\n"


def request(headers: str, key: str | None = KEY, path: str = "/v1/files") -> bytes:
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    kind = "Content-Type: multipart/form-data; boundary=edge\r\n"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\n{authorization}{kind}{headers}\r\n\r\n".encode()


def connect(served: Service) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", served.port))
    connection.settimeout(30)
    return connection


def read_answer(connection: socket.socket) -> tuple[int, dict[str, Any]]:
    """Status and body of the next answer."""
    text = b""
    while b"\r\n\r\n" not in text:
        text += connection.recv(65536)
    head, _, body = text.partition(b"\r\n\r\n")
    length = int(re.search(rb"content-length: (\d+)", head)[1])
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body)


@pytest.fixture
def remote(served: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


@pytest.fixture
def nothing_stays(served: Service, remote: httpx.Client) -> Iterator[None]:
    """Whatever the test sends, no file is listed and no byte is stored because of it."""

    def kept() -> tuple[list[str], list[str]]:
        listed = [file["id"] for file in remote.get("/v1/files").json()["data"]]
        stored = [path.name for path in (served.home / "storage").rglob("*") if path.is_file()]
        return listed, sorted(stored)

    before = kept()
    yield
    eventually(lambda: kept() == before)


def incoming(home: Path) -> list[Path]:
    """Files that are being written."""
    return list((home / "storage" / ".incoming").iterdir())


@pytest.mark.usefixtures("nothing_stays")
def test_an_upload_that_breaks_off_leaves_nothing(served: Service) -> None:
    for headers in ("Content-Length: 3000000", "Transfer-Encoding: chunked"):
        with closing(connect(served)) as connection:
            content = HEAD + chat_file(5000)
            if headers.startswith("Transfer"):
                content = f"{len(content):x}\r\n".encode() + content + b"\r\n"
            connection.sendall(request(headers) + content)
            eventually(lambda: incoming(served.home))


@pytest.mark.usefixtures("nothing_stays")
def test_a_form_that_ends_too_early_is_refused(served: Service) -> None:
    content = HEAD + chat_file()
    with closing(connect(served)) as connection:
        connection.sendall(request(f"Content-Length: {len(content)}") + content)
        status, answer = read_answer(connection)
    assert (status, "is incomplete" in answer["error"]["message"]) == (400, True)


@pytest.mark.usefixtures("nothing_stays")
def test_a_bad_purpose_is_refused_before_the_file_is_sent(served: Service) -> None:
    with closing(connect(served)) as connection:
        connection.sendall(request("Content-Length: 4000000") + HEAD.replace(b"fine-tune", b"fine-tuna"))
        status, answer = read_answer(connection)
    assert (status, answer["error"]["param"]) == (400, "purpose")


@pytest.mark.usefixtures("nothing_stays")
def test_a_large_body_without_a_key_costs_neither_memory_nor_disk(served: Service) -> None:
    """Refused by its headers; what the client still sends is discarded."""
    anonymous = httpx.Client(base_url=served.url, timeout=60)
    anonymous.post("/v1/files", content=b"x" * MIB)
    memory, disk, sent = served.resident_mib(), served.stored_bytes(), 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(300):
            sent += MIB
            yield bytes(MIB)

    form = {"content-type": "multipart/form-data; boundary=edge"}
    for path, headers in (("/v1/files", form), ("/v1/fine_tuning/jobs", {})):
        answer = anonymous.post(path, content=pieces(), headers=headers)
        assert answer.status_code == 401
        assert served.resident_mib() - memory < 24
        assert served.stored_bytes() - disk < 64 * 1024
    anonymous.close()
    assert sent == 600 * MIB


def test_without_a_key_the_answer_comes_before_the_body(served: Service) -> None:
    for key in (None, "wrong"):
        with closing(connect(served)) as connection:
            connection.sendall(request("Content-Length: 300000000", key=key))
            assert read_answer(connection)[0] == 401


@pytest.mark.usefixtures("nothing_stays")
def test_an_announced_size_above_the_limit_is_refused_before_the_body(served: Service) -> None:
    with closing(connect(served)) as connection:
        connection.sendall(request(f"Content-Length: {4 * MIB + 1_000_001}"))
        status, answer = read_answer(connection)
    assert (status, answer["error"]["code"]) == (413, "file_too_large")
    assert "4 MB" in answer["error"]["message"]


@pytest.mark.usefixtures("nothing_stays")
def test_a_size_that_was_not_announced_is_counted(served: Service, remote: httpx.Client) -> None:
    def body(size: int) -> Iterator[bytes]:
        yield HEAD
        for _ in range(size // 65536):
            yield b" " * 65535 + b"\n"
        yield TAIL

    form = {"content-type": "multipart/form-data; boundary=edge"}
    for size in (4 * MIB + 65536, 64 * MIB):
        answer = remote.post("/v1/files", content=body(size), headers=form)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "file_too_large")


def test_the_limit_itself_still_fits(remote: httpx.Client) -> None:
    row = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    whole = row * (4 * MIB // len(row))
    content = whole + b" " * (4 * MIB - len(whole))
    file_id = uploaded(remote, content)
    assert remote.get(f"/v1/files/{file_id}").json()["bytes"] == 4 * MIB
    assert upload(remote, content + b"\n").status_code == 413
    remote.delete(f"/v1/files/{file_id}")


def test_slow_uploads_do_not_keep_others_waiting(served: Service, remote: httpx.Client) -> None:
    """More unfinished uploads than the service has threads."""
    slow = [connect(served) for _ in range(40)]
    try:
        for connection in slow:
            connection.sendall(request("Content-Length: 3000000") + HEAD + b'{"a"')
        begun = time.monotonic()
        for _ in range(10):
            assert remote.get("/v1/files?limit=1").status_code == 200
        assert time.monotonic() - begun < 5
    finally:
        for connection in slow:
            connection.close()


def test_two_tries_of_one_upload_in_flight_are_one_file(served: Service, remote: httpx.Client) -> None:
    content = chat_file(321)

    def send(retry: int) -> str:
        headers = {"authorization": f"Bearer {KEY}", "x-stainless-retry-count": str(retry)}
        headers["idempotency-key"] = "one"
        with httpx.Client(base_url=served.url, headers=headers, timeout=30) as client:
            return uploaded(client, content)

    with ThreadPoolExecutor(8) as pool:
        ids = set(pool.map(send, range(8)))
    assert len(ids) == 1
    listed = [file["id"] for file in remote.get("/v1/files").json()["data"] if file["bytes"] == len(content)]
    assert listed == list(ids)


def test_a_service_killed_in_the_middle_of_an_upload_keeps_nothing_of_it(tmp_path: Path) -> None:
    home = tmp_path / "own"
    with service(home) as running:
        with closing(connect(running)) as connection:
            connection.sendall(request("Content-Length: 3000000") + HEAD + chat_file(20000))
            eventually(lambda: incoming(home))
            os.kill(running.process.pid, signal.SIGKILL)
            running.process.wait()
    assert incoming(home)
    with service(home) as running:
        assert not [path for path in (home / "storage").rglob("*") if path.is_file()]
        answer = httpx.get(f"{running.url}/v1/files", headers={"authorization": f"Bearer {KEY}"})
        assert answer.json()["data"] == []


def test_many_uploads_at_once_are_all_kept_whole(served: Service, remote: httpx.Client) -> None:
    contents = [chat_file(100 + number) for number in range(24)]
    failures: list[str] = []

    def send(content: bytes) -> None:
        with httpx.Client(base_url=served.url, headers=remote.headers, timeout=30) as client:
            file_id = uploaded(client, content)
            if client.get(f"/v1/files/{file_id}/content").content != content:
                failures.append(file_id)

    threads = [threading.Thread(target=send, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    sizes = [file["bytes"] for file in remote.get("/v1/files").json()["data"]]
    assert set(map(len, contents)) <= set(sizes)
