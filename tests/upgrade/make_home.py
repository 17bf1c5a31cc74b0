"""Makes the home that the upgrade test starts from: a service of commit 0558508, with work left undone.

It runs at commit 0558508 only, from a checkout of it, and stays as the record of how the fixture was made:

    python -m tests.upgrade.make_home FOLDER

The service is the real one, first on SQLite and then on PostgreSQL: `olora serve`, `olora worker`, requests
over HTTP, SIGTERM and SIGKILL. The result in FOLDER is home-0558508.tar.xz (the base model `tiny` and a home
for each database, with PostgreSQL's rows in dump.sql as `pg_dump --inserts` wrote them) and
home-0558508.json (the state of each job and comparison, as the API told it).
"""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
from starlette.testclient import TestClient

from api.main import create_app
from store.settings import read_settings
from tests import services
from tests.worker.tiny_base import chat_rows, make_base

ROOT = Path(__file__).resolve().parents[2]
COMMIT = "0558508"
LEASE_SECONDS = 180.0
"""Longer than it takes from the first kill to the end, so that nobody takes the killed attempts' work."""
CHECKPOINT_SECONDS = 0.2
ENDED = ("succeeded", "failed", "cancelled")

LONG = {"n_epochs": 6, "batch_size": 4, "samples": 0, "dtype": "float32"}
"""96 steps on 64 rows."""
SHORT = {"n_epochs": 1, "batch_size": 8, "samples": 0, "dtype": "float32"}
OLORA = {"adapter": {"method": "olora", "rank": 2}, "hyperparameters": LONG}
FEW_LAYERS = {"target_modules": ["q_proj", "v_proj"]}
ADALORA = {
    "adapter": {"method": "adalora", "rank": 2, **FEW_LAYERS},
    "hyperparameters": {**LONG, "eval_steps": 8, "early_stopping_patience": 20},
}
COLA = {
    "adapter": {"method": "cola", "rank": 2, "links": 2, **FEW_LAYERS},
    "hyperparameters": {**LONG, "learning_rate": 1e-3},
}
LORA = {"adapter": {"method": "lora", "rank": 2, **FEW_LAYERS}, "hyperparameters": SHORT}
DPO = {
    "adapter": {"method": "prilora", "rank": 2, **FEW_LAYERS},
    "method": {"type": "dpo", "dpo": {"hyperparameters": SHORT}},
}
COMPARISON = {
    "methods": ["olora", "lora", {"method": "adalora", "initial_steps": 1000}],
    "learning_rates": [1e-3, 1e-2],
    "hyperparameters": {"n_epochs": 3, "batch_size": 4, "dtype": "float32"},
    "seeds": 2,
    "seed": 7,
}
TWINS = {
    "interrupted": "succeeded",
    "adalora_handed_back": "adalora",
    "cola_handed_back": "cola",
    "queued": "dpo",
    "validating": "short",
    "comparison_interrupted": "comparison",
    "comparison_queued": "comparison",
    "comparison_validating": "comparison",
}
"""Work that is left unfinished, and the same request that was worked on to its end."""


