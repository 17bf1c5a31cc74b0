"""Rows and files that the tests of the store begin with."""

import io
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from olora_core import formats
from olora_core.specs import TrainSpec, read_comparison
from store import claims, files, jobs
from store.events import events_since
from store.models import File, Job, Project, Row
from store.session import Sessions
from tests.rows import chat, jsonl, preference

CHAT = chat("2 + 2?", "4")
COMPLETION = {"prompt": "2 + 2 =", "completion": " 4"}
PREFERENCE = preference("2 + 2?", "4", "5")
SPEC = TrainSpec(model="olora-tiny", seed=7)
COMPARISON = read_comparison(model="olora-tiny", methods=["olora", "lora"], seed=7)


def project(session: Session, project_id: str = "p") -> Project:
    made = session.get(Project, project_id) or Project(id=project_id, name=project_id)
    session.add(made)
    session.flush()
    return made


def report(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return formats.validate(io.BytesIO(jsonl(*rows))).model_dump(mode="json")


def file(session: Session, rows: list[dict[str, Any]] | None = None, **values: Any) -> File:
    """A training file of ten good rows, unless told otherwise."""
    given: dict[str, Any] = {
        "file_id": files.new_file_id(),
        "project_id": "p",
        "filename": "train.jsonl",
        "purpose": "fine-tune",
        "bytes": 100,
        "sha256": "0" * 64,
        "report": report([CHAT] * 10 if rows is None else rows),
    }
    return files.record_file(session, **{**given, **values})


def job(sessions: Sessions, project_id: str = "p", *, status: str = "queued", **values: Any) -> Job:
    """A job on a good file, queued."""
    with sessions.begin() as session:
        project(session, project_id)
        given: dict[str, Any] = {
            "project_id": project_id,
            "spec": SPEC,
            "training_file": file(session, project_id=project_id),
        }
        made = jobs.create(session, **{**given, **values})
        made.status = status
    return made


def comparison(sessions: Sessions, project_id: str = "p", **values: Any) -> Job:
    """A comparison of two methods, queued; on two good files."""
    with sessions.begin() as session:
        project(session, project_id)
        held_out = file(session, project_id=project_id)
    return job(sessions, project_id, **{"spec": COMPARISON, "validation_file": held_out, **values})


def claimed(sessions: Sessions, owner: str = "worker-1", lease_seconds: float = 60) -> claims.Claim:
    with sessions.begin() as session:
        claim = claims.claim(session, owner=owner, lease_seconds=lease_seconds)
    assert claim is not None
    return claim


def reread(sessions: Sessions, job_id: str) -> Job:
    with sessions() as session:
        return session.query(Job).filter_by(id=job_id).one()


def messages(sessions: Sessions, job_id: str) -> list[str]:
    """The texts of a job's events, oldest first."""
    with sessions() as session:
        return [event.message for event in events_since(session, job_id)]


def everything(sessions: Sessions) -> str:
    """All that the database holds, as text."""
    with sessions() as session:
        return "\n".join(
            str(row)
            for table in Row.metadata.sorted_tables
            for row in session.execute(select(table).order_by(*table.primary_key.columns)).all()
        )


def compared_step(number: int, **values: Any) -> dict[str, Any]:
    """What the trainer says after a step of a comparison's third run."""
    return {
        "step": number,
        "total_steps": 400,
        "method": "olora",
        "stage": "search",
        "learning_rate": 3e-3,
        "seed": 7,
        "run": 3,
        "runs": 20,
        "run_step": number - 20,
        "run_steps": 10,
        "loss": 0.5,
        **values,
    }


def run_finished(run: int, **values: Any) -> dict[str, Any]:
    """What the trainer says at the end of a comparison's run."""
    return {
        "run": run,
        "runs": 20,
        "method": "olora",
        "stage": "search",
        "learning_rate": 3e-3,
        "seed": 7,
        "steps": 10,
        "loss": 1.23456,
        "seconds": 12.345,
        **values,
    }


def step(number: int, loss: float = 0.5, **values: Any) -> dict[str, Any]:
    """What the trainer says after a step."""
    return {
        "step": number,
        "total_steps": 20,
        "loss": loss,
        "accuracy": 0.75,
        "trained_tokens": 40,
        "learning_rate": 1e-3,
        "seconds": 0.5,
        **values,
    }
