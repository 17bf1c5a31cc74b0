"""Following a job over a real socket: a stream that ends with the job and that a client can resume."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from starlette.testclient import TestClient

from api.routes import events as streaming
from store.settings import Settings, read_settings

from .calls import Attempt, created, finished, settled
from .serving import KEY, Service, service


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with service(tmp_path_factory.mktemp("events")) as running:
        yield running


@pytest.fixture
def remote(served: Service) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=served.url, headers=headers, timeout=30) as client:
        yield client


def settings_of(served: Service) -> Settings:
    return read_settings(home=served.home, database_url=f"sqlite:///{served.home / 'olora.db'}")


def messages(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """Server-sent events, field by field."""
    message: dict[str, str] = {}
    for line in lines:
        if not line and message:
            yield message
            message = {}
        elif line.startswith(":"):
            message["comment"] = line[1:].strip()
        elif line:
            name, _, value = line.partition(": ")
            message[name] = value


def follow(remote: httpx.Client, job_id: str, query: str = "", **headers: str) -> list[dict[str, str]]:
    url = f"/v1/fine_tuning/jobs/{job_id}/events?stream=true{query}"
    with remote.stream("GET", url, headers=headers) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/event-stream")
        return list(messages(answer.iter_lines()))


def test_a_stream_tells_all_oldest_first_and_ends_with_the_job(remote: httpx.Client, served: Service) -> None:
    made = settled(remote, created(remote)["id"])
    heard: list[dict[str, str]] = []
    listener = threading.Thread(target=lambda: heard.extend(follow(remote, made["id"])))
    listener.start()
    attempt = Attempt(settings_of(served))
    attempt.train()
    time.sleep(2 * streaming.POLL_SECONDS)
    assert listener.is_alive()
    attempt.succeed()
    attempt.close()
    listener.join(15)
    assert not listener.is_alive()
    listed = remote.get(f"/v1/fine_tuning/jobs/{made['id']}/events?limit=100").json()["data"][::-1]
    assert [json.loads(message["data"]) for message in heard[:-1]] == listed
    assert [message["id"] for message in heard[:-1]] == [event["id"] for event in listed]
    assert [message["event"] for message in heard[:-1]] == [event["type"] for event in listed]
    assert heard[-1] == {"event": "done", "data": f'{{"id":"{made["id"]}","status":"succeeded"}}'}


def test_a_listener_that_comes_back_hears_what_it_missed(remote: httpx.Client, served: Service) -> None:
    done = finished(remote, settings_of(served))
    whole = follow(remote, done["id"])
    fourth = whole[3]["id"]
    assert follow(remote, done["id"], **{"Last-Event-ID": fourth}) == whole[4:]
    assert follow(remote, done["id"], f"&after={fourth}") == whole[4:]
    last = whole[-2]["id"]
    assert follow(remote, done["id"], **{"Last-Event-ID": last}) == whole[-1:]


def test_a_stream_of_a_job_that_is_not_there_is_a_404(remote: httpx.Client) -> None:
    answer = remote.get("/v1/fine_tuning/jobs/ftjob-none/events?stream=true")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_many_listeners_hold_neither_threads_nor_connections(remote: httpx.Client, served: Service) -> None:
    made = settled(remote, created(remote)["id"])
    request = f"GET /v1/fine_tuning/jobs/{made['id']}/events?stream=true HTTP/1.1\r\nHost: x\r\n"
    request += f"Authorization: Bearer {KEY}\r\n\r\n"
    listeners = [socket.create_connection(("127.0.0.1", served.port)) for _ in range(40)]
    try:
        for listener in listeners:
            listener.sendall(request.encode())
        for listener in listeners:
            assert b"200 OK" in listener.recv(4096)
        begun = time.monotonic()
        for _ in range(20):
            assert remote.get("/v1/fine_tuning/jobs?limit=1").status_code == 200
        assert time.monotonic() - begun < 10
        remote.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
        for listener in listeners:
            listener.settimeout(15)
            heard = b""
            while b"event: done" not in heard:
                heard += listener.recv(4096)
            assert b'"status":"cancelled"' in heard
    finally:
        for listener in listeners:
            listener.close()


def test_between_two_looks_no_connection_is_held(client: TestClient) -> None:
    made = settled(client, created(client)["id"])
    services = client.app.state.services
    done = threading.Event()

    def listen() -> None:
        client.get(f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true")
        done.set()

    threading.Thread(target=listen).start()
    held = []
    for _ in range(100):
        held.append(services.engine.pool.checkedout())
        time.sleep(0.01)
    assert held.count(0) > 80
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    assert done.wait(15)


def test_a_quiet_stream_shows_that_it_lives(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HEARTBEAT_SECONDS", 0.5)
    made = settled(client, created(client)["id"])
    heard: list[str] = []

    def listen() -> None:
        heard.append(client.get(f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true").text)

    listener = threading.Thread(target=listen)
    listener.start()
    time.sleep(2)
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    listener.join(15)
    assert heard[0].count(": still here\n\n") >= 2
    assert heard[0].rstrip().endswith('"status":"cancelled"}')


def test_a_listener_does_not_keep_the_service_from_stopping(tmp_path: Path) -> None:
    with service(tmp_path / "own") as running:
        headers = {"authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=running.url, headers=headers, timeout=30) as remote:
            made = settled(remote, created(remote)["id"])
            with remote.stream("GET", f"/v1/fine_tuning/jobs/{made['id']}/events?stream=true") as answer:
                heard = messages(answer.iter_lines())
                next(heard)
                running.process.terminate()
                rest = list(heard)
                assert running.process.wait(10) in (0, -15)
            assert "done" not in [message["event"] for message in rest], "the job has not ended"
