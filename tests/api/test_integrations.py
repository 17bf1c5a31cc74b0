"""A job's trackers: validated, stored and shown; no request carries an account."""

from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from api.main import create_app
from store.settings import Settings, read_settings

from .calls import create, created, job
from .serving import KEY

WANDB = {"type": "wandb", "wandb": {"project": "tuning"}}
MLFLOW = {"type": "mlflow", "mlflow": {"experiment": "tuning"}}
CANARIES = {
    "wandb_api_key": "canary-of-the-key",
    "wandb_base_url": "https://canary-of-the-server",
    "mlflow_tracking_uri": "https://canary:canary@canary-of-mlflow",
    "mlflow_token": "canary-of-the-token",
}


def with_trackers(settings: Settings, **values: Any) -> TestClient:
    """An application on the same database that is configured for trackers."""
    changed = settings.model_copy(update={**read_settings(**values).model_dump(include=set(values))})
    return TestClient(create_app(changed), headers={"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)
def test_what_a_job_asks_for_is_shown_on_it(client: TestClient, settings: Settings) -> None:
    full = {
        "type": "wandb",
        "wandb": {"project": "tuning", "entity": "search", "name": "first", "tags": ["a", "b"]},
    }
    tagged = {"type": "mlflow", "mlflow": {"experiment": "e/1", "run_name": "r", "tags": {"team": "search"}}}
    with with_trackers(settings, **CANARIES) as open_to_both:
        made = created(open_to_both, integrations=[full, tagged])
        assert made["integrations"] == [full, tagged]
        assert job(open_to_both, made["id"])["integrations"] == [full, tagged]
        assert "canary" not in str(made)
        [shown] = created(open_to_both, integrations=[WANDB])["integrations"]
    assert shown == {
        "type": "wandb",
        "wandb": {"project": "tuning", "entity": None, "name": None, "tags": None},
    }


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        (WANDB, "OLORA_WANDB_API_KEY, or OLORA_WANDB_MODE to offline"),
        (MLFLOW, "OLORA_MLFLOW_TRACKING_URI"),
    ],
    ids=["wandb", "mlflow"],
)
def test_a_tracker_that_is_not_set_up_is_refused_with_the_remedy(
    asked: dict[str, Any], remedy: str, client: TestClient
) -> None:
    answer = create(client, integrations=[asked])
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "integration_not_configured")
    assert error["param"] == "integrations[0].type"
    assert remedy in error["message"]


def test_offline_runs_need_no_key(client: TestClient, settings: Settings) -> None:
    with with_trackers(settings, wandb_mode="offline") as offline:
        assert created(offline, integrations=[WANDB])["integrations"][0]["type"] == "wandb"


def wandb(**values: Any) -> dict[str, Any]:
    return {"type": "wandb", "wandb": {"project": "p", **values}}


def mlflow(**values: Any) -> dict[str, Any]:
    return {"type": "mlflow", "mlflow": {"experiment": "e", **values}}


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"a": 1}, "integrations", "list"),
        ([WANDB] * 6, "integrations", "at most 5 entries (got 6)"),
        ([WANDB, WANDB], "integrations[1]", "same destination as an earlier integration"),
        (["wandb"], "integrations[0]", "must be an object"),
        ([{"type": "comet"}], "integrations[0].type", "'wandb' or 'mlflow'"),
        ([{"type": ["wandb"]}], "integrations[0].type", "'wandb' or 'mlflow'"),
        ([{"type": "wandb"}], "integrations[0].wandb", "is missing"),
        ([{"type": "wandb", "wandb": {}}], "integrations[0].wandb.project", "is missing"),
        ([wandb(projcet="x")], "integrations[0].wandb.projcet", "did you mean 'project'?"),
        ([wandb(api_key="x")], "integrations[0].wandb.api_key", "is unknown"),
        ([{**WANDB, "mlflow": {}}], "integrations[0].mlflow", "is unknown"),
        ([wandb(project="a/b")], "integrations[0].wandb.project", "without /"),
        ([wandb(project="x" * 129)], "integrations[0].wandb.project", "at most 128"),
        ([wandb(name="a\nb")], "integrations[0].wandb.name", "control characters"),
        ([wandb(tags=["x" * 65])], "integrations[0].wandb.tags.0", "at most 64"),
        ([wandb(tags="x")], "integrations[0].wandb.tags", "list"),
        ([mlflow(experiment="")], "integrations[0].mlflow.experiment", "1 or more characters"),
        ([mlflow(tags={"mlflow.user": "x"})], "integrations[0].mlflow.tags", "'mlflow.'"),
        ([mlflow(tags={"a": 1})], "integrations[0].mlflow.tags.a", "string"),
    ],
)
def test_an_integration_that_does_not_fit_is_refused_with_its_place(
    asked: Any, param: str, says: str, client: TestClient, settings: Settings, tmp_path: Path
) -> None:
    with with_trackers(settings, **CANARIES) as open_to_both:
        answer = create(open_to_both, integrations=asked)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]
