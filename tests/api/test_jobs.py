"""Jobs: the answer at every stage, in OpenAI's fields and in ours."""

import io
import shutil
import zipfile
from typing import Any
from urllib.parse import quote

import pytest
from starlette.testclient import TestClient

from api.main import create_app
from store import endings
from store.bases import SHIPPED_FOLDER
from store.settings import Settings
from tests.rows import chat_file, completion_file, jsonl

from .calls import (
    SAMPLE,
    Attempt,
    compared,
    create,
    created,
    events,
    eventually,
    finished,
    job,
    settled,
    uploaded,
)
from .serving import KEY

BOTH_DATABASES = pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)
OPENAI_FIELDS = {
    "id",
    "object",
    "created_at",
    "error",
    "estimated_finish",
    "fine_tuned_model",
    "finished_at",
    "hyperparameters",
    "integrations",
    "metadata",
    "method",
    "model",
    "organization_id",
    "result_files",
    "seed",
    "status",
    "trained_tokens",
    "training_file",
    "user_provided_suffix",
    "validation_file",
}


@BOTH_DATABASES
def test_a_new_job_carries_every_field(client: TestClient) -> None:
    training, validation = uploaded(client), uploaded(client)
    made = created(
        client,
        training_file=training,
        validation_file=validation,
        suffix="My Suffix!",
        seed=42,
        metadata={"a": "1"},
        integrations=[],
        adapter={"method": "lora", "rank": 4},
        olora={"priority": 3, "max_seconds": 3600, "devices": 2},
    )
    assert set(made) == OPENAI_FIELDS | {"adapter", "olora"}
    assert made["object"] == "fine_tuning.job"
    assert made["id"].startswith("ftjob-")
    assert made["status"] in ("validating_files", "queued")
    for name in ("error", "fine_tuned_model", "finished_at", "trained_tokens", "estimated_finish"):
        assert made[name] is None
    assert made["result_files"] == made["integrations"] == []
    assert (made["model"], made["seed"], made["metadata"]) == ("olora-tiny", 42, {"a": "1"})
    assert (made["training_file"], made["validation_file"]) == (training, validation)
    assert (made["user_provided_suffix"], made["organization_id"]) == ("My Suffix!", "olora")
    for place in (made["hyperparameters"], made["method"]["supervised"]["hyperparameters"]):
        assert {place[name] for name in ("n_epochs", "batch_size", "learning_rate_multiplier")} == {"auto"}
    assert made["adapter"]["method"] == "lora"
    assert (made["adapter"]["rank"], made["adapter"]["alpha"]) == (4, 16)
    asked = {name: made["olora"][name] for name in ("priority", "max_seconds", "devices")}
    assert asked == {"priority": 3, "max_seconds": 3600, "devices": 2}
    assert (made["olora"]["attempt"], made["olora"]["plan"]) == (0, None)


def test_what_is_not_said_gets_the_methods_defaults_and_a_seed(client: TestClient) -> None:
    training = uploaded(client)
    first, second = (
        created(client, training_file=training),
        created(client, training_file=training, seed=None),
    )
    assert (first["adapter"]["method"], first["adapter"]["rank"]) == ("olora", 8)
    assert 0 <= first["seed"] < 2**31
    assert first["seed"] != second["seed"]
    assert (first["validation_file"], first["metadata"], first["user_provided_suffix"]) == (None, None, None)


OLD = {"hyperparameters": {"n_epochs": 2, "batch_size": 8, "learning_rate_multiplier": 0.5}}
NEW = {"method": {"type": "supervised", "supervised": OLD}}


@pytest.mark.parametrize("body", [OLD, NEW, {**OLD, **NEW}], ids=["top", "method", "both"])
def test_hyperparameters_may_stand_in_either_place(body: dict[str, Any], client: TestClient) -> None:
    made = created(client, **body)
    for place in (made["hyperparameters"], made["method"]["supervised"]["hyperparameters"]):
        assert OLD["hyperparameters"].items() <= place.items()


