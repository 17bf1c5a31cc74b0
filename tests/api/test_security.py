"""Access: every route, without a key, with a wrong one, and on another project's objects."""

import json
import re
from dataclasses import dataclass

import pytest
from fastapi.routing import iter_route_contexts
from starlette.testclient import TestClient

from api.main import create_app
from api.security import JSON_BODY_BYTES
from store.keys import revoke_key
from store.models import Job, Key
from store.session import make_engine, sessions
from store.settings import Settings

from .calls import compared_to_the_end, created, finished
from .serving import KEY

BOTH_DATABASES = pytest.mark.parametrize("settings", ["sqlite_url", "postgres_url"], indirect=True)

OWN = "own"
"""The route answers about the caller's own objects and shows nothing of another project."""
HIDDEN = 404
"""Another project's object is answered like one that does not exist."""
LATER = "later"
OPEN = "open"

MATRIX: dict[tuple[str, str], object] = {
    ("GET", "/openapi.json"): OWN,
    ("HEAD", "/openapi.json"): OWN,
    ("GET", "/healthz"): OPEN,
    ("GET", "/readyz"): OPEN,
    ("POST", "/v1/files"): OWN,
    ("GET", "/v1/files"): OWN,
    ("GET", "/v1/files/{file_id}"): HIDDEN,
    ("DELETE", "/v1/files/{file_id}"): HIDDEN,
    ("GET", "/v1/files/{file_id}/content"): HIDDEN,
    ("POST", "/v1/fine_tuning/jobs"): OWN,
    ("GET", "/v1/fine_tuning/jobs"): OWN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}"): HIDDEN,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/cancel"): HIDDEN,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/pause"): HIDDEN,
    ("POST", "/v1/fine_tuning/jobs/{job_id}/resume"): HIDDEN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints"): HIDDEN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/checkpoints/{checkpoint_id}/adapter"): HIDDEN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/adapter"): HIDDEN,
    ("HEAD", "/v1/fine_tuning/jobs/{job_id}/adapter"): HIDDEN,
    ("GET", "/v1/fine_tuning/jobs/{job_id}/events"): HIDDEN,
    ("POST", "/v1/comparisons"): OWN,
    ("GET", "/v1/comparisons"): OWN,
    ("GET", "/v1/comparisons/{comparison_id}"): HIDDEN,
    ("POST", "/v1/comparisons/{comparison_id}/cancel"): HIDDEN,
    ("POST", "/v1/comparisons/{comparison_id}/pause"): HIDDEN,
    ("POST", "/v1/comparisons/{comparison_id}/resume"): HIDDEN,
    ("GET", "/v1/comparisons/{comparison_id}/events"): HIDDEN,
    ("GET", "/v1/comparisons/{comparison_id}/report"): HIDDEN,
    ("GET", "/v1/models"): OWN,
    ("GET", "/v1/models/{model:path}"): HIDDEN,
    ("DELETE", "/v1/models/{model:path}"): HIDDEN,
    ("GET", "/v1/adapter_methods"): OWN,
    ("POST", "/v1/uploads"): LATER,
    ("POST", "/v1/uploads/{upload_id}/parts"): LATER,
    ("POST", "/v1/uploads/{upload_id}/complete"): LATER,
    ("POST", "/v1/uploads/{upload_id}/cancel"): LATER,
    ("POST", "/v1/fine_tuning/checkpoints/{model:path}/permissions"): LATER,
    ("GET", "/v1/fine_tuning/checkpoints/{model:path}/permissions"): LATER,
    ("DELETE", "/v1/fine_tuning/checkpoints/{model:path}/permissions/{permission_id}"): LATER,
    ("POST", "/v1/fine_tuning/alpha/graders/validate"): LATER,
    ("POST", "/v1/fine_tuning/alpha/graders/run"): LATER,
    ("GET", "/v1/webhook_endpoints"): LATER,
    ("POST", "/v1/webhook_endpoints"): LATER,
    ("GET", "/v1/webhook_endpoints/{endpoint_id}"): LATER,
    ("POST", "/v1/webhook_endpoints/{endpoint_id}"): LATER,
    ("DELETE", "/v1/webhook_endpoints/{endpoint_id}"): LATER,
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/rotate_secret"): LATER,
    ("POST", "/v1/webhook_endpoints/{endpoint_id}/test"): LATER,
    ("GET", "/v1/webhook_event_types"): LATER,
}


def routes(settings: Settings) -> set[tuple[str, str]]:
    """(method, path) of every route that the application itself knows."""
    contexts = iter_route_contexts(create_app(settings).routes)
    return {(method, route.path) for route in contexts for method in route.methods or ()}


def test_every_route_has_a_row_in_the_matrix(settings: Settings) -> None:
    assert routes(settings) == set(MATRIX)


