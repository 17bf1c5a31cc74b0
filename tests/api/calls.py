"""What the tests of the API send: training files, uploads, jobs; and jobs led to their end by the store."""

import io
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from starlette.testclient import TestClient

from olora_core.specs import RunFacts, TrainSpec, resolve
from store import checkpoints, claims, comparisons, endings, fine_tuned, jobs, progress
from store.comparisons import EndedRun
from store.session import make_engine, sessions
from store.settings import Settings
from store.storage import storage
from tests.rows import chat_file

T = TypeVar("T")


def upload(client: TestClient, content: bytes | None = None, **fields: str) -> Any:
    """The answer to an upload, as a response."""
    data = {"purpose": "fine-tune", **fields}
    content = chat_file() if content is None else content
    return client.post("/v1/files", data=data, files={"file": ("train.jsonl", content)})


def uploaded(client: TestClient, content: bytes | None = None, **fields: str) -> str:
    """The id of an uploaded file."""
    answer = upload(client, content, **fields)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def create(client: TestClient, **body: Any) -> Any:
    """The answer to a job's creation, as a response; a training file is uploaded when none is named."""
    body.setdefault("model", "olora-tiny")
    if "training_file" not in body:
        body["training_file"] = uploaded(client)
    return client.post("/v1/fine_tuning/jobs", json=body)