def preferences(rows: int) -> bytes:
    """Pairs whose better answer is the right number."""
    lines = [
        {
            "input": {"messages": [{"role": "user", "content": f"What follows {n}?"}]},
            "preferred_output": [{"role": "assistant", "content": f"{n + 1} follows {n}."}],
            "non_preferred_output": [{"role": "assistant", "content": f"{n} follows {n + 1}."}],
        }
        for n in range(rows)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


TABLES = (
    *("projects", "keys", "files", "jobs", "attempts", "events", "metrics", "checkpoints", "models"),
    "requests",
)
FILES = {
    "train.jsonl": chat_rows(64),
    "valid.jsonl": chat_rows(10, first=100),
    "pairs.jsonl": preferences(32),
    "few.jsonl": chat_rows(32),
    "broken.jsonl": chat_rows(12)
    + b'{"messages": [{"role": "user", "content": "And?"}]}\n'
    + b'{"messages": [{"role": "wizard", "content": "Abracadabra."}]}\n',
}


class Maker:
    """One home, filled by requests."""

    def __init__(self, home: Path, models: Path, database_url: str | None) -> None:
        self.home, self.database_url = home, database_url
        self.variables = {
            "OLORA_HOME": str(home),
            "OLORA_MODELS_DIR": str(models),
            "OLORA_LEASE_SECONDS": str(LEASE_SECONDS),
            "OLORA_CHECKPOINT_SECONDS": str(CHECKPOINT_SECONDS),
            **({"OLORA_DATABASE_URL": database_url} if database_url else {}),
        }
        self.logs = home.parents[1]
        self.ids: dict[str, str] = {}
        self.files: dict[str, str] = {}
        self.http = httpx.Client(timeout=60)
        self.worker: subprocess.Popen[bytes] | None = None

    # --- processes ---------------------------------------------------------------------------------------

    def start(self, *command: str, log: Path) -> "subprocess.Popen[bytes]":
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLORA_")}
        with log.open("ab") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "cli.main", *command],
                cwd=ROOT,
                env={**inherited, "OMP_NUM_THREADS": "1", **self.variables},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=services.die_with_parent,
            )

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """The service without a worker; it is stopped in order."""
        log = self.logs / f"{self.home.name}-serve.log"
        process = self.start("serve", "--no-worker", "--port", "0", log=log)
        try:
            wait(lambda: re.search(r"serves at (\S+)/v1", log.read_text()) is not None, "the service's start")
            found = re.search(r"serves at (\S+)/v1", log.read_text())
            assert found is not None
            key = (self.home / "api_key").read_text().strip()
            headers = {"Authorization": f"Bearer {key}"}
            self.http = httpx.Client(base_url=f"{found[1]}/v1/", headers=headers, timeout=60)
            yield
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()

    def start_worker(self) -> None:
        self.worker = self.start("worker", log=self.logs / f"{self.home.name}-worker.log")

    def end_worker(self, number: signal.Signals) -> None:
        assert self.worker is not None
        self.worker.send_signal(number)
        self.worker.wait(120)
        self.worker = None

    # --- requests ----------------------------------------------------------------------------------------

    def send(self, method: str, path: str, **body: Any) -> Any:
        answer = self.http.request(method, path, **body)
        assert answer.status_code < 300, f"{method} {path}: {answer.text}"
        return answer.json()

    def upload(self, filename: str, data: bytes) -> str:
        form = {"files": {"file": (filename, data)}, "data": {"purpose": "fine-tune"}}
        return str(self.send("POST", "files", **form)["id"])

    def request(self, kind: str, training: str, validation: str | None, **asked: Any) -> dict[str, Any]:
        body = {"model": "tiny", "seed": 7, "training_file": self.files[training], **asked}
        if validation is not None:
            body["validation_file"] = self.files[validation]
        return {"url": kind, "json": body}

    def job(
        self,
        name: str,
        asked: dict[str, Any],
        training: str = "train.jsonl",
        validation: str | None = None,
        key: str | None = None,
        **more: Any,
    ) -> None:
        request = self.request("fine_tuning/jobs", training, validation, **asked, **more)
        headers = {"Idempotency-Key": key} if key else {}
        self.ids[name] = self.send("POST", **_path(request), headers=headers)["id"]

    def compare(self, name: str, training: str = "few.jsonl", **more: Any) -> None:
        request = self.request("comparisons", training, "valid.jsonl", **{**COMPARISON, **more})
        self.ids[name] = self.send("POST", **_path(request))["id"]

    def path(self, name: str) -> str:
        made = self.ids[name]
        return f"comparisons/{made}" if made.startswith("cmp-") else f"fine_tuning/jobs/{made}"

    def now(self, name: str) -> Any:
        return self.send("GET", self.path(name))

    def wait_for(self, name: str, *statuses: str) -> None:
        wait(lambda: self.now(name)["status"] in statuses, f"{name}: {' or '.join(statuses)}")

    def wait_for_checkpoint(self, name: str, beyond: int = 0) -> None:
        query = f"SELECT count(*) FROM checkpoints WHERE job_id = '{self.ids[name]}' AND step > {beyond}"
        wait(lambda: self.ask(query)[0][0] > 0, f"a checkpoint of {name}")

    def ask(self, query: str) -> list[tuple[Any, ...]]:
        """Of the rows, what the API does not tell."""
        if self.database_url is not None:
            with psycopg.connect(self.database_url) as connection:
                return connection.execute(query).fetchall()
        with contextlib.closing(sqlite3.connect(self.home / "olora.db")) as connection:
            return connection.execute(query).fetchall()

    def wait_for_the_leases_end(self) -> None:
        query = "SELECT max(lease_until) FROM jobs WHERE status = 'running'"
        wait(lambda: self.ask(query)[0][0] < time.time(), "the leases' end")

    # --- the story ---------------------------------------------------------------------------------------

    def make(self) -> dict[str, Any]:
        with self.serving():
            self.files = {name: self.upload(name, data) for name, data in FILES.items()}
            self.ended()
            self.handed_back()
            self.killed()
            self.job("queued", DPO, "pairs.jsonl")
            self.compare("comparison_queued")
            self.wait_for("queued", "queued")
            self.wait_for("comparison_queued", "queued")
            described = self.described()
        self.not_yet_looked_at()
        described["work"] |= {
            name: {"id": self.ids[name], "status": "validating_files", "twin": TWINS[name]}
            for name in ("validating", "comparison_validating")
        }
        described["rows"] = {table: self.ask(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}
        return described

    def ended(self) -> None:
        """Work that comes to an end, good or bad; a file that is deleted, a model that is deleted."""
        self.job("cancelled", LORA)
        self.send("POST", f"{self.path('cancelled')}/cancel")
        self.compare("comparison_cancelled")
        self.send("POST", f"{self.path('comparison_cancelled')}/cancel")
        self.job("failed_file", LORA, "broken.jsonl")
        self.job("failed_training", {**LORA, "hyperparameters": {**SHORT, "context_length": 16}})
        self.compare("comparison_failed", hyperparameters={"batch_size": 4, "context_length": 16})
        more = {"suffix": "first", "metadata": {"team": "upgrade"}, "key": "the-first-job"}
        self.job("succeeded", OLORA, validation="valid.jsonl", **more)
        self.job("adalora", ADALORA, validation="valid.jsonl")
        self.job("cola", COLA)
        self.job("dpo", DPO, "pairs.jsonl")
        self.job("short", {**LORA, "hyperparameters": {**SHORT, "samples": 2}}, validation="valid.jsonl")
        self.job("model_deleted", LORA)
        self.compare("comparison", metadata={"team": "upgrade"})
        self.start_worker()
        for name in self.ids:
            self.wait_for(name, *ENDED)
        self.job("cancelled_running", {**OLORA, "hyperparameters": {**LONG, "n_epochs": 50}})
        wait(lambda: (self.now("cancelled_running")["olora"].get("step") or 0) > 0, "a first step")
        self.send("POST", f"{self.path('cancelled_running')}/cancel")
        self.wait_for("cancelled_running", "cancelled")
        self.send("DELETE", f"models/{self.now('model_deleted')['fine_tuned_model']}")
        gone = self.upload("deleted.jsonl", chat_rows(11))
        self.send("DELETE", f"files/{gone}")
        self.end_worker(signal.SIGTERM)

    def handed_back(self) -> None:
        """Jobs of a stopped worker: queued, with a checkpoint."""
        jobs = (("adalora", ADALORA, "valid.jsonl"), ("cola", COLA, None))
        for priority, (name, asked, validation) in enumerate(jobs):
            waiting = f"{name}_handed_back"
            self.job(waiting, asked, validation=validation, olora={"priority": priority})
            self.start_worker()
            self.wait_for_checkpoint(waiting)
            self.end_worker(signal.SIGTERM)
            assert self.now(waiting)["status"] == "queued", f"{name} was faster; try again"

    def killed(self) -> None:
        """Work of workers that were killed: running, with a checkpoint. One job is cancelled after that."""
        self.job("interrupted", OLORA, validation="valid.jsonl", olora={"priority": 7})
        self.start_worker()
        self.wait_for_checkpoint("interrupted", beyond=10)
        self.end_worker(signal.SIGKILL)
        self.job("cancel_requested", OLORA, olora={"priority": 8})
        self.start_worker()
        self.wait_for_checkpoint("cancel_requested")
        self.end_worker(signal.SIGKILL)
        self.send("POST", f"{self.path('cancel_requested')}/cancel")
        self.compare("comparison_interrupted", olora={"priority": 9})
        self.start_worker()
        self.wait_for_checkpoint("comparison_interrupted", beyond=30)
        self.end_worker(signal.SIGKILL)
        for name in ("interrupted", "cancel_requested", "comparison_interrupted"):
            assert self.now(name)["status"] == "running", f"{name} was faster; try again"

    def not_yet_looked_at(self) -> None:
        """Requests that were committed and no more: the dispatcher is stopped before they come."""
        values = {name.removeprefix("OLORA_").lower(): value for name, value in self.variables.items()}
        key = (self.home / "api_key").read_text().strip()
        with TestClient(
            create_app(read_settings(**values)), headers={"Authorization": f"Bearer {key}"}
        ) as client:
            client.app.state.services.dispatcher.stop()  # type: ignore[attr-defined]
            requests = {
                "validating": self.request("fine_tuning/jobs", "train.jsonl", "valid.jsonl", **LORA),
                "comparison_validating": self.request(
                    "comparisons", "few.jsonl", "valid.jsonl", **COMPARISON
                ),
            }
            for name, request in requests.items():
                answer = client.post(f"/v1/{request['url']}", json=request["json"])
                answer.raise_for_status()
                made = answer.json()
                assert made["status"] == "validating_files"
                self.ids[name] = made["id"]

    # --- what the test will hold it to -------------------------------------------------------------------

    def described(self) -> dict[str, Any]:
        return {
            "files": {name: self.described_file(file_id) for name, file_id in self.files.items()},
            "work": {name: self.described_work(name) for name in self.ids},
        }

    def described_file(self, file_id: str) -> dict[str, Any]:
        found = self.send("GET", f"files/{file_id}")
        report = found["olora"]["report"]
        content = self.http.get(f"files/{file_id}/content").content
        return {"id": file_id, "sha256": sha256(content), "report": report}

    def described_work(self, name: str) -> dict[str, Any]:
        now = self.now(name)
        told: dict[str, Any] = {"id": now["id"], "status": now["status"]}
        told["error"] = now["error"]["message"] if now["error"] else None
        told["attempt"] = now["olora"]["attempt"]
        told["events"] = self.count(f"{self.path(name)}/events")
        stored = "SELECT step FROM checkpoints WHERE storage_key IS NOT NULL AND job_id = '{}' ORDER BY step"
        told["checkpoints"] = [step for (step,) in self.ask(stored.format(now["id"]))]
        if name in TWINS:
            told["twin"] = TWINS[name]
        if now["id"].startswith("cmp-"):
            told["step"] = now["progress"]["step"]
            if now["status"] == "succeeded":
                for kind in ("html", "json"):
                    content = self.http.get(f"{self.path(name)}/report", params={"format": kind}).content
                    told[f"{kind}_sha256"] = sha256(content)
                told["report"] = self.send("GET", f"{self.path(name)}/report", params={"format": "json"})
                for method in told["report"]["methods"]:
                    method.pop("curve")
                told |= {part: now[part] for part in ("verdict", "winner", "figures")}
            return told
        told["losses"] = self.losses(name)
        if now["status"] == "succeeded" and name != "model_deleted":
            told["model"] = now["fine_tuned_model"]
            adapter = self.http.get(f"files/{now['result_files'][1]}/content").content
            tensors = zipfile.ZipFile(io.BytesIO(adapter)).read("adapter_model.safetensors")
            told["adapter_sha256"] = sha256(adapter)
            told["tensors_sha256"] = sha256(tensors)
            told["csv_sha256"] = sha256(self.http.get(f"files/{now['result_files'][0]}/content").content)
            told["valid_loss_after"] = now["olora"]["certificate"]["valid_loss_after"]
            told["certificate_passed"] = now["olora"]["certificate"].get("passed")
        return told

    def losses(self, name: str) -> list[float]:
        """The training loss of every step so far, as its events tell it."""
        events = self.send("GET", f"{self.path(name)}/events", params={"limit": 1000})["data"]
        metrics = [event["data"] for event in events if event["type"] == "metrics"]
        found = {data["step"]: data["train_loss"] for data in metrics}
        assert sorted(found) == list(range(1, len(found) + 1))
        return [found[step] for step in sorted(found)]

    def count(self, path: str) -> int:
        return len(self.send("GET", path, params={"limit": 1000})["data"])


def _path(request: dict[str, Any]) -> dict[str, Any]:
    return {"path": request["url"], "json": request["json"]}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def wait(happens: Callable[[], object], what: str, seconds: float = 300) -> None:
    until = time.monotonic() + seconds
    while not happens():
        if time.monotonic() > until:
            raise SystemExit(f"{what}: not within {seconds:g} s")
        time.sleep(0.02)


def dump(url: str, to: Path) -> None:
    """Rows and schema as plain SQL, without psql's own commands."""
    command = ["pg_dump", "--inserts", "--no-owner", "--no-privileges", "--dbname", url]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    lines = [line for line in text.splitlines() if not line.startswith("\\")]
    to.write_text("\n".join(lines) + "\n")


def pack(folder: Path, to: Path) -> None:
    """Names, contents and modes alone: nothing of whose they were."""

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = 0
        entry.uname = entry.gname = ""
        return entry

    with tarfile.open(to, "w:xz", preset=9) as archive:
        for path in sorted(folder.iterdir()):
            archive.add(path, path.name, filter=plain)


def main(folder: Path) -> None:
    work = folder / "work"
    kept = work / "kept"
    shutil.rmtree(work, ignore_errors=True)
    kept.mkdir(parents=True)
    make_base(kept / "models" / "tiny", width=16)
    expected: dict[str, Any] = {"commit": COMMIT}
    on_sqlite = Maker(kept / "sqlite", kept / "models", None)
    expected["sqlite"] = on_sqlite.make()
    with services.postgres_server() as server:
        url = server.replace("+psycopg", "")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE home TEMPLATE template0")
        url = url.removesuffix("/postgres") + "/home"
        on_postgresql = Maker(kept / "postgresql", kept / "models", url)
        expected["postgresql"] = on_postgresql.make()
        on_postgresql.wait_for_the_leases_end()
        dump(url, kept / "postgresql" / "dump.sql")
    on_sqlite.wait_for_the_leases_end()
    pack(kept, folder / f"home-{COMMIT}.tar.xz")
    (folder / f"home-{COMMIT}.json").write_text(json.dumps(expected, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
