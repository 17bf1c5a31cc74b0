"""Checkpoints that are models, and jobs that train on: the answers, and the errors."""

import io
import json
import zipfile
from typing import Any

import pytest
from starlette.testclient import TestClient

from olora_core.errors import TrainingError
from store import endings
from store.settings import Settings

from .calls import (
    Attempt,
    create,
    created,
    finished,
    job,
    settled,
    upload,
    uploaded,
    zipped,
)

BOTH_DATABASES = pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)
PEFT = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "olora-tiny", "r": 8}).encode()


def checkpoint_of(client: TestClient, job_id: str) -> dict[str, Any]:
    (found,) = client.get(f"/v1/fine_tuning/jobs/{job_id}/checkpoints").json()["data"]
    return dict(found)


def adapter_url(job_id: str, checkpoint_id: str) -> str:
    return f"/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/adapter"


def peft_zip(**files: bytes) -> bytes:
    return zipped(**{"adapter_config.json": PEFT, "adapter_model.safetensors": b"weights", **files})


@BOTH_DATABASES
def test_a_checkpoints_adapter_is_exported_when_it_is_first_asked_for(
    client: TestClient, settings: Settings
) -> None:
    done = finished(client, settings)
    found = checkpoint_of(client, done["id"])
    name = f"{done['fine_tuned_model']}:ckpt-step-3"
    assert found["fine_tuned_model_checkpoint"] == name
    assert (found["olora"]["is_model"], found["olora"]["status"]) == (True, "available")
    url = adapter_url(done["id"], found["id"])
    for _ in range(2):
        waiting = client.get(url)
        assert (waiting.status_code, waiting.json()["error"]["code"]) == (503, "exporting")
        assert int(waiting.headers["retry-after"]) > 0
    assert checkpoint_of(client, done["id"])["olora"]["status"] == "exporting"
    assert [listed["id"] for listed in client.get("/v1/fine_tuning/jobs").json()["data"]] == [done["id"]]
    attempt = Attempt(settings)
    assert attempt.claim.kind.name == "export"
    assert client.get(f"/v1/fine_tuning/jobs/{attempt.claim.job_id}").status_code == 404
    attempt.export(b"the adapter")
    attempt.close()
    ready = client.get(url)
    assert (ready.status_code, ready.content) == (200, b"the adapter")
    assert client.get(url, headers={"if-none-match": ready.headers["etag"]}).status_code == 304
    found = checkpoint_of(client, done["id"])
    assert (found["olora"]["status"], found["olora"]["certificate"]) == ("ready", {"passed": True})
    kept = client.delete(f"/v1/files/{found['olora']['adapter']}").json()["error"]
    assert (kept["code"], name in kept["message"]) == ("file_in_use", True)


def test_an_export_that_failed_says_why_and_can_be_tried_again(
    client: TestClient, settings: Settings
) -> None:
    done = finished(client, settings)
    url = adapter_url(done["id"], checkpoint_of(client, done["id"])["id"])
    client.get(url)
    attempt = Attempt(settings)
    with attempt.sessions.begin() as session:
        endings.fail(session, attempt.claim, TrainingError("Its base is gone."))
    attempt.close()
    failed = client.get(url)
    assert failed.status_code == 400
    assert "could not be exported: Its base is gone." in failed.json()["error"]["message"]
    assert checkpoint_of(client, done["id"])["olora"]["problem"] == "Its base is gone."
    assert client.get(f"{url}?retry=true").status_code == 503


@BOTH_DATABASES
def test_a_checkpoint_is_a_model_until_it_is_deleted(
    client: TestClient, settings: Settings, stranger: TestClient
) -> None:
    done = finished(client, settings)
    found = checkpoint_of(client, done["id"])
    name = found["fine_tuned_model_checkpoint"]
    listed = {model["id"]: model for model in client.get("/v1/models").json()["data"]}
    assert listed[name]["owned_by"] == "olora"
    assert listed[name]["olora"] == {"job": done["id"], "checkpoint": found["id"], "status": "available"}
    assert client.get(f"/v1/models/{name}").json() == listed[name]
    assert stranger.get(f"/v1/models/{name}").status_code == 404
    assert stranger.delete(f"/v1/models/{name}").status_code == 404
    assert name not in {model["id"] for model in stranger.get("/v1/models").json()["data"]}
    assert client.delete(f"/v1/models/{name}").json()["deleted"] is True
    assert client.get(f"/v1/models/{name}").status_code == 404
    assert client.get(f"/v1/models/{done['fine_tuned_model']}").status_code == 200
    assert client.get(f"/v1/fine_tuning/jobs/{done['id']}/checkpoints").json()["data"] == []


def test_checkpoints_go_with_their_model(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings)
    name = checkpoint_of(client, done["id"])["fine_tuned_model_checkpoint"]
    client.delete(f"/v1/models/{done['fine_tuned_model']}")
    assert client.get(f"/v1/models/{name}").status_code == 404


