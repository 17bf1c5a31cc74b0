"""Files: uploads can be downloaded under their names and listed in pages until they are deleted."""

import base64
import io
import json
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet
from starlette.testclient import TestClient

from store.settings import Settings
from tests.rows import chat_file, chat_row, jsonl

from .calls import (
    created,
    eventually,
    finished,
    job,
    settled,
    upload,
    uploaded,
)
from .serving import KEY

BOTH_DATABASES = pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)


@BOTH_DATABASES
def test_an_upload_answers_with_openais_file_object(client: TestClient) -> None:
    file = upload(client, chat_file()).json()
    assert file.pop("id").startswith("file-")
    assert isinstance(file.pop("created_at"), int)
    assert file.pop("olora")["report"]["rows"] == 12
    assert file == {
        "object": "file",
        "bytes": len(chat_file()),
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "status": "processed",
        "status_details": None,
        "expires_at": None,
    }


def test_what_went_up_comes_back_byte_for_byte(client: TestClient) -> None:
    content = "\ufeff".encode() + chat_file().replace(b"\n", b"\r\n") + b"\r\n\n"
    file_id = uploaded(client, content)
    answer = client.get(f"/v1/files/{file_id}/content", headers={"accept": "application/binary"})
    assert answer.content == content
    assert answer.headers["content-type"] == "application/jsonl"
    assert answer.headers["content-length"] == str(len(content))
    assert answer.headers["content-disposition"] == "attachment; filename*=UTF-8''train.jsonl"


def test_a_file_without_problems_of_structure_is_kept_with_its_problems_of_content(
    client: TestClient,
) -> None:
    """OpenAI accepts such a file and fails the job later; here the answer says so at once."""
    file = upload(client, jsonl(chat_row(), {"messages": [{"role": "user", "content": "?"}]})).json()
    report = file["olora"]["report"]
    assert file["status"] == "processed"
    assert report["error_count"] == 1
    assert (report["errors"][0]["line"], report["errors"][0]["code"]) == (
        2,
        "example_missing_assistant_message",
    )
    assert client.get(f"/v1/files/{file['id']}").json() == file


@BOTH_DATABASES
def test_odd_characters_in_a_file_keep_no_job_waiting(client: TestClient) -> None:
    """A NUL in a key is quoted in the report, and would be in the events of the job."""
    odd = {**chat_row(), "extra\x00key": 1}
    odd["messages"] = [*odd["messages"], {"role": "assistant", "content": "x", "a\x00b": 2}]
    made = created(client, training_file=uploaded(client, jsonl(*[odd] * 12)))
    ended = settled(client, made["id"])
    assert ended["status"] == "failed"
    assert "is not a key of a message" in ended["error"]["message"]


def in_parquet(rows: list[dict[str, Any]]) -> bytes:
    made = io.BytesIO()
    parquet.write_table(pa.Table.from_pylist(rows), made, row_group_size=5)
    return made.getvalue()


