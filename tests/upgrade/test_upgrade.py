"""A home of commit 0558508 is upgraded, and this version finishes the work that was left undone in it.

The home and what is known of it were made by the service of that commit; see `make_home.py`.
"""

import hashlib
import io
import json
import math
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from safetensors.numpy import load
from sqlalchemy import text

from store.session import make_engine
from tests.cli.running import Serving, olora, serving

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
COMMIT = "0558508"
KNOWN = json.loads((HERE / f"home-{COMMIT}.json").read_text())
NAMES = list(KNOWN["sqlite"]["work"])
ENDED = ("succeeded", "failed", "cancelled")
RENAMED = {
    "trained_numbers": "trainable_parameters",
    "yardstick": "baseline",
    "steps_to_yardstick": "steps_to_baseline",
    "below_yardstick": "below_baseline",
}
ADDED = ("alpha", "scale", "scale_range", "options", "match_budget", "before_budget")
"""What a report says of each method since format 3."""
UNFINISHED_SECONDS = 240.0
SAME = 1e-3
"""Relative difference of losses that another processor's rounding may make in 96 steps."""


def named(*statuses: str, comparisons: bool) -> list[str]:
    """The work that had one of these statuses when the home was made."""
    return [
        name
        for name in NAMES
        if KNOWN["sqlite"]["work"][name]["status"] in statuses
        and name.startswith("comparison") == comparisons
    ]


RESUMED = ["adalora_handed_back", "cola_handed_back", "interrupted"]


def today(value: Any) -> Any:
    """What the old service told, in the words of this version."""
    if isinstance(value, dict):
        return {RENAMED.get(name, name): today(item) for name, item in value.items()}
    return [today(item) for item in value] if isinstance(value, list) else value