def test_names_of_other_services_are_understood(client: TestClient) -> None:
    sent = {"lora": True, "lora_r": 4, "lora_alpha": 12, "lora_dropout": 0.1, "learning_rate": 1e-3}
    made = created(client, hyperparameters={**sent, "warmup_ratio": 0.1, "context_length": 128})
    assert (made["adapter"]["rank"], made["adapter"]["alpha"], made["adapter"]["dropout"]) == (4, 12, 0.1)
    assert made["hyperparameters"]["learning_rate"] == 1e-3
    assert made["hyperparameters"]["context_length"] == 128


def test_a_quantised_base_is_asked_for_among_the_hyperparameters(client: TestClient) -> None:
    made = created(client, hyperparameters={"quantization": "nf4"})
    assert made["hyperparameters"]["quantization"] == "nf4"
    refused = create(client, hyperparameters={"quantization": "nf5"})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "hyperparameters.quantization"


def test_null_stands_for_what_is_left_out(client: TestClient) -> None:
    names = ("validation_file", "suffix", "seed", "metadata", "integrations", "method", "hyperparameters")
    made = created(client, **dict.fromkeys((*names, "adapter", "olora")))
    assert made["adapter"]["method"] == "olora"
    assert (
        created(client, method={"type": "supervised", "supervised": None})["method"]["type"] == "supervised"
    )


@BOTH_DATABASES
def test_the_files_are_checked_and_the_job_is_queued(client: TestClient) -> None:
    made = created(client, validation_file=uploaded(client, chat_file(1)))
    assert settled(client, made["id"])["status"] == "queued"
    assert [event["message"] for event in events(client, made["id"])] == [
        f"Created fine-tuning job: {made['id']}",
        f"Validating training file: {made['training_file']} and validation file: {made['validation_file']}",
        "Files validated, moving job to queued state",
    ]


def test_completions_are_trained_too(client: TestClient) -> None:
    files = {"training_file": uploaded(client, completion_file())}
    files["validation_file"] = uploaded(client, completion_file(2))
    assert settled(client, created(client, **files)["id"])["status"] == "queued"


PAIRS = jsonl(*[{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " 0"} for n in range(12)])


@pytest.mark.parametrize(
    "body",
    [
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.2, "n_epochs": 2}}}},
        {"method": {"type": "dpo", "dpo": {}}, "hyperparameters": {"beta": 0.2, "n_epochs": 2}},
    ],
)
def test_preferences_are_trained_by_dpo(body: dict[str, Any], client: TestClient) -> None:
    made = created(client, training_file=uploaded(client, PAIRS), **body)
    assert made["method"]["type"] == "dpo"
    assert made["method"].keys() == {"type", "dpo"}
    for place in (made["hyperparameters"], made["method"]["dpo"]["hyperparameters"]):
        assert (place["beta"], place["n_epochs"], place["batch_size"]) == (0.2, 2, "auto")
    assert settled(client, made["id"])["status"] == "queued"


def test_columns_of_other_names_are_mapped_by_the_job(client: TestClient) -> None:
    """The upload's report has errors, which another job, without the mapping, fails with."""
    table = b"question,answer\n" + b"".join(b"%d?,%d\n" % (n, n) for n in range(12))
    upload_id = uploaded(client, table)
    mapping = {"prompt": "question", "completion": "answer"}
    for more in ({}, {"validation_file": upload_id}, {"method": {"type": "supervised"}}):
        made = created(client, training_file=upload_id, olora={"columns": mapping}, **more)
        assert made["olora"]["columns"] == mapping
        assert settled(client, made["id"])["status"] == "queued"
    ended = settled(client, created(client, training_file=upload_id)["id"])
    assert ended["status"] == "failed"
    assert "found columns question, answer; expected messages" in ended["error"]["message"]
    assert "olora.columns" in ended["error"]["message"]