PAIRS = [{"prompt": f"{n} is", "completion": f"number {n}"} for n in range(12)]
CONTAINERS = {
    "jsonl": jsonl(*PAIRS),
    "json": json.dumps(PAIRS, indent=1).encode(),
    "csv": b"prompt,completion\n" + b"".join(b"%d is,number %d\n" % (n, n) for n in range(12)),
    "parquet": in_parquet(PAIRS),
}
DETECTED = {
    "jsonl": "read as JSONL",
    "json": "read as a JSON array",
    "csv": "read as CSV, columns prompt, completion",
    "parquet": "read as Parquet, columns prompt, completion",
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_file_is_taken_by_its_content_whatever_its_name(client: TestClient, container: str) -> None:
    file = upload(client, CONTAINERS[container]).json()
    report = file["olora"]["report"]
    assert (report["format"], report["container"], report["rows"]) == ("completion", container, 12)
    assert (report["error_count"], report["warning_count"]) == (0, 0)
    assert report["detected"] == DETECTED[container]
    assert client.get(f"/v1/files/{file['id']}/content").content == CONTAINERS[container]
    job = settled(client, created(client, training_file=file["id"])["id"])
    assert job["status"] == "queued"


def test_what_is_wrong_with_a_table_is_told_by_row(client: TestClient) -> None:
    rows = [*PAIRS[:3], PAIRS[0], {"prompt": "q", "completion": ""}]
    report = upload(client, in_parquet(rows)).json()["olora"]["report"]
    (error,), (warning,) = report["errors"], report["warnings"]
    assert (error["line"], error["path"]) == (5, "$.completion")
    assert error["message"].startswith("Row 5, $.completion: ")
    assert (warning["line"], warning["code"]) == (4, "duplicate")


def test_a_list_counts_findings_and_does_not_show_them(client: TestClient) -> None:
    file_id = uploaded(client, jsonl(chat_row(), {"messages": []}))
    (listed,) = client.get("/v1/files").json()["data"]
    counts = {"format": "chat", "rows": 2, "error_count": 1, "warning_count": 0, "note_count": 0}
    assert listed["olora"]["report"] == counts
    assert len(client.get(f"/v1/files/{file_id}").json()["olora"]["report"]["errors"]) == 1


def test_files_of_other_purposes_are_kept_as_they_are(client: TestClient) -> None:
    for purpose in ("assistants", "batch", "vision", "user_data", "evals"):
        file = upload(client, b"\x89PNG\x00\xff", purpose=purpose).json()
        assert (file["purpose"], file["olora"]["report"]) == (purpose, None)
        assert client.get(f"/v1/files/{file['id']}/content").content == b"\x89PNG\x00\xff"


NAMES = (
    ("upload", "upload"),
    ("noext", "noext"),
    ("../../etc/passwd", "passwd"),
    ("C:\\data\\train.jsonl", "train.jsonl"),
    ("übung 1.jsonl", "übung 1.jsonl"),
    ("a\u202eb.jsonl", "ab.jsonl"),
    ("x" * 300, "x" * 255),
)


@pytest.mark.parametrize(("sent", "kept"), NAMES)
def test_a_name_is_shown_and_never_a_path(
    sent: str, kept: str, client: TestClient, settings: Settings
) -> None:
    answer = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": (sent, chat_file())})
    assert answer.json()["filename"] == kept
    stored = [path for path in settings.storage_folder.rglob("*") if path.is_file()]
    assert [path.name for path in stored] == [answer.json()["id"]]
    assert client.get(f"/v1/files/{answer.json()['id']}/content").content == chat_file()


def multipart(*parts: tuple[str, str, bytes], end: bytes = b"--edge--\r\n") -> dict[str, Any]:
    """A form by hand: (name, further header text, content)."""
    body = b"".join(
        f'--edge\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + content + b"\r\n"
        for name, more, content in parts
    )
    return {"content": body + end, "headers": {"content-type": "multipart/form-data; boundary=edge"}}


PURPOSE = ("purpose", "", b"fine-tune")
FILE = ("file", '; filename="a.jsonl"', chat_file())


def test_fields_may_come_in_any_order_and_a_file_without_a_name(client: TestClient) -> None:
    for parts in ((PURPOSE, FILE), (FILE, PURPOSE), (PURPOSE, ("file", "", chat_file()))):
        answer = client.post("/v1/files", **multipart(*parts))
        assert answer.status_code == 200, answer.text
        assert client.get(f"/v1/files/{answer.json()['id']}/content").content == chat_file()


BROKEN_FORMS = (
    (multipart(PURPOSE, FILE, end=b""), "is incomplete"),
    (multipart(PURPOSE, FILE, end=b"--edge"), "is incomplete"),
    ({**multipart(PURPOSE, FILE), "content": b"nothing of that kind"}, "multipart body cannot be read"),
    ({**multipart(PURPOSE, FILE), "content": b""}, "is incomplete"),
    (multipart(PURPOSE, *[("purpose", "", b"fine-tune")]), "given twice"),
    (multipart(*[("purpose", "", b"fine-tune")] * 30), "more than 20 parts"),
    ({**multipart(PURPOSE), "headers": {"content-type": "multipart/form-data"}}, "with a boundary"),
    (
        {**multipart(PURPOSE), "headers": {"content-type": "multipart/form-data; boundary=" + "x" * 500}},
        "boundary",
    ),
    (
        {"content": b"--edge\r\nX-Odd: 1\r\n\r\n1\r\n--edge--\r\n", "headers": multipart()["headers"]},
        "has no name",
    ),
)


@pytest.mark.parametrize(("request_", "says"), BROKEN_FORMS)
def test_a_broken_form_is_refused_and_leaves_nothing(
    request_: dict[str, Any], says: str, client: TestClient, settings: Settings
) -> None:
    answer = client.post("/v1/files", **request_)
    assert answer.status_code == 400
    assert says.lower() in answer.json()["error"]["message"].lower()
    assert client.get("/v1/files").json()["data"] == []
    assert not [path for path in settings.storage_folder.rglob("*") if path.is_file()]


@BOTH_DATABASES
def test_pages_are_stable_while_files_come_and_go(client: TestClient) -> None:
    ids = [uploaded(client) for _ in range(7)]
    first = client.get("/v1/files?limit=3").json()
    assert [file["id"] for file in first["data"]] == ids[:3:-1]
    assert (first["has_more"], first["first_id"], first["last_id"]) == (True, ids[6], ids[4])
    newest = uploaded(client)
    client.delete(f"/v1/files/{ids[4]}")
    second = client.get(f"/v1/files?limit=3&after={ids[4]}").json()
    assert [file["id"] for file in second["data"]] == [ids[3], ids[2], ids[1]]
    third = client.get(f"/v1/files?limit=3&after={ids[1]}").json()
    assert ([file["id"] for file in third["data"]], third["has_more"]) == ([ids[0]], False)
    rising = client.get("/v1/files?order=asc").json()["data"]
    assert [file["id"] for file in rising] == [*ids[:4], *ids[5:], newest]


def test_a_list_may_be_of_one_purpose(client: TestClient) -> None:
    training, batch = uploaded(client), uploaded(client, purpose="batch")
    for purpose, ids in (("fine-tune", [training]), ("batch", [batch]), ("vision", [])):
        assert [file["id"] for file in client.get(f"/v1/files?purpose={purpose}").json()["data"]] == ids


def test_an_expiry_is_kept(client: TestClient) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "2592000"}
    file = upload(client, **fields).json()
    assert file["expires_at"] - file["created_at"] in (2_592_000, 2_592_001)


