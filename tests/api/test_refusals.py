"""An invalid request is refused at once, with place and remedy, and leaves nothing behind."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from store.settings import Settings
from tests.rows import chat_file, chat_row, completion_file, jsonl

from .calls import (
    create,
    created,
    job,
    settled,
    upload,
    uploaded,
)


def left_behind(client: TestClient, settings: Settings) -> tuple[list[str], list[str], list[str]]:
    """Ids of the listed files and jobs, and the names of stored files."""
    listed = [file["id"] for file in client.get("/v1/files").json()["data"]]
    jobs = [job["id"] for job in client.get("/v1/fine_tuning/jobs").json()["data"]]
    stored = [path.name for path in settings.storage_folder.rglob("*") if path.is_file()]
    return listed, jobs, stored


def assert_refused(
    answer: Any, *, status: int = 400, code: str | None, param: str | None, says: tuple[str, ...]
) -> None:
    error = answer.json()["error"]
    assert answer.status_code == status, error
    assert set(error) - {"details"} == {"message", "type", "param", "code"}
    assert (error["code"], error["param"]) == (code, param)
    assert error["type"] == "invalid_request_error"
    for words in says:
        assert words in error["message"]


@dataclass(frozen=True)
class BadUpload:
    name: str
    content: bytes
    code: str
    says: tuple[str, ...]


BAD_UPLOADS = (
    BadUpload("prose", b"Question, reply\nand so on.\n", "data_type", ("JSONL format", "Line 1", "Question")),
    BadUpload("csv", b'prompt,completion\na,"b\n', "data_type", ("begins on line 2", "Close every quote")),
    BadUpload("array", b'[{"text": "a"}, {"text"', "data_type", ("Element 2 is not JSON",)),
    BadUpload(
        "parquet", b"PAR1" + bytes(100), "data_type", ("Parquet file cannot be read", "write it again")
    ),
    BadUpload("list", b"[1, 2]\n", "data_type", ("Line 1 is not a dictionary", "each element of the list")),
    BadUpload("broken-third-line", chat_file(2) + b'{"messages": [\n', "data_type", ("Line 3", "one line")),
    BadUpload(
        "latin-1",
        '{"text": "café"}\n'.encode("latin-1"),
        "data_type",
        ("not UTF-8", "Save the file as UTF-8"),
    ),
    BadUpload(
        "utf-16", '{"text": "a"}\n'.encode("utf-16"), "data_type", ("UTF-16", "Save the file as UTF-8")
    ),
    BadUpload("zip", b"PK\x03\x04" + bytes(100), "data_type", ("zip archive", "JSONL text itself")),
    BadUpload("empty", b"", "empty_file", ("empty", "one JSON object per line")),
    BadUpload("only-blank-lines", b"\n\n  \n", "empty_file", ("empty",)),
    BadUpload("not-a-number", b'{"messages": NaN}\n', "data_type", ("Line 1", "NaN", "finite number")),
    BadUpload("long-line", b'{"text": "' + b"a" * 1000 + b'"', "data_type", ("Line 1",)),
)


@pytest.mark.parametrize("bad", BAD_UPLOADS, ids=lambda bad: bad.name)
def test_a_file_that_is_not_jsonl_is_refused(bad: BadUpload, client: TestClient, settings: Settings) -> None:
    answer = upload(client, bad.content)
    assert_refused(answer, code=bad.code, param="file", says=bad.says)
    assert left_behind(client, settings) == ([], [], [])


def test_every_broken_line_is_listed_and_counted(client: TestClient) -> None:
    answer = upload(client, chat_file(1) + b"no\n" * 60)
    error = answer.json()["error"]
    assert "Line 2" in error["message"]
    assert "and 59 more errors" in error["message"]
    assert [detail["line"] for detail in error["details"]] == list(range(2, 52))
    assert all(detail["fix"] for detail in error["details"])


ANCHOR, SECONDS = "expires_after[anchor]", "expires_after[seconds]"


def bad_form(name: str, param: str, says: str, **fields: str) -> Any:
    return pytest.param(fields, param, says, id=name)


def bad_expiry(name: str, anchor: str, seconds: str, param: str, says: str) -> Any:
    return pytest.param({ANCHOR: anchor, SECONDS: seconds}, param, says, id=name)


BAD_FORMS = (
    bad_form("purpose", "purpose", "'fine_tune' is unknown (did you mean 'fine-tune'?)", purpose="fine_tune"),
    bad_form(
        "purposes", "purpose", "It must be one of: fine-tune, fine-tune-adapter, assistants", purpose="x"
    ),
    bad_form("results", "purpose", "'fine-tune-results' is unknown", purpose="fine-tune-results"),
    bad_form("unknown", "purpos", "'purpos' is unknown (did you mean 'purpose'?)", purpos="x"),
    bad_expiry("anchor", "now", "3600", ANCHOR, "must be 'created_at'"),
    bad_expiry("soon", "created_at", "3599", SECONDS, "from 3600 to 2592000"),
    bad_expiry("late", "created_at", "2592001", SECONDS, "from 3600 to 2592000"),
    bad_expiry("words", "created_at", "never", SECONDS, "not 'never'"),
    bad_expiry("long", "x" * 2000, "3600", ANCHOR, "longer than 1000 bytes"),
    pytest.param({ANCHOR: "created_at"}, ANCHOR, "needs both", id="no-seconds"),
)


@pytest.mark.parametrize(("fields", "param", "says"), BAD_FORMS)
def test_a_wrong_form_is_refused(
    fields: dict[str, str], param: str, says: str, client: TestClient, settings: Settings
) -> None:
    assert_refused(upload(client, **fields), code=None, param=param, says=(says,))
    assert left_behind(client, settings) == ([], [], [])


def test_a_form_without_a_file_or_a_purpose_is_refused(client: TestClient, settings: Settings) -> None:
    no_file = client.post("/v1/files", data={"purpose": "fine-tune"}, files={"purpose2": b""})
    assert_refused(no_file, code=None, param="purpose2", says=("unknown",))
    no_purpose = client.post("/v1/files", files={"file": ("a", chat_file())})
    assert_refused(no_purpose, code=None, param="purpose", says=("purpose is missing",))
    two = client.post(
        "/v1/files",
        data={"purpose": "fine-tune"},
        files=[("file", ("a", chat_file())), ("file", ("b", chat_file()))],
    )
    assert_refused(two, code=None, param="file", says=("two files",))
    plain = client.post("/v1/files", json={"purpose": "fine-tune"})
    assert_refused(plain, code=None, param=None, says=("multipart/form-data",))
    assert left_behind(client, settings) == ([], [], [])


def test_a_file_above_the_limit_is_refused(client: TestClient, settings: Settings) -> None:
    answer = upload(client, chat_file() + b" " * 2**20)
    assert_refused(
        answer, status=413, code="file_too_large", param="file", says=("1 MB", "OLORA_MAX_UPLOAD_MB")
    )
    assert left_behind(client, settings) == ([], [], [])


def bad(name: str, body: dict[str, Any], param: str | None, *says: str, code: str | None = None) -> Any:
    return pytest.param(body, code, param, says, id=name)


def misfit(name: str, place: str, value: Any, *says: str) -> Any:
    """A value that the spec refuses, at a dotted place of the body."""
    body: Any = value
    for key in reversed(place.split(".")):
        body = {key: body}
    return bad(name, body, place, *says, code="invalid_request")


DEEP: list[Any] = []
for _ in range(40):
    DEEP = [DEEP]
NEW, OLD = {"n_epochs": 3}, {"n_epochs": 2}
SUPERVISED = {"type": "supervised"}
NO_MODEL = "model_not_available"

BAD_BODIES = (
    bad(
        "unknown-model",
        {"model": "olora-tyni"},
        "model",
        "'olora-tyni'",
        "did you mean 'olora-tiny'?",
        code=NO_MODEL,
    ),
    bad("known-models", {"model": "gpt-4o"}, "model", "Available: olora-tiny", code=NO_MODEL),
    bad("fine-tuned-model", {"model": "ft:a:b::c"}, "model", "no fine-tuned model", code=NO_MODEL),
    bad("no-model", {"model": None}, "model", "model must be a string (got None)."),
    bad("number-as-model", {"model": 7}, "model", "model must be a string (got 7)."),
    bad("no-file", {"training_file": None}, "training_file", "string"),
    bad("unknown-field", {"hyperparams": {}}, "hyperparams", "unknown", "did you mean 'hyperparameters'?"),
    bad("status", {"status": "succeeded"}, "status", "status is unknown"),
    misfit("unknown-method", "method.type", "superwised", "'superwised'", "use 'supervised'"),
    misfit("reinforcement", "method.type", "reinforcement", "not available"),
    misfit("beta-without-dpo", "hyperparameters.beta", 0.1, "method.type 'dpo'"),
    bad(
        "large-beta",
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 3}}}},
        "method.dpo.hyperparameters.beta",
        "at most 2",
        code="invalid_request",
    ),
    bad(
        "dpo-typo",
        {"method": {"type": "dpo", "dpo": {"hyperparams": {}}}},
        "method.dpo.hyperparams",
        "did you mean 'hyperparameters'?",
    ),
    bad("supervised-dpo", {"method": {"type": "dpo", "supervised": {}}}, "method.supervised", "leave it out"),
    bad("no-method-type", {"method": {}}, "method.type", "missing"),
    bad("two-methods", {"method": {**SUPERVISED, "dpo": {}}}, "method.dpo", "leave it out"),
    bad(
        "method-typo",
        {"method": {**SUPERVISED, "supervized": {}}},
        "method.supervized",
        "did you mean 'supervised'?",
    ),
    misfit(
        "unknown-adapter",
        "adapter.method",
        "olara",
        "'olara'",
        "did you mean 'olora'?",
        "Available: olora, lora",
    ),
    misfit("patience-0", "hyperparameters.early_stopping_patience", 0, "at least 1"),
    misfit("patience", "hyperparameters.early_stopping_patience", 2, "there is no validation_file"),
    misfit(
        "eval-steps", "method.supervised.hyperparameters.eval_steps", 9, "pass one, or leave the option out"
    ),
    bad("share-1", {"olora": {"validation_share": 1}}, "olora.validation_share", "less than 1 (got 1)"),
    bad("share-0", {"olora": {"validation_share": 0}}, "olora.validation_share", "greater than 0 (got 0)"),
    bad("share-text", {"olora": {"validation_share": "0.1"}}, "olora.validation_share", "must be a number"),
    bad(
        "group-alone",
        {"olora": {"group_by": "user"}},
        "olora.group_by",
        "olora.validation_share keeps together",
        code="invalid_request",
    ),
    misfit("min-delta", "hyperparameters.early_stopping_min_delta", 0.1, "early_stopping_patience"),
    bad(
        "noisy-dpo",
        {"method": {"type": "dpo", "dpo": {"hyperparameters": {"neftune_alpha": 5}}}},
        "method.dpo.hyperparameters.neftune_alpha",
        "is for method.type 'supervised'",
        code="invalid_request",
    ),
    misfit("lora-plus-0", "adapter.lora_plus_ratio", 0, "greater than 0"),
    misfit("adapter-typo", "adapter.ranc", 4, "did you mean 'rank'?"),
    misfit("rank-0", "adapter.rank", 0, "adapter.rank must be", "at least 1"),
    misfit("rank-5000", "adapter.rank", 5000, "at most 4096"),
    misfit("rank-as-text", "adapter.rank", "big", "must be a whole number (got 'big')."),
    misfit("alpha-0", "adapter.alpha", 0, "greater than 0"),
    misfit("dropout-1", "adapter.dropout", 1, "less than 1"),
    misfit("epochs-0", "hyperparameters.n_epochs", 0, "at least 1", "or 'auto'"),
    misfit("epochs-51", "hyperparameters.n_epochs", 51, "at most 50"),
    misfit("batch-257", "hyperparameters.batch_size", 257, "at most 256"),
    misfit("multiplier-0", "hyperparameters.learning_rate_multiplier", 0, "greater than 0"),
    misfit("in-method", "method.supervised.hyperparameters.n_epochs", 99, "n_epochs must be at most 50"),
    misfit("hyperparameter-typo", "hyperparameters.n_epoch", 3, "did you mean 'n_epochs'?"),
    misfit("full-fine-tuning", "hyperparameters.lora", False, "an adapter is always trained"),
    bad(
        "two-places",
        {"hyperparameters": OLD, "method": {**SUPERVISED, "supervised": {"hyperparameters": NEW}}},
        "hyperparameters.n_epochs",
        "contradicts",
        "give it once",
    ),
    bad(
        "two-rates",
        {"hyperparameters": {"learning_rate": 1e-3, "learning_rate_multiplier": 2}},
        "hyperparameters.learning_rate",
        "exclude each other",
        code="invalid_request",
    ),
    bad("suffix-empty", {"suffix": ""}, "suffix", "must have 1 or more characters (got '')."),
    bad("suffix-long", {"suffix": "x" * 65}, "suffix", "at most 64 characters"),
    bad("suffix-nul", {"suffix": "a\x00b"}, "suffix", "NUL"),
    bad("seed-negative", {"seed": -1}, "seed", "seed must be at least 0 (got -1)."),
    bad("seed-large", {"seed": 2**31}, "seed", "must be at most 2147483647"),
    bad("seed-true", {"seed": True}, "seed", "seed must be a whole number (got True)."),
    bad(
        "metadata-17", {"metadata": {str(n): "x" for n in range(17)}}, "metadata", "at most 16 pairs (got 17)"
    ),
    bad("metadata-key", {"metadata": {"k" * 65: "x"}}, "metadata", "1 to 64 characters (got 65)"),
    bad("metadata-value", {"metadata": {"k": "v" * 513}}, "metadata.k", "at most 512 characters (got 513)"),
    bad("metadata-number", {"metadata": {"k": 1}}, "metadata.k", "string"),
    bad("metadata-deep", {"metadata": DEEP}, "metadata" + "[0]" * 24, "nested more than 32 levels deep"),
    bad("priority-10", {"olora": {"priority": 10}}, "olora.priority", "must be at most 9"),
    bad("devices-0", {"olora": {"devices": 0}}, "olora.devices", "must be at least 1"),
    bad("devices-two", {"olora": {"devices": "2"}}, "olora.devices", "must be a whole number"),
    bad("finish-past", {"olora": {"finish_by": 1000}}, "olora.finish_by", "must be a time in the future"),
    bad(
        "finish-words", {"olora": {"finish_by": "soon"}}, "olora.finish_by", "must be unix seconds or a time"
    ),
    bad(
        "finish-no-zone",
        {"olora": {"finish_by": "2099-01-02T03:04:05"}},
        "olora.finish_by",
        "must be unix seconds or a time",
    ),
    bad("tokens-0", {"olora": {"max_train_tokens": 0}}, "olora.max_train_tokens", "must be at least 1"),
    bad("auto-start-no", {"olora": {"auto_start": "no"}}, "olora.auto_start", "auto_start"),
    bad("seconds-huge", {"olora": {"max_seconds": 10**400}}, "olora.max_seconds", "must be at most"),
    misfit("columns-key", "olora.columns", {"promt": "q"}, "did you mean 'prompt'?"),
    misfit(
        "columns-twice",
        "olora.columns",
        {"prompt": "q", "completion": "q"},
        "column 'q' is given for 'prompt' and for 'completion'",
    ),
    bad("columns-list", {"olora": {"columns": ["prompt"]}}, "olora.columns", "columns"),
    bad("columns-number", {"olora": {"columns": {"prompt": 1}}}, "olora.columns.prompt", "string"),
    bad("columns-none", {"olora": {"columns": {}}}, "olora.columns", "columns"),
    bad("option-typo", {"olora": {"priorty": 1}}, "olora.priorty", "did you mean 'priority'?"),
)


@pytest.mark.parametrize(("body", "code", "param", "says"), BAD_BODIES)
def test_a_job_that_cannot_be_is_refused(
    body: dict[str, Any],
    code: str | None,
    param: str | None,
    says: tuple[str, ...],
    client: TestClient,
    settings: Settings,
) -> None:
    if "type" not in body.get("method", SUPERVISED) and body["method"]:
        body = {"method": {**SUPERVISED, **body["method"]}}
    body.setdefault("training_file", uploaded(client))
    before = left_behind(client, settings)
    assert_refused(create(client, **body), code=code, param=param, says=says)
    assert left_behind(client, settings) == before


BAD_JSON = (
    pytest.param(b"{", "not JSON", id="broken"),
    pytest.param(b"", "not JSON", id="empty"),
    pytest.param(b"[]", "must be a JSON object, not a list", id="list"),
    pytest.param(b"3", "not a number", id="number"),
    pytest.param('{"suffix": "é"}'.encode("latin-1"), "not UTF-8", id="latin-1"),
    pytest.param(b'{"suffix": "\\ud800"}', "invalid character", id="surrogate"),
    pytest.param(b'{"seed": NaN}', "NaN", id="not-a-number"),
    pytest.param(b"[" * 100_000, "nested too deeply", id="nested"),
    pytest.param(b'{"seed": %s}' % (b"9" * 6000), "more than 4300 digits", id="digits"),
    pytest.param(b'{"a": {"b": [-%s]}}' % (b"9" * 6000), "more than 4300 digits", id="digits-inside"),
)


@pytest.mark.parametrize(("content", "says"), BAD_JSON)
def test_a_body_that_is_no_json_object_is_refused(content: bytes, says: str, client: TestClient) -> None:
    answer = client.post("/v1/fine_tuning/jobs", content=content)
    param = "suffix" if says == "invalid character" else None
    assert_refused(answer, code=None, param=param, says=(says,))


NO_ANSWER = {"messages": [{"role": "user", "content": "Anyone?"}]}
UNANSWERED = jsonl(*(chat_row(n) for n in range(11)), NO_ANSWER)
PREFERENCES = jsonl(*[{"prompt": "c", "chosen": "a", "rejected": "b"}] * 12)


def bad_data(name: str, code: str, *says: str, training: bytes = chat_file(), validation: bytes = b"") -> Any:
    return pytest.param(training, validation, code, says, id=name)


BAD_DATA = (
    bad_data("rows", "invalid_n_examples", "7 example(s)", "at least 10", "Add 3", training=chat_file(7)),
    bad_data("answer", "invalid_training_file", "Line 12", "no assistant", "Add the", training=UNANSWERED),
    bad_data("preferences", "unexpected_file_format", "preference data", training=PREFERENCES),
    bad_data("formats", "invalid_validation_file", "completion format", validation=completion_file()),
    bad_data("validation", "invalid_validation_file", "Line 1", "no assistant", validation=jsonl(NO_ANSWER)),
)


@pytest.mark.parametrize(("training", "validation", "code", "says"), BAD_DATA)
def test_a_job_on_data_that_cannot_be_trained_fails_and_says_why(
    training: bytes, validation: bytes, code: str, says: tuple[str, ...], client: TestClient
) -> None:
    body = {"training_file": uploaded(client, training)}
    if validation:
        body["validation_file"] = uploaded(client, validation)
    ended = settled(client, created(client, **body)["id"])
    assert ended["status"] == "failed"
    assert set(ended["error"]) == {"code", "message", "param"}
    assert ended["error"]["code"] == code
    assert ended["error"]["param"] == ("validation_file" if validation else "training_file")
    for words in says:
        assert words in ended["error"]["message"]
    assert isinstance(ended["finished_at"], int)
    assert (ended["result_files"], ended["fine_tuned_model"]) == ([], None)


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
@pytest.mark.parametrize("file_id", ["file-none", "../etc", "", "x" * 65])
def test_a_job_on_a_file_that_never_was_is_refused(field: str, file_id: str, client: TestClient) -> None:
    answer = create(client, **{field: file_id})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


Prepare = Callable[[TestClient], str]


def _deleted(client: TestClient) -> str:
    file_id = uploaded(client)
    assert client.delete(f"/v1/files/{file_id}").json()["deleted"] is True
    return file_id


def _for_batches(client: TestClient) -> str:
    return uploaded(client, purpose="batch")


@pytest.mark.parametrize("field", ["training_file", "validation_file"])
@pytest.mark.parametrize(
    ("prepare", "says"), [(_deleted, "may have been deleted"), (_for_batches, "purpose 'fine-tune'")]
)
def test_a_job_on_a_file_that_is_none_is_refused(
    field: str, prepare: Prepare, says: str, client: TestClient
) -> None:
    answer = create(client, **{field: prepare(client)})
    assert_refused(answer, code=f"invalid_{field}", param=field, says=(says,))
    assert client.get("/v1/fine_tuning/jobs").json()["data"] == []


def test_a_job_on_another_projects_file_is_refused(client: TestClient, stranger: TestClient) -> None:
    answer = create(client, training_file=uploaded(stranger))
    assert_refused(answer, code="invalid_training_file", param="training_file", says=("no file",))


def test_a_base_folder_without_safetensors_is_refused_with_its_remedy(
    client: TestClient, settings: Settings
) -> None:
    assert settings.models_dir is not None
    folder: Path = settings.models_dir / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    answer = create(client, model="pickled")
    assert_refused(
        answer,
        code="model_not_available",
        param="model",
        says=("'pickled'", "safetensors", "save_pretrained"),
    )
    assert "pickled" not in [model["id"] for model in client.get("/v1/models").json()["data"]]
    (folder / "config.json").unlink()
    assert_refused(
        create(client, model="pickled"), code="model_not_available", param="model", says=("config.json",)
    )


BAD_QUERIES = (
    ("/v1/files?limit=0", "limit"),
    ("/v1/files?limit=10001", "limit"),
    ("/v1/files?limit=many", "limit"),
    ("/v1/files?order=up", "order"),
    ("/v1/files?after=file-none", "after"),
    ("/v1/fine_tuning/jobs?limit=0", "limit"),
    ("/v1/fine_tuning/jobs?after=ftjob-none", "after"),
    ("/v1/fine_tuning/jobs?metadata=some", "metadata"),
    ("/v1/fine_tuning/jobs?metadata=null&metadata[a]=b", "metadata"),
)


@pytest.mark.parametrize(("url", "param"), BAD_QUERIES)
def test_a_query_that_does_not_fit_is_refused(url: str, param: str, client: TestClient) -> None:
    answer = client.get(url)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param in error["message"]
    assert "Input should" not in error["message"]


def test_pages_of_events_and_checkpoints_refuse_unknown_cursors(client: TestClient) -> None:
    made = created(client)["id"]
    for list_name in ("events", "checkpoints"):
        for query in ("after=ftevent-none", "limit=0"):
            answer = client.get(f"/v1/fine_tuning/jobs/{made}/{list_name}?{query}")
            assert answer.status_code == 400
            assert answer.json()["error"]["param"] == query.partition("=")[0]
    url = f"/v1/fine_tuning/jobs/{made}/events?stream=true"
    assert client.get(f"{url}&after=ftevent-none").json()["error"]["param"] == "after"
    answer = client.get(url, headers={"Last-Event-ID": "nope"})
    assert_refused(answer, code="invalid_cursor", param="Last-Event-ID", says=("Last-Event-ID = 'nope'",))
    assert "after" not in answer.text


def test_a_job_that_has_ended_cannot_be_cancelled(client: TestClient) -> None:
    ended = settled(client, created(client, training_file=uploaded(client, chat_file(3)))["id"])
    answer = client.post(f"/v1/fine_tuning/jobs/{ended['id']}/cancel")
    assert_refused(answer, code="invalid_job_state", param=None, says=("already failed",))
    assert job(client, ended["id"]) == ended