@dataclass(frozen=True)
class Things:
    """One finished job and one finished comparison of the first project, and all that belongs to them."""

    job_id: str
    file_id: str
    model: str
    comparison_id: str

    def at(self, path: str) -> str:
        known = {**vars(self), "model:path": self.model}
        return re.sub(r"\{([^}]+)\}", lambda found: known.get(found[1], "some-id"), path)


@pytest.fixture
def things(client: TestClient, settings: Settings) -> Things:
    done = finished(client, settings)
    compared = compared_to_the_end(client, settings, training_file=done["training_file"])
    return Things(done["id"], done["training_file"], done["fine_tuned_model"], compared["id"])


def test_without_a_key_or_with_a_wrong_one_every_route_answers_alike(
    client: TestClient, things: Things
) -> None:
    anonymous = TestClient(client.app)
    wrong = ({}, {"authorization": "Bearer wrong"}, {"authorization": KEY}, {"authorization": f"Basic {KEY}"})
    answers = set()
    for (method, path), rule in MATRIX.items():
        for headers in wrong if rule != OPEN else ({},):
            answer = anonymous.request(method, things.at(path), headers=headers)
            assert (answer.status_code == 401) == (rule != OPEN), (method, path, headers)
            if rule != OPEN and method != "HEAD":
                answers.add(answer.text)
    (body,) = answers
    assert json.loads(body)["error"]["code"] == "invalid_api_key"


def test_what_does_not_exist_is_not_told_without_a_key(client: TestClient) -> None:
    anonymous = TestClient(client.app)
    for path in ("/", "/v1", "/v2/files", "/v1/files/", "/docs", "/redoc", "/metrics", "/healthz/"):
        answer = anonymous.get(path)
        assert answer.status_code == 401
        assert client.get(path).status_code == 404


@BOTH_DATABASES
def test_another_projects_things_do_not_exist(
    client: TestClient, stranger: TestClient, things: Things
) -> None:
    """The answer is the same as for an id that never existed, except for the id itself."""
    nothing = Things("ftjob-never", "file-never", "ft:never", "cmp-never")
    for (method, path), rule in MATRIX.items():
        if rule != HIDDEN:
            continue
        foreign = stranger.request(method, things.at(path))
        never = stranger.request(method, nothing.at(path))
        assert foreign.status_code == never.status_code == 404, (method, path)
        told = foreign.text
        for mine, unknown in zip(vars(things).values(), vars(nothing).values(), strict=True):
            told = told.replace(mine, unknown)
        assert told == never.text
    assert client.get(f"/v1/fine_tuning/jobs/{things.job_id}").json()["status"] == "succeeded"
    assert client.get(f"/v1/models/{things.model}").status_code == 200


@BOTH_DATABASES
def test_lists_show_the_callers_own_things_alone(
    client: TestClient, stranger: TestClient, things: Things
) -> None:
    theirs = created(stranger)
    assert [file["id"] for file in stranger.get("/v1/files").json()["data"]] == [theirs["training_file"]]
    assert [job["id"] for job in stranger.get("/v1/fine_tuning/jobs").json()["data"]] == [theirs["id"]]
    assert [model["id"] for model in stranger.get("/v1/models").json()["data"]] == ["olora-tiny"]
    assert stranger.get("/v1/comparisons").json()["data"] == []
    assert theirs["id"] not in client.get("/v1/fine_tuning/jobs").text
    for url, mine in (
        ("/v1/files", things.file_id),
        ("/v1/fine_tuning/jobs", things.job_id),
        ("/v1/comparisons", things.comparison_id),
    ):
        assert stranger.get(f"{url}?after={mine}").status_code == 400


def test_routes_of_later_say_so(client: TestClient, things: Things) -> None:
    for (method, path), rule in MATRIX.items():
        if rule == LATER:
            answer = client.request(method, things.at(path))
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_available_yet")
            assert "not available yet" in answer.json()["error"]["message"]


@BOTH_DATABASES
def test_a_revoked_key_is_refused_at_once(
    client: TestClient, stranger: TestClient, settings: Settings
) -> None:
    assert stranger.get("/v1/files").status_code == 200
    engine = make_engine(settings.database_url)
    with sessions(engine).begin() as session:
        for key in session.query(Key).where(Key.project_id == "other"):
            revoke_key(session, key)
    engine.dispose()
    assert stranger.get("/v1/files").status_code == 401
    assert client.get("/v1/files").status_code == 200


@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
def test_the_schemes_case_does_not_matter(scheme: str, client: TestClient) -> None:
    assert client.get("/v1/files", headers={"authorization": f"{scheme}  {KEY} "}).status_code == 200