@BOTH_DATABASES
def test_a_deleted_file_is_gone_and_so_are_its_bytes(client: TestClient, settings: Settings) -> None:
    file_id = uploaded(client)
    answer = client.delete(f"/v1/files/{file_id}", headers={"content-type": "application/json"})
    assert answer.json() == {"id": file_id, "object": "file", "deleted": True}
    for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
        gone = client.request(method, f"/v1/files/{file_id}{path}")
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "not_found")
        assert file_id in gone.json()["error"]["message"]
    eventually(lambda: not [path for path in settings.storage_folder.rglob("*") if path.is_file()])


def test_a_file_that_a_waiting_job_needs_stays(client: TestClient) -> None:
    made = created(client)
    refused = client.delete(f"/v1/files/{made['training_file']}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_in_use")
    assert made["id"] in refused.json()["error"]["message"]
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    assert client.delete(f"/v1/files/{made['training_file']}").json()["deleted"] is True
    assert job(client, made["id"])["training_file"] == made["training_file"]


def test_a_result_may_be_had_in_base64(client: TestClient, settings: Settings) -> None:
    table = finished(client, settings)["result_files"][0]
    plain = client.get(f"/v1/files/{table}/content")
    assert plain.headers["content-type"] == "text/csv; charset=utf-8"
    encoded = client.get(f"/v1/files/{table}/content?encoding=base64")
    assert base64.b64decode(encoded.content, validate=True) == plain.content
    assert encoded.headers["content-length"] == str(len(encoded.content))
    assert client.get(f"/v1/files/{table}/content?encoding=rot13").json()["error"]["param"] == "encoding"


def test_a_large_file_joins_in_base64_without_seams(client: TestClient) -> None:
    content = bytes(range(256)) * 4000 + b"xy"
    file_id = uploaded(client, content, purpose="user_data")
    encoded = client.get(f"/v1/files/{file_id}/content?encoding=base64")
    assert base64.b64decode(encoded.content, validate=True) == content
    assert encoded.headers["content-length"] == str(len(encoded.content))


# --- once ------------------------------------------------------------------------------------------------

RETRY = {"x-stainless-retry-count": "1"}


def send(client: TestClient, headers: dict[str, str], content: bytes = b"", name: str = "a.jsonl") -> Any:
    files = {"file": (name, content or chat_file())}
    return client.post("/v1/files", data={"purpose": "fine-tune"}, files=files, headers=headers)


@BOTH_DATABASES
def test_a_retried_upload_is_one_file_though_its_boundary_differs(
    client: TestClient, settings: Settings
) -> None:
    first, again = send(client, {}).json(), send(client, RETRY).json()
    assert again == first
    assert send(client, {}).json()["id"] != first["id"], "what is sent twice on purpose is two files"
    assert send(client, RETRY, chat_file(13)).json()["id"] != first["id"]
    assert send(client, RETRY, name="b.jsonl").json()["id"] != first["id"]
    stored = {path.name for path in settings.storage_folder.rglob("*") if path.is_file()}
    assert stored == {file["id"] for file in client.get("/v1/files").json()["data"]}


def test_an_idempotency_key_stands_for_one_upload(client: TestClient) -> None:
    key = {"idempotency-key": "a-key"}
    first = send(client, key).json()
    assert send(client, key).json() == first
    other = send(client, key, chat_file(13))
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    assert [file["id"] for file in client.get("/v1/files").json()["data"]] == [first["id"]]


def test_a_refused_upload_may_be_corrected_under_the_same_key(client: TestClient) -> None:
    key = {"idempotency-key": "a-key"}
    assert send(client, key, b"no").status_code == 400
    assert send(client, key).status_code == 200


def test_another_project_retries_for_itself(client: TestClient, stranger: TestClient) -> None:
    key = {"idempotency-key": "a-key", **RETRY}
    assert send(client, key).json()["id"] != send(stranger, key).json()["id"]
    assert KEY not in str(stranger.headers)
