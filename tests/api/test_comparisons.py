"""Comparisons: created like jobs, listed apart from them, with a report that is safe to open."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from store.settings import Settings
from tests.rows import chat_file, completion_file

from .calls import (
    FINDINGS,
    PAGE,
    Attempt,
    compare,
    compared,
    compared_and_queued,
    compared_to_the_end,
    comparison,
    created,
    eventually,
    uploaded,
)
from .test_refusals import assert_refused, left_behind

BOTH_DATABASES = pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)


@BOTH_DATABASES
def test_a_new_comparison_carries_every_field(client: TestClient) -> None:
    training, validation = uploaded(client), uploaded(client)
    made = compared(
        client,
        training_file=training,
        validation_file=validation,
        methods=["olora", {"method": "adalora", "rank": 4}],
        learning_rates=[1e-3, 3e-3],
        seeds=2,
        seed=42,
        budget=5000,
        hyperparameters={"n_epochs": 2},
        metadata={"a": "1"},
        olora={"priority": 3, "max_seconds": 3600},
    )
    assert made["object"] == "comparison"
    assert made["id"].startswith("cmp-")
    assert made["status"] in ("validating_files", "queued")
    assert (made["model"], made["training_file"], made["validation_file"]) == (
        "olora-tiny",
        training,
        validation,
    )
    assert [method["method"] for method in made["methods"]] == ["olora", "adalora", "lora"]
    assert [method.get("rank") for method in made["methods"]] == [None, 4, None]
    assert (made["learning_rates"], made["seeds"], made["seed"], made["budget"]) == (
        [1e-3, 3e-3],
        2,
        42,
        5000,
    )
    for place in (made["hyperparameters"], made["method"]["supervised"]["hyperparameters"]):
        assert place["n_epochs"] == 2
    assert made["metadata"] == {"a": "1"}
    assert made["olora"] == {
        "priority": 3,
        "max_seconds": 3600,
        "finish_by": None,
        "max_train_tokens": None,
        "base": "olora-tiny",
        "former": None,
        "auto_start": True,
        "devices": 1,
        "validation_share": None,
        "group_by": None,
        "columns": None,
        "attempt": 0,
        "failures": 0,
        "stage": None,
        "stopping": False,
        "pause_reason": None,
        "started_at": None,
    }
    for name in ("error", "started_at", "finished_at", "estimated_finish", "verdict", "winner", "figures"):
        assert made[name] is None
    assert made["results"] == {}
    assert (made["progress"]["step"], made["progress"]["run"]) == (0, None)


def test_what_is_not_said_is_decided_by_the_comparison(client: TestClient) -> None:
    names = ("methods", "learning_rates", "seeds", "seed", "budget", "search_share", "olora", "metadata")
    made = compared(client, **dict.fromkeys(names))
    offered = {method["id"] for method in client.get("/v1/adapter_methods").json()["data"]}
    assert {method["method"] for method in made["methods"]} == offered
    assert not any("rank" in method for method in made["methods"])
    assert compared(client, methods=made["methods"])["methods"] == made["methods"]
    assert (made["learning_rates"], made["budget"], made["seeds"], made["seed"]) == ("auto", "auto", 3, 0)


@BOTH_DATABASES
def test_jobs_and_comparisons_are_apart(client: TestClient) -> None:
    training = uploaded(client)
    job, made = created(client, training_file=training), compared(client, training_file=training)
    assert [row["id"] for row in client.get("/v1/fine_tuning/jobs").json()["data"]] == [job["id"]]
    assert [row["id"] for row in client.get("/v1/comparisons").json()["data"]] == [made["id"]]
    for path in ("", "/events", "/checkpoints", "/adapter"):
        answer = client.get(f"/v1/fine_tuning/jobs/{made['id']}{path}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "fine_tuning_job_id")
    for path in ("", "/events", "/report"):
        answer = client.get(f"/v1/comparisons/{job['id']}{path}")
        assert (answer.status_code, answer.json()["error"]["param"]) == (404, "comparison_id")
        assert answer.json()["error"]["message"] == f"No such comparison: {job['id']}."
    assert client.post(f"/v1/comparisons/{job['id']}/cancel").status_code == 404
    assert client.post(f"/v1/fine_tuning/jobs/{made['id']}/cancel").status_code == 404
    assert client.get(f"/v1/comparisons?after={job['id']}").status_code == 400


@BOTH_DATABASES
def test_comparisons_are_listed_newest_first_in_pages_and_found_by_their_metadata(client: TestClient) -> None:
    files = {"training_file": uploaded(client), "validation_file": uploaded(client)}
    ids = [compared(client, **files, metadata={"n": str(n)})["id"] for n in range(3)]
    first = client.get("/v1/comparisons?limit=2").json()
    assert ([row["id"] for row in first["data"]], first["has_more"]) == ([ids[2], ids[1]], True)
    rest = client.get(f"/v1/comparisons?after={ids[1]}").json()
    assert ([row["id"] for row in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    found = client.get("/v1/comparisons?metadata[n]=1").json()
    assert [row["id"] for row in found["data"]] == [ids[1]]


# --- while it runs, and after ----------------------------------------------------------------------------


@BOTH_DATABASES
def test_a_running_comparison_shows_where_it_is(client: TestClient, settings: Settings) -> None:
    made_id = compared_and_queued(client)
    attempt = Attempt(settings)
    attempt.compare(25)
    attempt.close()
    running = comparison(client, made_id)
    assert (running["status"], running["olora"]["attempt"]) == ("running", 1)
    assert isinstance(running["started_at"], int)
    assert isinstance(running["estimated_finish"], int)
    assert running["progress"] == {
        "step": 25,
        "total_steps": 400,
        "run": 3,
        "runs": 20,
        "run_step": 5,
        "run_steps": 10,
        "method": "olora",
        "stage": "search",
        "learning_rate": 3e-3,
        "seed": 0,
        "loss": 1.6,
    }


def test_each_run_that_has_ended_is_an_event(client: TestClient, settings: Settings) -> None:
    done = compared_to_the_end(client, settings)
    url = f"/v1/comparisons/{done['id']}/events"
    told = list(reversed(client.get(f"{url}?limit=100").json()["data"]))
    assert {event["object"] for event in told} == {"comparison.event"}
    assert told[0]["message"] == f"Created comparison: {done['id']}"
    runs = [event["data"] for event in told if event["type"] == "run"]
    assert [(run["run"], run["method"], run["loss"]) for run in runs] == [
        (1, "olora", 1.5),
        (2, "olora", 1.5),
    ]
    streamed = client.get(f"{url}?stream=true").text.strip().split("\n\n")
    assert [part.split("\n")[0].removeprefix("id: ") for part in streamed[:-1]] == [e["id"] for e in told]
    assert streamed[-1] == f'event: done\ndata: {{"id":"{done["id"]}","status":"succeeded"}}'


@BOTH_DATABASES
def test_a_finished_comparison_tells_what_it_found(client: TestClient, settings: Settings) -> None:
    done = compared_to_the_end(client, settings)
    assert (done["status"], done["error"], done["estimated_finish"]) == ("succeeded", None, None)
    assert done["finished_at"] >= done["started_at"] >= done["created_at"]
    assert done["verdict"] == FINDINGS["verdict"]
    assert (done["winner"], done["figures"]) == (FINDINGS["winner"], FINDINGS["methods"])
    page = client.get(f"/v1/files/{done['results']['page']}/content")
    assert (page.content, page.headers["content-type"]) == (PAGE, "text/html; charset=utf-8")
    assert page.headers["content-disposition"].startswith("attachment")
    report = client.get(f"/v1/files/{done['results']['report']}/content").json()
    assert report == {"format": 1, "methods": []}
    assert client.get("/v1/models").json()["data"][1:] == []


def test_the_report_is_a_page_that_loads_and_runs_nothing(client: TestClient, settings: Settings) -> None:
    url = f"/v1/comparisons/{compared_to_the_end(client, settings)['id']}/report"
    page = client.get(url, headers={"accept": "text/html,application/xhtml+xml,*/*;q=0.8"})
    assert (page.status_code, page.content) == (200, PAGE)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["content-disposition"] == "inline"
    policy = dict(
        part.strip().partition(" ")[::2] for part in page.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert policy["style-src"] == "'unsafe-inline'"
    assert policy["sandbox"] == "", "no script, no form, no origin"
    assert set(policy) - {"default-src", "style-src", "sandbox"} == {
        "base-uri",
        "form-action",
        "frame-ancestors",
    }
    again = client.get(url, headers={"if-none-match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    ("accept", "query", "kind"),
    [
        ("*/*", "", "text/html"),
        ("application/json", "", "application/json"),
        ("application/json, text/html", "", "text/html"),
        ("text/html", "?format=json", "application/json"),
        ("application/json", "?format=html", "text/html"),
    ],
)
def test_the_report_comes_as_the_caller_wishes(
    accept: str, query: str, kind: str, client: TestClient, settings: Settings
) -> None:
    url = f"/v1/comparisons/{compared_to_the_end(client, settings)['id']}/report{query}"
    answer = client.get(url, headers={"accept": accept})
    assert answer.headers["content-type"].partition(";")[0] == kind
    assert answer.headers["vary"] == "accept"


def test_without_success_there_is_no_report_and_the_answer_says_why(
    client: TestClient, settings: Settings
) -> None:
    waiting = compared_and_queued(client)
    answer = client.get(f"/v1/comparisons/{waiting}/report")
    assert_refused(answer, code="invalid_job_state", param=None, says=("is queued", "once it has succeeded"))
    client.post(f"/v1/comparisons/{waiting}/cancel")
    assert "was cancelled" in client.get(f"/v1/comparisons/{waiting}/report").json()["error"]["message"]
    failed = compared(client, training_file=uploaded(client, chat_file(3)))["id"]
    eventually(lambda: comparison(client, failed)["status"] == "failed")
    told = client.get(f"/v1/comparisons/{failed}/report").json()["error"]["message"]
    assert told.endswith(comparison(client, failed)["error"]["message"])


def test_a_report_that_was_deleted_is_told_so(client: TestClient, settings: Settings) -> None:
    done = compared_to_the_end(client, settings)
    assert client.delete(f"/v1/files/{done['results']['page']}").status_code == 200
    answer = client.get(f"/v1/comparisons/{done['id']}/report")
    assert_refused(answer, status=404, code="not_found", param="comparison_id", says=("page", "was deleted"))
    assert client.get(f"/v1/comparisons/{done['id']}/report?format=json").status_code == 200


@BOTH_DATABASES
def test_a_comparison_is_paused_resumed_and_cancelled_at_once(client: TestClient, settings: Settings) -> None:
    def ask(comparison_id: str, action: str) -> tuple[str, bool]:
        answer = client.post(f"/v1/comparisons/{comparison_id}/{action}").json()
        assert answer["id"] == comparison_id
        return answer["status"], answer["olora"]["stopping"]

    waiting = compared_and_queued(client)
    assert ask(waiting, "pause") == ask(waiting, "pause") == ("paused", False)
    assert ask(waiting, "resume") == ask(waiting, "resume") == ("queued", False)
    assert ask(waiting, "cancel") == ask(waiting, "cancel") == ("cancelled", False)
    running = compared_and_queued(client)
    Attempt(settings).close()
    assert ask(running, "pause") == ("paused", True)
    assert ask(running, "resume") == ("queued", True)
    assert ask(running, "cancel") == ("cancelled", True)


@BOTH_DATABASES
def test_a_retry_finds_the_comparison_that_its_first_try_made(client: TestClient) -> None:
    body = {"model": "olora-tiny", "methods": ["olora"], "training_file": uploaded(client)}
    body["validation_file"] = uploaded(client)

    def send(**headers: str) -> str:
        answer = client.post("/v1/comparisons", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    first = send()
    assert send(**{"x-stainless-retry-count": "1"}) == first
    keyed = send(**{"idempotency-key": "k"})
    assert keyed != first
    assert send(**{"idempotency-key": "k"}) == keyed
    assert len(client.get("/v1/comparisons").json()["data"]) == 2


def test_a_validation_share_stands_for_a_validation_file(client: TestClient, settings: Settings) -> None:
    body = {"model": "olora-tiny", "methods": ["olora"], "training_file": uploaded(client), "seed": 7}
    asked = {"validation_share": 0.25, "group_by": "user"}
    made = client.post("/v1/comparisons", json=body | {"olora": asked}).json()
    assert made["validation_file"] is None
    assert {name: made["olora"][name] for name in asked} == asked
    eventually(lambda: comparison(client, made["id"])["status"] == "queued")
    attempt = Attempt(settings)
    training = attempt.claim.spec.training
    assert (training.validation_share, training.group_by, training.seed) == (0.25, "user", 7)
    attempt.close()
    both = body | {"olora": asked, "validation_file": uploaded(client)}
    answer = client.post("/v1/comparisons", json=both)
    assert_refused(
        answer, code="invalid_request", param="olora.validation_share", says=("exclude each other",)
    )


# --- refusals --------------------------------------------------------------------------------------------


def test_a_comparison_without_validation_rows_is_refused_and_told_why(client: TestClient) -> None:
    says = ("validation_file is missing", "on which no run has trained", "or olora.validation_share")
    body = {"model": "olora-tiny", "methods": ["olora"], "training_file": uploaded(client)}
    for given in ({}, {"validation_file": None}):
        answer = client.post("/v1/comparisons", json=body | given)
        assert_refused(answer, code="invalid_request", param="validation_file", says=says)
    answer = client.post("/v1/comparisons", json=body | {"validation_file": body["training_file"]})
    assert_refused(answer, code=None, param="validation_file", says=("is the training file", "other rows"))


def bad(name: str, body: dict[str, Any], param: str, *says: str, code: str | None = "invalid_request") -> Any:
    return pytest.param(body, code, param, says, id=name)


BAD_BODIES = (
    bad("method-typo", {"methods": ["olara", "lora"]}, "methods[0]", "did you mean 'olora'?"),
    bad("no-method", {"methods": []}, "methods", 'must be "all"'),
    bad("twice", {"methods": ["olora", "olora"]}, "methods[1]", "olora"),
    bad("rank-0", {"methods": [{"method": "olora", "rank": 0}]}, "methods[0].rank", "at least 1 (got 0)."),
    bad(
        "option-typo",
        {"methods": [{"method": "olora", "ranc": 4}]},
        "methods[0].ranc",
        "did you mean 'rank'?",
    ),
    bad("rates", {"learning_rates": "best"}, "learning_rates"),
    bad("rate-0", {"learning_rates": [0]}, "learning_rates"),
    bad("seeds-0", {"seeds": 0}, "seeds", "at least 1"),
    bad("seeds-21", {"seeds": 21}, "seeds", "at most 20"),
    bad("seed", {"seed": -1}, "seed"),
    bad("budget", {"budget": 0}, "budget"),
    bad("share", {"search_share": 1.5}, "search_share"),
    bad("searched", {"hyperparameters": {"learning_rate": 1e-3}}, "hyperparameters.learning_rate", "search"),
    bad(
        "searched-in-method",
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"lr": 1e-3}}}},
        "method.dpo.hyperparameters.lr",
    ),
    bad("epochs-0", {"hyperparameters": {"n_epochs": 0}}, "hyperparameters.n_epochs", "at least 1"),
    bad(
        "stopping",
        {"hyperparameters": {"early_stopping_patience": 2}},
        "hyperparameters.early_stopping_patience",
    ),
    bad("reinforcement", {"method": {"type": "reinforcement"}}, "method.type", "not available"),
    bad("devices", {"olora": {"devices": 2}}, "olora.devices", "runs on one device", code=None),
    bad("priority", {"olora": {"priorty": 2}}, "olora.priorty", "did you mean 'priority'?", code=None),
    bad("suffix", {"suffix": "x"}, "suffix", "suffix is unknown", code=None),
    bad("trackers", {"integrations": []}, "integrations", "integrations is unknown", code=None),
    bad("model", {"model": "olora-tyni"}, "model", "did you mean 'olora-tiny'?", code="model_not_available"),
    bad(
        "metadata",
        {"metadata": {"k": "x" * 513}},
        "metadata.k",
        "at most 512 characters (got 513)",
        code=None,
    ),
    bad(
        "no-file",
        {"training_file": "file-none"},
        "training_file",
        "there is no file",
        code="invalid_training_file",
    ),
    bad(
        "no-validation-file",
        {"validation_file": "file-none"},
        "validation_file",
        "there is no file",
        code="invalid_validation_file",
    ),
)


@pytest.mark.parametrize(("body", "code", "param", "says"), BAD_BODIES)
def test_a_comparison_that_cannot_be_is_refused(
    body: dict[str, Any],
    code: str | None,
    param: str,
    says: tuple[str, ...],
    client: TestClient,
    settings: Settings,
) -> None:
    body = {"training_file": uploaded(client), "validation_file": uploaded(client), **body}
    before = left_behind(client, settings)
    assert_refused(compare(client, **body), code=code, param=param, says=says)
    assert left_behind(client, settings) == before
    assert client.get("/v1/comparisons").json()["data"] == []


def test_a_comparison_on_files_that_do_not_go_together_fails_and_says_so(client: TestClient) -> None:
    made = compared(client, validation_file=uploaded(client, completion_file()))
    ended = eventually(lambda: (now := comparison(client, made["id"]))["status"] == "failed" and now)
    assert ended["error"]["param"] == "validation_file"


def test_the_schema_describes_what_a_comparison_may_ask_for(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/comparisons"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert {"model", "training_file"} == set(body["required"])
    assert json.dumps(body)
