"""Bodies that arrive as gzip are read like others, within the same limits."""

import gzip
import json
import tracemalloc
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.rows import chat_file

from .calls import uploaded

GZIP = {"content-encoding": "gzip", "content-type": "application/json"}


def post(client: TestClient, body: bytes, **headers: str) -> Any:
    return client.post("/v1/fine_tuning/jobs", content=body, headers=GZIP | headers)


def job_body(client: TestClient) -> bytes:
    return json.dumps({"model": "olora-tiny", "training_file": uploaded(client)}).encode()


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip"])
def test_a_gzip_body_is_read(client: TestClient, encoding: str) -> None:
    body = job_body(client)
    answer = post(client, gzip.compress(body), **{"content-encoding": encoding})
    assert (answer.status_code, answer.json()["model"]) == (200, "olora-tiny")


def test_concatenated_gzip_files_are_one_body(client: TestClient) -> None:
    body = job_body(client)
    assert post(client, gzip.compress(body[:20]) + gzip.compress(body[20:])).status_code == 200


def test_an_upload_may_be_gzip_too(client: TestClient) -> None:
    content = chat_file()
    plain = client.build_request(
        "POST", "/v1/files", data={"purpose": "fine-tune"}, files={"file": ("a.jsonl", content)}
    )
    headers = {"content-type": plain.headers["content-type"], "content-encoding": "gzip"}
    answer = client.post("/v1/files", content=gzip.compress(plain.read()), headers=headers)
    assert (answer.status_code, answer.json()["bytes"]) == (200, len(content))
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == content


@pytest.mark.parametrize(
    ("body", "encoding", "message"),
    [
        (b"{}", "gzip", "The body is not gzip"),
        (gzip.compress(b'{"model": "olora-tiny"}' * 50)[:-9], "gzip", "The gzip body ends too early"),
        (b"", "gzip", "The gzip body ends too early"),
        (gzip.compress(b"{}")[:-8] + b"\0" * 8, "gzip", "The body is not gzip"),
        (b"{}", "br", "content-encoding 'br' is not supported"),
        (b"{}", "gzip, gzip", "content-encoding 'gzip, gzip' is not supported"),
    ],
    ids=["plain", "cut off", "empty", "wrong checksum", "br", "twice"],
)
def test_what_cannot_be_unpacked_is_refused(
    client: TestClient, body: bytes, encoding: str, message: str
) -> None:
    answer = post(client, body, **{"content-encoding": encoding})
    assert answer.status_code == 400, answer.text
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/v1/fine_tuning/jobs", "/v1/files"])
def test_a_body_that_grows_beyond_the_limit_is_refused_while_it_is_unpacked(
    client: TestClient, path: str
) -> None:
    bomb = gzip.compress(b"\0" * 2**28)  # a thousandth of that
    content_type = "multipart/form-data; boundary=x"
    tracemalloc.start()
    try:
        head = gzip.compress(
            b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
            b'--x\r\ncontent-disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n'
        )
        answer = client.post(path, content=head + bomb, headers=GZIP | {"content-type": content_type})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert answer.status_code == 413
    assert peak < 2**26


def test_without_a_key_nothing_is_unpacked(client: TestClient) -> None:
    answer = post(client, b"no gzip", authorization="Bearer wrong")
    assert answer.status_code == 401