def test_a_mapping_does_not_make_a_file_longer(client: TestClient) -> None:
    short = uploaded(client, b"question,answer\na,b\n")
    columns = {"prompt": "question", "completion": "answer"}
    ended = settled(client, created(client, training_file=short, olora={"columns": columns})["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "invalid_n_examples")


def test_answers_do_not_fit_dpo(client: TestClient) -> None:
    ended = settled(client, created(client, method={"type": "dpo"})["id"])
    assert (ended["status"], ended["error"]["code"]) == ("failed", "unexpected_file_format")
    assert "preferred_output" in ended["error"]["message"]


def test_a_validation_share_is_part_of_what_is_trained(client: TestClient, settings: Settings) -> None:
    asked = {"validation_share": 0.25, "group_by": "user"}
    made = created(client, olora=asked, hyperparameters={"early_stopping_patience": 2})
    assert made["validation_file"] is None
    assert {name: made["olora"][name] for name in asked} == asked
    assert settled(client, made["id"])["status"] == "queued"
    attempt = Attempt(settings)
    spec = attempt.claim.spec
    assert (spec.validation_share, spec.group_by) == (0.25, "user")
    attempt.close()


def test_a_validation_share_and_a_file_exclude_each_other(client: TestClient) -> None:
    files = {"training_file": uploaded(client), "validation_file": uploaded(client)}
    answer = create(client, **files, olora={"validation_share": 0.1})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "olora.validation_share"
    assert "exclude each other" in error["message"]


def test_the_job_of_the_highest_priority_runs_first(client: TestClient, settings: Settings) -> None:
    training = uploaded(client)
    plain = created(client, training_file=training)
    urgent = created(client, training_file=training, olora={"priority": 9})
    for made in (plain, urgent):
        settled(client, made["id"])
    attempt = Attempt(settings)
    attempt.close()
    assert attempt.claim.job_id == urgent["id"]


# --- the end ---------------------------------------------------------------------------------------------


@BOTH_DATABASES
def test_a_finished_job_tells_what_was_decided_and_what_came_out(
    client: TestClient, settings: Settings
) -> None:
    done = finished(client, settings, suffix="My Suffix!", hyperparameters={"n_epochs": 2})
    assert done["status"] == "succeeded"
    assert done["error"] is None
    assert done["fine_tuned_model"] == f"ft:olora-tiny:olora:my-suffix-:{done['id'][-8:]}"
    assert (done["trained_tokens"], done["estimated_finish"]) == (1234, None)
    assert done["finished_at"] >= done["created_at"]
    for place in (done["hyperparameters"], done["method"]["supervised"]["hyperparameters"]):
        assert (place["n_epochs"], place["batch_size"], place["learning_rate_multiplier"]) == (2, 4, 1.0)
    ours = done["olora"]
    assert ours["certificate"] == {"max_abs_logit_diff": 1e-6, "passed": True}
    assert (ours["attempt"], ours["failures"], ours["step"], ours["total_steps"]) == (1, 0, 3, 3)
    assert ours["plan"]["hyperparameters"] == done["hyperparameters"]
    assert ours["samples"] == {"file": "training", "rows": [SAMPLE]}
    assert ours["results"] == dict(
        zip(("metrics", "adapter", "tensorboard"), done["result_files"], strict=True)
    )


def test_a_running_job_shows_where_it_is(client: TestClient, settings: Settings) -> None:
    made = settled(client, created(client)["id"])
    attempt = Attempt(settings)
    attempt.train(2)
    running = job(client, made["id"])
    assert (running["status"], running["olora"]["step"], running["result_files"]) == ("running", 2, [])
    assert isinstance(running["estimated_finish"], int)
    assert running["hyperparameters"]["n_epochs"] == 8
    checkpoint = client.get(f"/v1/fine_tuning/jobs/{made['id']}/checkpoints").json()["data"][0]
    attempt.succeed()
    attempt.close()
    name = job(client, made["id"])["fine_tuned_model"]
    assert checkpoint["fine_tuned_model_checkpoint"] == f"{name}:ckpt-step-2"


@BOTH_DATABASES
def test_checkpoints_are_openais_objects(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings)
    page = client.get(f"/v1/fine_tuning/jobs/{done['id']}/checkpoints").json()
    (checkpoint,) = page["data"]
    assert (page["has_more"], page["first_id"], page["last_id"]) == (
        False,
        checkpoint["id"],
        checkpoint["id"],
    )
    assert checkpoint.pop("id").startswith("ftckpt_")
    assert isinstance(checkpoint.pop("created_at"), int)
    assert checkpoint.pop("olora")["status"] == "available"
    assert checkpoint == {
        "object": "fine_tuning.job.checkpoint",
        "fine_tuned_model_checkpoint": f"{done['fine_tuned_model']}:ckpt-step-3",
        "fine_tuning_job_id": done["id"],
        "step_number": 3,
        "metrics": {"step": 3, "train_loss": 2 / 3},
    }


@BOTH_DATABASES
def test_metrics_travel_in_words_and_numbers(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings)
    metrics = [event for event in events(client, done["id"]) if event["type"] == "metrics"]
    assert metrics[0]["message"] == "Step 1/3: training loss=2.00"
    assert metrics[0]["data"] == {
        "step": 1,
        "total_steps": 3,
        "train_loss": 2.0,
        "train_mean_token_accuracy": 0.5,
        "seconds": 0.1,
    }
    table = client.get(f"/v1/files/{done['result_files'][0]}/content").text.splitlines()
    assert table[:2] == [
        "step,train_loss,train_accuracy,valid_loss,valid_mean_token_accuracy,"
        "full_valid_loss,full_valid_mean_token_accuracy",
        "1,2.0,0.5,,,,",
    ]


def test_events_are_paged_newest_first_while_new_ones_come(client: TestClient, settings: Settings) -> None:
    made = settled(client, created(client)["id"])
    url = f"/v1/fine_tuning/jobs/{made['id']}/events"
    before = client.get(f"{url}?limit=2").json()
    attempt = Attempt(settings)
    attempt.close()
    rest = client.get(f"{url}?limit=2&after={before['last_id']}").json()
    seen = [event["id"] for page in (before, rest) for event in page["data"]]
    assert (before["has_more"], rest["has_more"], len(seen), len(set(seen))) == (True, False, 3, 3)
    assert client.get(f"{url}?limit=1").json()["data"][0]["message"] == "Fine-tuning job started"


def test_the_adapter_is_a_zip_that_can_be_asked_for_again(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings)
    url = f"/v1/fine_tuning/jobs/{done['id']}/adapter"
    answer = client.get(url)
    assert answer.headers["content-type"] == "application/zip"
    assert answer.headers["content-length"] == str(len(answer.content))
    assert zipfile.ZipFile(io.BytesIO(answer.content)).namelist() == ["adapter_model.safetensors"]
    assert client.get(f"/v1/files/{done['result_files'][1]}/content").content == answer.content
    head = client.head(url)
    assert (head.status_code, head.content) == (200, b"")
    for name in ("etag", "content-length", "content-type", "content-disposition"):
        assert head.headers[name] == answer.headers[name]
    unchanged = client.get(url, headers={"if-none-match": answer.headers["etag"]})
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    assert client.get(url, headers={"if-none-match": '"other"'}).content == answer.content


def test_without_success_there_is_no_adapter_and_the_answer_says_why(
    client: TestClient, settings: Settings
) -> None:
    def refusal(job_id: str) -> str:
        answer = client.get(f"/v1/fine_tuning/jobs/{job_id}/adapter")
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_job_state")
        return str(answer.json()["error"]["message"])

    made = settled(client, created(client)["id"])
    assert f"Job {made['id']} is queued; its adapter" in refusal(made["id"])
    attempt = Attempt(settings)
    assert f"Job {made['id']} is running; its adapter" in refusal(made["id"])
    attempt.train(3)
    attempt.close()
    assert f"Job {made['id']} is running (step 3 of 3); its adapter" in refusal(made["id"])
    made = settled(client, created(client)["id"])
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")
    assert "was cancelled" in refusal(made["id"])
    failed = settled(client, created(client, training_file=uploaded(client, chat_file(2)))["id"])
    assert "must have at least 10 examples" in refusal(failed["id"])
    assert client.head(f"/v1/fine_tuning/jobs/{made['id']}/adapter").status_code == 400


MERGED = {"method": "mora", "type": 6, "export": "merged"}


def test_a_job_that_merges_leaves_a_model_and_no_adapter(client: TestClient, settings: Settings) -> None:
    made = created(client, adapter=MERGED)
    refused = client.get(f"/v1/fine_tuning/jobs/{made['id']}/adapter")
    assert "adapter.export is 'merged'; wait until it ends" in refused.json()["error"]["message"]
    client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel")

    done = finished(client, settings, adapter=MERGED)
    assert done["adapter"]["export"] == "merged"
    results = done["olora"]["results"]
    assert results == dict(zip(("metrics", "model", "tensorboard"), done["result_files"], strict=True))
    assert client.get(f"/v1/files/{results['model']}").json()["filename"] == "model.zip"
    content = client.get(f"/v1/files/{results['model']}/content")
    assert (content.status_code, content.headers["content-type"]) == (200, "application/zip")
    for call in (client.get, client.head):
        refused = call(f"/v1/fine_tuning/jobs/{done['id']}/adapter")
        assert refused.status_code == 400
    error = client.get(f"/v1/fine_tuning/jobs/{done['id']}/adapter").json()["error"]
    assert error["code"] == "invalid_job_state"
    assert f"download its result file {results['model']} (olora.results.model)" in error["message"]
    assert "train again with adapter.export = 'adapter'" in error["message"]

    refused = client.delete(f"/v1/files/{results['model']}")
    assert "holds the weights of the model" in refused.json()["error"]["message"]
    assert client.delete(f"/v1/models/{done['fine_tuned_model']}").json()["deleted"] is True
    assert client.get(f"/v1/files/{results['model']}").status_code == 404


def test_an_update_that_is_no_adapter_must_be_merged(client: TestClient) -> None:
    answer = create(client, adapter={"method": "mora", "type": 6})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapter.export")
    assert "adapter.type = 6" in answer.json()["error"]["message"]


@BOTH_DATABASES
def test_a_deleted_model_takes_its_adapter_along_and_leaves_the_jobs_record(
    client: TestClient, settings: Settings
) -> None:
    done = finished(client, settings)
    name = done["fine_tuned_model"]
    model = client.get(f"/v1/models/{name}").json()
    assert model == {**model, "id": name, "object": "model", "owned_by": "olora", "shutdown_date": None}
    assert isinstance(model["created"], int)
    assert model in client.get("/v1/models").json()["data"]
    assert client.delete(f"/v1/models/{name}").json() == {"id": name, "object": "model", "deleted": True}
    assert client.get(f"/v1/models/{name}").status_code == 404
    assert client.delete(f"/v1/models/{name}").status_code == 404
    gone = client.get(f"/v1/fine_tuning/jobs/{done['id']}/adapter")
    assert (gone.status_code, "was deleted" in gone.json()["error"]["message"]) == (404, True)
    assert job(client, done["id"]) == done
    for record in (done["result_files"][0], done["result_files"][2]):
        assert client.get(f"/v1/files/{record}/content").status_code == 200
    names = lambda: [path.name for path in settings.storage_folder.rglob("*") if path.is_file()]  # noqa: E731
    eventually(lambda: "adapter.zip" not in names())


@BOTH_DATABASES
def test_the_adapters_file_stays_as_long_as_its_model(client: TestClient, settings: Settings) -> None:
    done = finished(client, settings)
    table, adapter, events_file = done["result_files"]
    name = done["fine_tuned_model"]
    refused = client.delete(f"/v1/files/{adapter}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "file_in_use")
    assert f"delete the model instead, which also deletes the file: DELETE /v1/models/{name}." in refused.text
    assert client.get(f"/v1/fine_tuning/jobs/{done['id']}/adapter").status_code == 200
    for record in (table, events_file):
        assert client.delete(f"/v1/files/{record}").json()["deleted"] is True
    assert client.delete(f"/v1/models/{name}").json()["deleted"] is True
    assert client.get(f"/v1/files/{adapter}").status_code == 404
    assert client.delete(f"/v1/files/{adapter}").status_code == 404


def test_a_folder_of_any_name_is_listed_and_trained(client: TestClient, settings: Settings) -> None:
    assert settings.models_dir is not None
    name = "with space & ü"
    shutil.copytree(SHIPPED_FOLDER, settings.models_dir / name)
    assert name in [model["id"] for model in client.get("/v1/models").json()["data"]]
    assert client.get(f"/v1/models/{quote(name)}").json()["id"] == name
    assert client.delete(f"/v1/models/{quote(name)}").status_code == 403
    done = finished(client, settings, model=name)
    assert done["model"] == name
    assert done["fine_tuned_model"] == f"ft:with-space-:olora::{done['id'][-8:]}"


def test_base_models_are_listed_and_stay(client: TestClient) -> None:
    (base,) = client.get("/v1/models").json()["data"]
    assert (base["id"], base["object"], base["owned_by"]) == ("olora-tiny", "model", "system")
    assert client.get("/v1/models/olora-tiny").json() == base
    refused = client.delete("/v1/models/olora-tiny")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "permission_denied")
    for name in ("some/thing", "some%2Fthing", "some thing", "ft:a:b::c"):
        missing = client.get(f"/v1/models/{name}")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


# --- cancel, pause, resume -------------------------------------------------------------------------------


def ask(client: TestClient, job_id: str, action: str, **body: Any) -> dict[str, Any]:
    address = f"/v1/fine_tuning/jobs/{job_id}/{action}"
    answer = client.post(address, json=body) if body else client.post(address)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


@BOTH_DATABASES
def test_a_waiting_job_is_cancelled_at_once_and_twice_is_fine(client: TestClient) -> None:
    made = created(client)
    url = f"/v1/fine_tuning/jobs/{made['id']}/cancel"
    first = client.post(url, headers={"content-type": "application/json"})
    assert (first.status_code, first.json()["status"]) == (200, "cancelled")
    assert isinstance(first.json()["finished_at"], int)
    assert client.post(url).json() == first.json()


@BOTH_DATABASES
def test_a_running_job_is_cancelled_at_once_and_its_file_can_be_deleted(
    client: TestClient, settings: Settings
) -> None:
    made = settled(client, created(client)["id"])
    attempt = Attempt(settings)
    assert job(client, made["id"])["olora"]["stopping"] is False
    file = f"/v1/files/{made['training_file']}"
    assert client.delete(file).json()["error"]["code"] == "file_in_use"
    ended = ask(client, made["id"], "cancel")
    assert (ended["status"], ended["olora"]["stopping"]) == ("cancelled", True)
    assert client.delete(file).json()["deleted"] is True
    with attempt.sessions.begin() as session:
        endings.hand_back(session, attempt.claim, reason="released", message="Stopped.")
    attempt.close()
    ended = job(client, made["id"])
    assert (ended["status"], ended["olora"]["stopping"]) == ("cancelled", False)


@BOTH_DATABASES
def test_a_job_is_paused_and_resumed_at_once(client: TestClient, settings: Settings) -> None:
    made = settled(client, created(client)["id"])
    paused = ask(client, made["id"], "pause")
    assert (paused["status"], paused["olora"]["pause_reason"]) == ("paused", "request")
    assert (paused["finished_at"], paused["error"]) == (None, None)
    assert ask(client, made["id"], "pause") == paused
    assert ask(client, made["id"], "resume")["status"] == "queued"
    attempt = Attempt(settings)
    assert ask(client, made["id"], "resume")["status"] == "running"
    paused = ask(client, made["id"], "pause")
    assert (paused["status"], paused["olora"]["stopping"]) == ("paused", True)
    attempt.close()


def test_resuming_may_set_other_limits(client: TestClient) -> None:
    made = settled(client, created(client, olora={"max_seconds": 60, "auto_start": False})["id"])
    assert (made["status"], made["olora"]["pause_reason"]) == ("paused", "auto_start")
    resumed = ask(client, made["id"], "resume", olora={"max_train_tokens": 5})
    limits = {name: resumed["olora"][name] for name in ("max_seconds", "finish_by", "max_train_tokens")}
    assert limits == {"max_seconds": 60, "finish_by": None, "max_train_tokens": 5}
    wrong = client.post(f"/v1/fine_tuning/jobs/{made['id']}/resume", json={"olora": {"max_second": 1}})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "olora.max_second")


@pytest.mark.parametrize("written", ["2099-01-02T03:04:05+00:00", "2099-01-02T04:04:05+01:00", 4071006245])
def test_a_point_in_time_may_be_written_in_seconds_or_in_iso_8601(client: TestClient, written: Any) -> None:
    assert created(client, olora={"finish_by": written})["olora"]["finish_by"] == 4071006245


# --- what real clients send ------------------------------------------------------------------------------


def test_a_hyperparameter_that_is_null_is_absent(client: TestClient) -> None:
    asked = {"n_epochs": None, "batch_size": 4, "learning_rate_multiplier": None}
    made = created(client, hyperparameters=asked)["hyperparameters"]
    assert (made["n_epochs"], made["batch_size"], made["learning_rate_multiplier"]) == ("auto", 4, "auto")
    nested = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": None}}}
    assert created(client, method=nested, hyperparameters={"n_epochs": 2})["hyperparameters"]["n_epochs"] == 2


def test_an_empty_metadata_filter_is_null_as_node_sends_it(client: TestClient) -> None:
    without, _ = created(client)["id"], created(client, metadata={"a": "1"})
    for query in ("metadata=", "metadata=null"):
        found = client.get(f"/v1/fine_tuning/jobs?{query}").json()["data"]
        assert [made["id"] for made in found] == [without]


def test_models_with_a_slash_behind_says_what_to_ask_for(client: TestClient) -> None:
    answer = client.get("/v1/models/")
    assert answer.status_code == 404
    assert "GET /v1/models lists them" in answer.json()["error"]["message"]


# --- other names for base models -------------------------------------------------------------------------


def test_a_job_may_name_an_alias_and_keeps_it(settings: Settings) -> None:
    named = settings.model_copy(update={"model_aliases": (("gpt-4o-mini*", "olora-tiny"),)})
    with TestClient(create_app(named), headers={"authorization": f"Bearer {KEY}"}) as client:
        made = settled(client, created(client, model="gpt-4o-mini-2024-07-18")["id"])
        assert (made["model"], made["olora"]["base"]) == ("gpt-4o-mini-2024-07-18", "olora-tiny")
        attempt = Attempt(named)
        assert attempt.claim.spec.model == "olora-tiny"
        attempt.close()
        unknown = create(client, model="gpt-4.1").json()["error"]
        assert (unknown["code"], unknown["param"]) == ("model_not_available", "model")
        assert "OLORA_MODEL_ALIASES" in unknown["message"]
        compared_one = compared(client, model="gpt-4o-mini")
        assert (compared_one["model"], compared_one["olora"]["base"]) == ("gpt-4o-mini", "olora-tiny")
        listed = {model["id"]: model["olora"] for model in client.get("/v1/models").json()["data"]}
        assert listed["gpt-4o-mini-2024-07-18"] == {"base": "olora-tiny"}
        assert listed["olora-tiny"] is None
        one = client.get("/v1/models/gpt-4o-mini-next").json()
        assert (one["id"], one["olora"]) == ("gpt-4o-mini-next", {"base": "olora-tiny"})
        kept = client.delete("/v1/models/gpt-4o-mini")
        assert (kept.status_code, kept.json()["error"]["code"]) == (403, "permission_denied")


# --- lists -----------------------------------------------------------------------------------------------


@BOTH_DATABASES
def test_jobs_are_listed_newest_first_in_pages(client: TestClient) -> None:
    training = uploaded(client)
    ids = [created(client, training_file=training)["id"] for _ in range(5)]
    first = client.get("/v1/fine_tuning/jobs?limit=2").json()
    assert [made["id"] for made in first["data"]] == [ids[4], ids[3]]
    assert (first["object"], first["has_more"], first["last_id"]) == ("list", True, ids[3])
    newer = created(client, training_file=training)["id"]
    second = client.get(f"/v1/fine_tuning/jobs?limit=20&after={ids[3]}").json()
    assert ([made["id"] for made in second["data"]], second["has_more"]) == (ids[2::-1], False)
    assert newer not in [made["id"] for made in second["data"]]


@BOTH_DATABASES
def test_jobs_are_found_by_their_metadata(client: TestClient) -> None:
    training = uploaded(client)
    pairs = ({"team": "a b", "n": "1"}, {"team": "a b", "n": ""}, {"ü&=[]": "%+"}, {}, None)
    ids = [created(client, training_file=training, metadata=metadata)["id"] for metadata in pairs]

    def found(query: str) -> list[str]:
        answer = client.get(f"/v1/fine_tuning/jobs?{query}")
        assert answer.status_code == 200, answer.text
        return [made["id"] for made in answer.json()["data"]]

    assert found("metadata%5Bteam%5D=a+b") == [ids[1], ids[0]]
    assert found("metadata[team]=a%20b&metadata[n]=1") == [ids[0]]
    assert found("metadata[n]=") == [ids[1]]
    assert found("metadata[%C3%BC%26%3D%5B%5D]=%25%2B") == [ids[2]]
    assert found("metadata[team]=other") == []
    assert found("metadata=null") == [ids[4]]
    assert len(found("")) == 5


# --- once ------------------------------------------------------------------------------------------------

RETRY = {"x-stainless-retry-count": "1"}


@BOTH_DATABASES
def test_a_retry_finds_the_job_that_its_first_try_made(client: TestClient) -> None:
    body = {"model": "olora-tiny", "training_file": uploaded(client)}

    def send(**headers: str) -> str:
        answer = client.post("/v1/fine_tuning/jobs", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    first = send()
    assert send(**RETRY) == first
    second = send()
    assert second != first, "two deliberate calls are two jobs"
    assert send(**RETRY) == second
    keyed = send(**{"idempotency-key": "k"})
    assert keyed not in (first, second)
    assert send(**{"idempotency-key": "k"}) == send(**{"idempotency-key": "k"}, **RETRY) == keyed
    assert len(client.get("/v1/fine_tuning/jobs").json()["data"]) == 3


def test_a_key_used_for_another_body_is_refused(client: TestClient) -> None:
    training = uploaded(client)
    for epochs, status in ((1, 200), (2, 400), (1, 200)):
        answer = client.post(
            "/v1/fine_tuning/jobs",
            json={"model": "olora-tiny", "training_file": training, "hyperparameters": {"n_epochs": epochs}},
            headers={"idempotency-key": "k"},
        )
        assert answer.status_code == status
    assert len(client.get("/v1/fine_tuning/jobs").json()["data"]) == 1


def test_the_stored_answer_holds_though_the_file_has_gone(client: TestClient) -> None:
    body = {"model": "olora-tiny", "training_file": uploaded(client)}
    first = client.post("/v1/fine_tuning/jobs", json=body).json()
    client.post(f"/v1/fine_tuning/jobs/{first['id']}/cancel")
    client.delete(f"/v1/files/{body['training_file']}")
    again = client.post("/v1/fine_tuning/jobs", json=body, headers=RETRY)
    assert (again.status_code, again.json()["id"]) == (200, first["id"])


def test_a_refused_request_may_be_corrected_under_the_same_key(client: TestClient) -> None:
    key = {"idempotency-key": "k"}
    body = {"model": "olora-tiny", "training_file": "file-none"}
    assert client.post("/v1/fine_tuning/jobs", json=body, headers=key).status_code == 400
    body["training_file"] = uploaded(client)
    assert client.post("/v1/fine_tuning/jobs", json=body, headers=key).status_code == 200


def test_the_content_type_of_a_body_does_not_matter(client: TestClient) -> None:
    """`curl -d` sends a form's type with its JSON."""
    content = f'{{"model": "olora-tiny", "training_file": "{uploaded(client)}"}}'
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=utf-8"):
        answer = client.post("/v1/fine_tuning/jobs", content=content, headers={"content-type": kind})
        assert answer.status_code == 200, answer.text


def test_a_suffix_may_hold_anything_and_the_models_name_stays_plain(
    client: TestClient, settings: Settings
) -> None:
    done = finished(client, settings, suffix="../Größe/ ä?#%")
    assert done["user_provided_suffix"] == "../Größe/ ä?#%"
    assert done["fine_tuned_model"].split(":")[3] == "..--gr-e---"
    assert client.get(f"/v1/models/{done['fine_tuned_model']}").status_code == 200
    assert create(client, suffix="x" * 64).status_code == 200