@dataclass
class Upgraded:
    """The service of this version on the old home, once nothing is left to be done."""

    known: dict[str, Any]
    client: httpx.Client
    serving: Serving

    def get(self, path: str, **params: Any) -> Any:
        answer = self.client.get(path, params=params)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def content(self, file_id: str) -> bytes:
        answer = self.client.get(f"files/{file_id}/content")
        assert answer.status_code == 200, answer.text
        return answer.content

    def before(self, name: str) -> dict[str, Any]:
        """What the old service told of a job or comparison."""
        known: dict[str, Any] = self.known["work"][name]
        return known

    def twin(self, name: str) -> dict[str, Any]:
        """What it told of the same request, worked on to its end."""
        return self.before(self.before(name)["twin"])

    def path(self, name: str) -> str:
        made = self.before(name)["id"]
        return f"comparisons/{made}" if made.startswith("cmp-") else f"fine_tuning/jobs/{made}"

    def now(self, name: str) -> Any:
        return self.get(self.path(name))

    def events(self, name: str) -> list[dict[str, Any]]:
        """Oldest first."""
        return list(reversed(self.get(f"{self.path(name)}/events", limit=1000)["data"]))

    def messages(self, name: str) -> list[str]:
        return [event["message"] for event in self.events(name) if event["type"] == "message"]

    def warnings(self, name: str) -> list[str]:
        return [event["message"] for event in self.events(name) if event["level"] == "warn"]

    def losses(self, name: str) -> list[float]:
        """The training loss of every step, each of which is told once."""
        told = [event["data"] for event in self.events(name) if event["type"] == "metrics"]
        assert [data["step"] for data in told] == list(range(1, len(told) + 1))
        return [data["train_loss"] for data in told]

    def adapter(self, name: str) -> bytes:
        return self.content(self.now(name)["result_files"][1])

    def report(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"{self.path(name)}/report", format="json")
        return found

    def wait_for_all(self) -> None:
        until = time.monotonic() + UNFINISHED_SECONDS
        left = set(NAMES)
        while left:
            left = {name for name in left if self.now(name)["status"] not in ENDED}
            stuck = {name: (now["status"], now["olora"]) for name in left for now in [self.now(name)]}
            assert time.monotonic() < until, f"not within {UNFINISHED_SECONDS:g} s: {stuck}"
            time.sleep(0.2)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def upgraded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Upgraded]:
    folder, known = tmp_path_factory.mktemp("upgraded"), KNOWN[request.param]
    with tarfile.open(HERE / f"home-{COMMIT}.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    home, settings = folder / request.param, {"models_dir": str(folder / "models")}
    settings["database_url"] = f"sqlite:///{home / 'olora.db'}"
    if request.param == "postgresql":
        settings["database_url"] = request.getfixturevalue("own_postgres_url")
        restore(settings["database_url"], home / "dump.sql")
    migrated = olora(home, "migrate", **settings)
    assert migrated.returncode == 0, migrated.stderr
    assert rows(settings["database_url"], known["rows"]) == known["rows"]
    headers = {"Authorization": f"Bearer {(home / 'api_key').read_text().strip()}"}
    with (
        serving(home, **settings) as up,
        httpx.Client(base_url=f"{up.url}/", headers=headers, timeout=30) as client,
    ):
        service = Upgraded(known, client, up)
        service.wait_for_all()
        yield service


def restore(url: str, dump: Path) -> None:
    with psycopg.connect(url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(dump.read_bytes())


def rows(url: str, tables: dict[str, int]) -> dict[str, int]:
    """How many rows each table has."""
    engine = make_engine(url)
    with engine.connect() as connection:
        counted = {table: connection.scalar(text(f"SELECT count(*) FROM {table}")) or 0 for table in tables}
    engine.dispose()
    return counted


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


# --- what had ended ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", named(*ENDED, comparisons=False))
def test_a_job_that_had_ended_is_as_it_was(upgraded: Upgraded, name: str) -> None:
    before, now = upgraded.before(name), upgraded.now(name)
    error = now["error"] and now["error"]["message"]
    assert (now["status"], error) == (before["status"], before["error"])
    assert now["olora"]["attempt"] == before["attempt"]
    assert upgraded.losses(name) == before["losses"]
    assert len(upgraded.events(name)) == before["events"]
    if "adapter_sha256" in before:
        answer = upgraded.client.get(f"{upgraded.path(name)}/adapter")
        assert sha256(answer.content) == before["adapter_sha256"]
        assert sha256(upgraded.content(now["result_files"][0])) == before["csv_sha256"]
        assert now["olora"]["certificate"]["valid_loss_after"] == before["valid_loss_after"]
        assert now["fine_tuned_model"] == before["model"]
        assert upgraded.get(f"models/{before['model']}")["id"] == before["model"]


@pytest.mark.parametrize("name", named("failed", "cancelled", comparisons=True))
def test_a_comparison_without_a_report_is_as_it_was(upgraded: Upgraded, name: str) -> None:
    before, now = upgraded.before(name), upgraded.now(name)
    assert (now["status"], now["error"] and now["error"]["message"]) == (before["status"], before["error"])
    assert (now["results"], now["verdict"], now["winner"], now["figures"]) == ({}, None, None, None)
    assert len(upgraded.events(name)) == before["events"]


def test_a_comparison_that_had_succeeded_still_has_its_page_and_report(upgraded: Upgraded) -> None:
    before, now = upgraded.before("comparison"), upgraded.now("comparison")
    assert (now["status"], now["progress"]["step"]) == ("succeeded", before["step"])
    assert now["metadata"] == {"team": "upgrade"}
    page = upgraded.client.get(f"{upgraded.path('comparison')}/report", params={"format": "html"})
    assert sha256(page.content) == before["html_sha256"]
    assert sha256(upgraded.content(now["results"]["report"])) == before["json_sha256"]
    report = upgraded.report("comparison")
    for method in report["methods"]:
        method.pop("curve")  # too long to be kept beside the home
    untold = [[method.pop(name) for name in ADDED] for method in report["methods"]]
    assert untold == [[None] * len(ADDED)] * len(untold), "the old service did not record them"
    assert report == {**today(before["report"]), "format": 3}
    assert (now["verdict"], now["winner"]) == (today(before["verdict"]), before["winner"])
    assert now["figures"] == today(before["figures"])


def test_a_client_that_has_the_old_report_is_not_told_that_it_is_current(upgraded: Upgraded) -> None:
    headers = {"if-none-match": f'"{upgraded.before("comparison")["json_sha256"]}"'}
    url = f"{upgraded.path('comparison')}/report"
    answer = upgraded.client.get(url, params={"format": "json"}, headers=headers)
    assert answer.status_code == 200
    assert "etag" not in answer.headers
    again = upgraded.client.get(
        url, headers={"if-none-match": f'"{upgraded.before("comparison")["html_sha256"]}"'}
    )
    assert again.status_code == 304, "the page is the same"


@pytest.mark.parametrize("name", ["comparison", "comparison_queued"])
def test_the_command_line_shows_reports_of_both_versions(
    upgraded: Upgraded, name: str, tmp_path: Path
) -> None:
    shown = upgraded.serving.run("comparisons", "watch", upgraded.before(name)["id"])
    assert shown.returncode == 0, shown.stderr
    assert upgraded.now(name)["verdict"]["sentence"] in shown.stderr
    kept = upgraded.serving.run(
        "comparisons", "report", upgraded.before(name)["id"], "--to", tmp_path / "report.json"
    )
    assert kept.returncode == 0, kept.stderr
    assert json.loads((tmp_path / "report.json").read_text())["baseline"] == "lora"


@pytest.mark.parametrize("filename", list(KNOWN["sqlite"]["files"]))
def test_files_keep_their_bytes_and_their_reports(upgraded: Upgraded, filename: str) -> None:
    known = upgraded.known["files"][filename]
    found = upgraded.get(f"files/{known['id']}")
    assert (found["filename"], found["olora"]["report"]) == (filename, known["report"])
    assert sha256(upgraded.content(known["id"])) == known["sha256"]


def test_a_deleted_file_and_a_deleted_model_stay_deleted(upgraded: Upgraded) -> None:
    assert "deleted.jsonl" not in {file["filename"] for file in upgraded.get("files")["data"]}
    job = upgraded.now("model_deleted")
    assert upgraded.client.get(f"models/{job['fine_tuned_model']}").status_code == 404
    assert upgraded.client.get(f"files/{job['result_files'][1]}").status_code == 404


# --- what was left undone ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["queued", "validating"])
def test_a_job_that_waited_succeeds(upgraded: Upgraded, name: str) -> None:
    now = upgraded.now(name)
    assert (now["status"], now["error"], now["olora"]["attempt"]) == ("succeeded", None, 1)
    losses, known = upgraded.losses(name), upgraded.twin(name)["losses"]
    assert len(losses) == len(known)
    # It asks for the automatic learning rate, which is this version's: only what comes before the first step
    # at a rate above 0 is as it was.
    assert losses[:2] == pytest.approx(known[:2], rel=SAME)
    assert_an_adapter(upgraded.adapter(name))


@pytest.mark.parametrize("name", RESUMED)
def test_a_job_with_a_checkpoint_goes_on_from_it(upgraded: Upgraded, name: str) -> None:
    before, now = upgraded.before(name), upgraded.now(name)
    assert (now["status"], now["error"]) == ("succeeded", None)
    assert (now["olora"]["attempt"], now["olora"]["failures"]) == (2, 0)
    assert not [warning for warning in upgraded.warnings(name) if "cannot be used" in warning]
    reached = max(before["checkpoints"])
    assert 0 < reached < len(upgraded.twin(name)["losses"])
    # A worker of either version may have written it, each in its words.
    [handed_back] = [event for event in upgraded.events(name) if "resumes_from_step" in (event["data"] or {})]
    assert handed_back["data"]["resumes_from_step"] == reached
    assert handed_back["message"].endswith(f" from step {reached}.")
    messages = upgraded.messages(name)
    assert len(messages) == len(set(messages)), "a run that begins again repeats what it says at its start"

    losses = upgraded.losses(name)
    assert losses[: len(before["losses"])] == before["losses"]
    assert losses == pytest.approx(upgraded.twin(name)["losses"], rel=SAME)
    assert_an_adapter(upgraded.adapter(name))
    after = upgraded.twin(name)["valid_loss_after"]
    if after is not None:
        assert now["olora"]["certificate"]["valid_loss_after"] == pytest.approx(after, rel=SAME)


def test_a_killed_worker_is_named_and_a_stopped_one_is_no_warning(upgraded: Upgraded) -> None:
    [warning] = upgraded.warnings("interrupted")
    assert "was lost: it did not renew its lease" in warning
    assert [upgraded.warnings(f"{method}_handed_back") for method in ("adalora", "cola")] == [[], []]


def test_a_job_that_was_to_be_cancelled_when_its_worker_died_is_cancelled(upgraded: Upgraded) -> None:
    now = upgraded.now("cancel_requested")
    assert (now["status"], now["olora"]["attempt"], now["olora"]["stopping"]) == ("cancelled", 1, False)
    assert upgraded.losses("cancel_requested") == upgraded.before("cancel_requested")["losses"]


@pytest.mark.parametrize("name", named("running", "queued", "validating_files", comparisons=True))
def test_a_comparison_that_was_left_undone_finds_what_its_twin_found(upgraded: Upgraded, name: str) -> None:
    now, twin = upgraded.now(name), upgraded.twin(name)
    assert (now["status"], now["error"], now["progress"]["step"]) == ("succeeded", None, twin["step"])
    ended = [event["data"]["run"] for event in upgraded.events(name) if event["type"] == "run"]
    assert ended == list(range(1, now["progress"]["runs"] + 1))
    report = upgraded.report(name)
    for told in (*report["methods"], *now["figures"]):
        alpha, scale = told.pop("alpha"), told.pop("scale")
        assert (alpha, scale) == (16, pytest.approx(16 / told["rank"], rel=1e-5))
    for method in report["methods"]:
        full = [method.pop(name) for name in ADDED if name in method]
        assert None not in full[1:], "all but the range of scales"
    assert same_but_for_measures(report["methods"], today(twin["report"]["methods"])) == []
    assert (report["format"], report["baseline"]) == (3, "lora")
    assert report["verdict"]["take"] == twin["verdict"]["take"]
    assert now["winner"]["adapter"] == twin["winner"]["adapter"]
    assert same_but_for_measures(now["figures"], today(twin["figures"])) == []
    page = upgraded.client.get(f"{upgraded.path(name)}/report", params={"format": "html"}).text
    assert page.startswith("<!doctype html>")


def test_a_comparison_with_a_checkpoint_goes_on_from_it(upgraded: Upgraded) -> None:
    before, now = upgraded.before("comparison_interrupted"), upgraded.now("comparison_interrupted")
    assert now["olora"]["attempt"] == 2
    warnings = upgraded.warnings("comparison_interrupted")
    assert not [warning for warning in warnings if "cannot be used" in warning]
    reached = max(before["checkpoints"])
    assert "was lost" in warnings[-1]
    assert f"resumes from step {reached}." in warnings[-1]
    messages = upgraded.messages("comparison_interrupted")
    assert len(messages) == len(set(messages)), "one that begins again repeats what it says at its start"


def assert_an_adapter(archive: bytes) -> None:
    """As PEFT reads it, and finite."""
    files = zipfile.ZipFile(io.BytesIO(archive))
    tensors = load(files.read("adapter_model.safetensors"))
    assert tensors
    assert all(math.isfinite(float(tensor.sum())) for tensor in tensors.values())
    assert json.loads(files.read("adapter_config.json"))["peft_type"] == "LORA"


MEASURES = ("seconds", "tokens_per_second", "peak_memory_bytes", "curve")
DEFAULTS = ("own_learning_rate",)
"""A default of the version that ends the comparison; the rates to try were named."""
SENTENCES = ("problem",)
"""Both versions have one or neither does; each has its own wording."""


def same_but_for_measures(found: Any, expected: Any, place: str = "$") -> list[str]:
    """Where they differ, times, memory and defaults aside."""
    if isinstance(expected, dict) and isinstance(found, dict):
        names = sorted((expected.keys() | found.keys()) - {*MEASURES, *DEFAULTS})
        return [
            line
            for name in names
            for line in same_but_for_measures(found.get(name), expected.get(name), f"{place}.{name}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (a, b) in pairs for line in same_but_for_measures(a, b, f"{place}[{i}]")]
    if place.rpartition(".")[2] in SENTENCES:
        same = bool(found) == bool(expected)
        return [] if same else [f"{place}: {found!r} instead of {expected!r}"]
    numbers = isinstance(expected, float) and isinstance(found, float)
    same = found == pytest.approx(expected, rel=SAME, abs=SAME) if numbers else found == expected
    return [] if same else [f"{place}: {found!r} instead of {expected!r}"]