def created(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = create(client, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def compare(client: TestClient, **body: Any) -> Any:
    """The answer to a comparison's creation, as a response; files are uploaded where none are named."""
    asked = {"model": "olora-tiny", "methods": ["olora", "lora"], **body}
    for name in ("training_file", "validation_file"):
        if name not in asked:
            asked[name] = uploaded(client)
    return client.post("/v1/comparisons", json=asked)


def compared(client: TestClient, **body: Any) -> dict[str, Any]:
    answer = compare(client, **body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def job(client: TestClient, job_id: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/fine_tuning/jobs/{job_id}").json())


def events(client: TestClient, job_id: str) -> list[dict[str, Any]]:
    """Every event, oldest first."""
    return list(reversed(client.get(f"/v1/fine_tuning/jobs/{job_id}/events?limit=1000").json()["data"]))


def eventually(look: Callable[[], T], seconds: float = 15) -> T:
    """The first true answer of `look`."""
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)
    return found


def settled(client: TestClient, job_id: str) -> dict[str, Any]:
    """The job once the dispatcher has looked at its files."""
    return eventually(lambda: (now := job(client, job_id))["status"] != "validating_files" and now)


def comparison(client: TestClient, comparison_id: str) -> dict[str, Any]:
    return dict(client.get(f"/v1/comparisons/{comparison_id}").json())


def compared_and_queued(client: TestClient, **body: Any) -> str:
    """The id of a comparison that can be claimed."""
    made_id = str(compared(client, **body)["id"])
    eventually(lambda: comparison(client, made_id)["status"] == "queued")
    return made_id


def zipped(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return packed.getvalue()


PAGE = b"<!doctype html><title>olora and lora</title><style>p{color:red}</style><p>Take lora.</p>"
WINNER = {"model": "olora-tiny", "adapter": {"method": "lora", "rank": 8}}
FINDINGS = {
    "verdict": {"sentence": "Take lora.", "take": "lora"},
    "winner": WINNER,
    "methods": [{"label": "lora"}, {"label": "olora"}],
}
SAMPLE = {"line": 1, "prompt": "2 + 2 =", "reference": "4", "base": "five", "tuned": "4"}


class Attempt:
    """A worker's side of a job, through the same functions of the store that a worker calls."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.engine = make_engine(settings.database_url)
        self.sessions = sessions(self.engine)
        # On PostgreSQL a claim passes over a row that the dispatcher holds at that moment.
        self.claim = eventually(self._claim)

    def _claim(self) -> claims.Claim | None:
        with self.sessions.begin() as session:
            return claims.claim(session, owner="test", lease_seconds=300)

    def resolved(self) -> TrainSpec:
        facts = RunFacts(examples=12, hidden_size=192, context_length=256)
        return resolve(self.claim.spec, facts)[0]

    def train(self, steps: int = 3) -> None:
        """Records the numbers of a few steps, a checkpoint, and an answer."""
        measured = [
            {"step": step, "loss": 2.0 / step, "accuracy": 0.5, "seconds": 0.1}
            for step in range(1, steps + 1)
        ]
        with self.sessions.begin() as session:
            progress.record(session, self.claim, steps=measured, resolved=self.resolved(), total_steps=steps)
            progress.record(session, self.claim, samples={"file": "training", "rows": [SAMPLE]})
        self.save(steps)

    def save(self, step: int) -> None:
        """Stores a checkpoint, at the end of an epoch."""
        key = f"jobs/{self.claim.job_id}/checkpoints/{step}"
        with tempfile.TemporaryDirectory() as folder:
            for name in ("adapter.safetensors", "optimizer.safetensors", "state.json"):
                (Path(folder) / name).write_bytes(name.encode())
            storage(self.settings).put_folder(key, Path(folder))
        with self.sessions.begin() as session:
            found = jobs.get_job(session, self.claim.project_id, self.claim.job_id)
            name = f"{fine_tuned.name_of(found, 'olora')}:ckpt-step-{step}"
            progress.add_checkpoint(
                session, self.claim, step, {"loss": 2.0 / step}, key, epoch=1, model=name, kept_epochs=3
            )

    def export(self, adapter: bytes) -> None:
        """Ends the export of a checkpoint."""
        key = f"jobs/{self.claim.job_id}/results/a1/adapter.zip"
        with storage(self.settings).writer(key) as writer:
            writer.write(adapter)
        file = endings.ResultFile("adapter.zip", writer.bytes, writer.sha256, key)
        with self.sessions.begin() as session:
            checkpoints.succeed(session, self.claim, files=[file], certificate={"passed": True})

    def succeed(self, adapter: bytes | None = None) -> None:
        stored = storage(self.settings)
        adapter = zipped(**{"adapter_model.safetensors": b"weights"}) if adapter is None else adapter
        with self.sessions.begin() as session:
            table = progress.metrics_csv(session, self.claim.job_id).encode()
        files = []
        weights = "model.zip" if self.claim.spec.adapter.export == "merged" else "adapter.zip"
        names = ("step_metrics.csv", weights, "events.out.tfevents.0.job")
        for name, content in zip(names, (table, adapter, b"events"), strict=True):
            key = f"results/{self.claim.job_id}/{name}"
            with stored.writer(key) as writer:
                writer.write(content)
            files.append(endings.ResultFile(name, writer.bytes, writer.sha256, key))
        with self.sessions.begin() as session:
            found = jobs.get_job(session, self.claim.project_id, self.claim.job_id)
            endings.succeed(
                session,
                self.claim,
                files=files,
                model=fine_tuned.name_of(found, "olora"),
                certificate={"max_abs_logit_diff": 1e-6, "passed": True},
                trained_tokens=1234,
            )

    def compare(self, step: int = 25) -> None:
        """Records where the comparison is, and that its first two runs have ended."""
        run = {"runs": 20, "method": "olora", "stage": "search", "learning_rate": 3e-3, "seed": 0}
        at = {
            "loss": 1.6,
            "step": step,
            "total_steps": 400,
            "run": 3,
            "run_step": step - 20,
            "run_steps": 10,
            **run,
        }
        ended = [
            EndedRun({"run": number, "steps": 10, "loss": 1.5, "seconds": 2.0, **run}) for number in (1, 2)
        ]
        with self.sessions.begin() as session:
            comparisons.record(session, self.claim, at=at, events=ended, seconds_left=60.0)

    def report(self) -> None:
        """Ends the comparison with a page and a report."""
        stored = storage(self.settings)
        files = []
        for name, content in (
            ("comparison.html", PAGE),
            ("comparison.json", b'{"format": 1, "methods": []}'),
        ):
            key = f"results/{self.claim.job_id}/{name}"
            with stored.writer(key) as writer:
                writer.write(content)
            files.append(endings.ResultFile(name, writer.bytes, writer.sha256, key))
        with self.sessions.begin() as session:
            comparisons.succeed(session, self.claim, files=files, findings=FINDINGS)

    def close(self) -> None:
        self.engine.dispose()


def finished(client: TestClient, settings: Settings, **body: Any) -> dict[str, Any]:
    """A job that has succeeded, with three steps, a checkpoint, a CSV and an adapter."""
    made = created(client, **body)
    assert settled(client, made["id"])["status"] == "queued"
    attempt = Attempt(settings)
    assert attempt.claim.job_id == made["id"]
    attempt.train()
    attempt.succeed()
    attempt.close()
    return job(client, made["id"])


def compared_to_the_end(client: TestClient, settings: Settings, **body: Any) -> dict[str, Any]:
    """A comparison that has succeeded, with a page and a report."""
    made_id = compared_and_queued(client, **body)
    attempt = Attempt(settings)
    assert attempt.claim.job_id == made_id
    attempt.compare()
    attempt.report()
    attempt.close()
    return comparison(client, made_id)