def test_a_job_trains_on_from_a_model_and_from_a_checkpoint(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings, adapter={"method": "lora", "rank": 4}, suffix="first")
    name = done["fine_tuned_model"]
    made = settled(client, created(client, model=name, suffix="second")["id"])
    assert (made["model"], made["olora"]["base"], made["olora"]["former"]) == (name, "olora-tiny", name)
    assert (made["adapter"]["method"], made["adapter"]["rank"]) == ("lora", 4)
    kept = client.delete(f"/v1/models/{name}").json()["error"]
    assert (kept["code"], made["id"] in kept["message"]) == ("file_in_use", True)
    attempt = Attempt(settings)
    attempt.train()
    attempt.succeed()
    attempt.close()
    ended = job(client, made["id"])
    assert ended["fine_tuned_model"] == f"ft:olora-tiny:olora:second:{made['id'][-8:]}"

    checkpoint = checkpoint_of(client, done["id"])["fine_tuned_model_checkpoint"]
    other = created(client, model=checkpoint, adapter={"method": "olora"})
    assert (other["olora"]["former"], other["adapter"]["rank"]) == (checkpoint, 8)
    kept = client.delete(f"/v1/models/{checkpoint}").json()["error"]
    assert kept["code"] == "file_in_use"
    client.post(f"/v1/fine_tuning/jobs/{other['id']}/cancel")
    assert client.delete(f"/v1/models/{checkpoint}").json()["deleted"] is True


def test_an_uploaded_adapter_is_trained_on(client: TestClient) -> None:
    file_id = uploaded(client, peft_zip(), purpose="fine-tune-adapter")
    made = created(client, model=file_id)
    assert (made["model"], made["olora"]["base"]) == (file_id, "olora-tiny")
    assert client.delete(f"/v1/files/{file_id}").json()["error"]["code"] == "file_in_use"
    elsewhere = zipped(
        **{
            "adapter_config.json": PEFT.replace(b"olora-tiny", b"meta-llama/Llama-3.2-1B"),
            "adapter_model.safetensors": b"weights",
        }
    )
    file_id = uploaded(client, elsewhere, purpose="fine-tune-adapter")
    refused = create(client, model=file_id).json()["error"]
    assert (refused["param"], "name it in olora.base" in refused["message"]) == ("olora.base", True)
    assert created(client, model=file_id, olora={"base": "olora-tiny"})["olora"]["base"] == "olora-tiny"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"no zip", "not a zip"),
        (zipped(**{"readme.txt": b"x"}), "holds 0 files adapter_config.json"),
        (zipped(**{"adapter_config.json": PEFT}), "has no adapter_model.safetensors"),
        (
            zipped(**{"adapter_config.json": PEFT, "adapter_model.bin": b"x"}),
            "save the adapter as safetensors",
        ),
        (peft_zip(**{"more/adapter_config.json": PEFT}), "holds 2 files adapter_config.json"),
        (peft_zip(**{"adapter_config.json": b"[1"}), "format"),
        (peft_zip(**{"adapter_config.json": b'{"peft_type": "IA3"}'}), "peft_type LORA"),
        (peft_zip(**{"adapter_config.json": b" " * 200_000}), "larger than 100000 bytes"),
    ],
    ids=["text", "other", "no-weights", "pickle", "two", "no-json", "ia3", "large"],
)
def test_what_is_no_adapter_is_refused_at_once(client: TestClient, content: bytes, problem: str) -> None:
    answer = upload(client, content, purpose="fine-tune-adapter")
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_adapter")
    assert problem in answer.json()["error"]["message"]


def test_what_cannot_be_trained_on_is_refused(client: TestClient, settings: Settings) -> None:
    merged = finished(client, settings, adapter={"export": "merged"})
    training = uploaded(client)
    for model, problem, param in (
        ("ft:olora-tiny:olora::none", "There is no fine-tuned model", "model"),
        ("ft:olora-tiny:olora::none:ckpt-step-3", "There is no fine-tuned model", "model"),
        (merged["fine_tuned_model"], "is a whole model", "model"),
        ("file-none", "There is no file", "model"),
        (training, "purpose 'fine-tune'", "model"),
    ):
        refused = create(client, model=model)
        assert refused.status_code == 400, model
        assert problem in refused.json()["error"]["message"]
        assert refused.json()["error"]["param"] == param
    based = create(client, olora={"base": "olora-tiny"}).json()["error"]
    assert based["param"] == "olora.base"
    compared = client.post(
        "/v1/comparisons", json={"model": training, "training_file": training, "validation_file": training}
    )
    assert compared.status_code == 400


def test_another_projects_model_cannot_be_trained_on(
    client: TestClient, settings: Settings, stranger: TestClient
) -> None:
    done = finished(client, settings)
    adapter = uploaded(client, peft_zip(), purpose="fine-tune-adapter")
    checkpoint = checkpoint_of(client, done["id"])["fine_tuned_model_checkpoint"]
    training = uploaded(stranger)
    for model in (done["fine_tuned_model"], checkpoint, adapter):
        refused = create(stranger, model=model, training_file=training)
        assert refused.status_code == 400
        assert "in this project" in refused.json()["error"]["message"]


def test_the_zip_of_a_folder_may_hold_the_folder_itself() -> None:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("my-adapter/adapter_config.json", PEFT)
        archive.writestr("my-adapter/adapter_model.safetensors", b"weights")
    from api.adapter_zips import base_of_adapter

    packed.seek(0)
    assert base_of_adapter(packed) == "olora-tiny"