def test_every_answer_is_marked_and_hardened(client: TestClient) -> None:
    seen = set()
    for path in ("/healthz", "/v1/files", "/v1/files/none", "/nowhere", "/v1/files?limit=x"):
        answer = client.get(path)
        seen.add(answer.headers["x-request-id"])
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "access-control-allow-origin" not in answer.headers
        assert "server" not in answer.headers
    assert len(seen) == 5
    assert all(re.fullmatch("req_[0-9a-f]{32}", mark) for mark in seen)


def test_a_json_body_has_a_limit(client: TestClient) -> None:
    body = json.dumps({"model": "m", "suffix": "x" * JSON_BODY_BYTES}).encode()

    def in_pieces():  # type: ignore[no-untyped-def]
        for start in range(0, len(body), 50_000):
            yield body[start : start + 50_000]

    for content in (body, in_pieces()):
        answer = client.post("/v1/fine_tuning/jobs", content=content)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "request_too_large")
    just_fits = body[: JSON_BODY_BYTES - 3] + b'"}'
    assert client.post("/v1/fine_tuning/jobs", content=just_fits).status_code == 400


PATHS = (
    "/v1/files/..%2f..%2fapi_key",
    "/v1/files/%2e%2e%2f%2e%2e%2fapi_key/content",
    "/v1/files/..%252f..%252fapi_key/content",
    "/v1/files/....//....//api_key/content",
    "/v1/models/../../../etc/passwd",
    "/v1/models/..%2f..%2f..%2fexamples%2fbase",
    "/v1/models/%5c..%5capi_key",
    "/v1/models//etc/passwd",
    "/v1/files/%00",
    "/v1/files?after=%00",
    "/v1/files/%ff%fe",
    "/v1/files/\u202e",
    "/v1/models/CON",
    "/v1/models/",
)


@BOTH_DATABASES
def test_a_path_leads_nowhere_else(client: TestClient) -> None:
    for path in PATHS:
        answer = client.get(path)
        assert answer.status_code in (400, 404), path
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert "root:" not in answer.text
        assert KEY not in answer.text


def test_no_answer_tells_of_the_machine(client: TestClient, settings: Settings, things: Things) -> None:
    """No answer contains a traceback or a path."""
    texts = []
    for method, path in MATRIX:
        if method in ("GET", "POST"):
            texts += [client.request(method, things.at(path)).text, client.request(method, f"{path}/x").text]
    texts.append(client.post("/v1/fine_tuning/jobs", json={"model": "/etc", "training_file": "/x"}).text)
    for text in texts:
        assert "Traceback" not in text
        assert str(settings.home) not in text
        assert not re.search(r"/(home|root|usr|tmp|work|var)/", text), text[:300]


def test_what_nobody_expected_is_a_500_without_details(
    client: TestClient, settings: Settings, things: Things, caplog: pytest.LogCaptureFixture
) -> None:
    engine = make_engine(settings.database_url)
    with sessions(engine).begin() as session:
        for row in session.query(Job):
            row.spec, row.resolved = {"secret": "canary"}, None
    engine.dispose()
    answer = client.get(f"/v1/fine_tuning/jobs/{things.job_id}")
    mark = answer.headers["x-request-id"]
    assert answer.status_code == 500
    assert answer.json() == {
        "error": {
            "message": f"Internal error. The service's log has the details under {mark}.",
            "type": "server_error",
            "param": None,
            "code": "internal_error",
        }
    }
    assert mark in caplog.text
    assert "KeyError" in caplog.text


def test_a_method_that_a_route_does_not_take_is_answered_with_those_it_takes(client: TestClient) -> None:
    for path, allowed in (("/v1/files", "GET, POST"), ("/v1/models/a/b", "DELETE, GET")):
        answer = client.patch(path)
        assert (answer.status_code, answer.headers["allow"]) == (405, allowed)
        assert allowed in answer.json()["error"]["message"]


def test_host_names_may_be_restricted(settings: Settings) -> None:
    restricted = settings.model_copy(update={"allowed_hosts": ("127.0.0.1", "*.Example.org")})
    with TestClient(create_app(restricted), headers={"authorization": f"Bearer {KEY}"}) as client:
        for host in ("127.0.0.1:8000", "tune.example.org", "TUNE.example.org:443"):
            assert client.get("/v1/files", headers={"host": host}).status_code == 200
        for host in ("attacker.net", "example.org.attacker.net", "testserver", ""):
            answer = client.get("/v1/files", headers={"host": host})
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_host")


def test_a_websocket_is_turned_away(client: TestClient) -> None:
    from starlette.websockets import WebSocketDisconnect

    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/files"):
        raise AssertionError("it was let in")


def test_the_schema_describes_what_a_job_may_ask_for(client: TestClient) -> None:
    schema = client.get("/openapi.json").json()
    body = schema["paths"]["/v1/fine_tuning/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert {"model", "training_file", "adapter", "olora"} <= set(body["schema"]["properties"])
