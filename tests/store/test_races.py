"""Many processes at once: every job starts once, and any fault in the fence would show."""

import random
import threading
import time
from collections import Counter
from multiprocessing.synchronize import Barrier
from typing import Any

import pytest
from sqlalchemy import func, select, update

from store import claims, control, endings, jobs, progress
from store.errors import JobStateError, LeaseLost
from store.models import Attempt, Checkpoint, Event, Job, Metric, Model
from store.session import Sessions, db_now, make_engine, sessions
from store.settings import Settings
from tests import services
from tests.store import making

CLAIMERS = 8


def _claim_everything(url: str, owner: str, barrier: Barrier) -> None:
    engine = make_engine(url)
    made = sessions(engine)
    barrier.wait(60)
    while True:
        with made.begin() as session:
            if claims.claim(session, owner=owner, lease_seconds=60) is None:
                break
    engine.dispose()


def test_eight_claimers_start_every_job_exactly_once(database_url: str, sessions: Sessions) -> None:
    first = making.job(sessions)
    with sessions.begin() as session:
        file = making.file(session)
        for _ in range(39):
            jobs.create(session, project_id="p", spec=making.SPEC, training_file=file).status = "queued"
    context = services.process_context()
    barrier = context.Barrier(CLAIMERS)
    claimers = [
        context.Process(target=_claim_everything, args=(database_url, f"w{n}", barrier))
        for n in range(CLAIMERS)
    ]
    for claimer in claimers:
        claimer.start()
    for claimer in claimers:
        claimer.join(60)
    assert [claimer.exitcode for claimer in claimers] == [0] * CLAIMERS
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Attempt)) == 40
        assert set(session.scalars(select(Job.attempt))) == {1}
        started = select(Event.job_id).where(Event.message == "Fine-tuning job started")
        assert Counter(session.scalars(started)).most_common(1)[0][1] == 1
        assert session.scalar(select(Job.status).where(Job.id == first.id)) == "running"


def test_one_job_again_and_again_goes_to_one_of_eight(sessions: Sessions) -> None:
    """In every round all eight start at the same moment; the winner hands the job back for the next round."""
    rounds = 25
    job = making.job(sessions)
    barrier = threading.Barrier(CLAIMERS)
    wins: list[tuple[int, claims.Claim]] = []

    def take_part(owner: str) -> None:
        for number in range(rounds):
            barrier.wait(60)
            with sessions.begin() as session:
                claim = claims.claim(session, owner=owner, lease_seconds=60)
            barrier.wait(60)
            if claim is not None:
                wins.append((number, claim))
                with sessions.begin() as session:
                    endings.hand_back(session, claim, reason="round", message="The round is over.")

    threads = [threading.Thread(target=take_part, args=(f"w{n}",)) for n in range(CLAIMERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [number for number, _ in wins] == list(range(rounds))
    assert [claim.attempt for _, claim in wins] == list(range(1, rounds + 1))
    assert making.reread(sessions, job.id).attempt == rounds


def _sleep_until_lost(made: Sessions, claim: claims.Claim) -> None:
    """Not for a fixed time: how soon a sweep finds the lease expired depends on the machine's load."""
    held = select(Job.id).where(Job.id == claim.job_id, Job.status == "running", Job.attempt == claim.attempt)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        time.sleep(0.05)
        with made() as session:
            if session.scalar(held) is None:
                return


def _work(
    made: Sessions, settings: Settings, owner: str, chance: random.Random, stop: threading.Event
) -> None:
    """A worker that often sleeps until its lease is gone and does not notice."""
    while not stop.is_set():
        with made.begin() as session:
            claim = claims.claim(session, owner=owner, lease_seconds=0.15)
        if claim is None:
            time.sleep(0.01)
            continue
        try:
            with made() as session:
                checkpoint = progress.latest_checkpoint(session, claim.job_id)
            for number in range(checkpoint.step + 1 if checkpoint else 1, 6):
                if chance.random() < 0.25:
                    _sleep_until_lost(made, claim)
                with made.begin() as session:
                    claims.renew(session, claim, 0.15)
                    progress.record(session, claim, steps=[making.step(number)])
                    progress.add_checkpoint(session, claim, number, {}, f"jobs/{claim.job_id}/{number}")
            with made.begin() as session:
                endings.succeed(
                    session,
                    claim,
                    files=[],
                    model=f"ft:{claim.job_id}:{claim.attempt}",
                    certificate={},
                    trained_tokens=1,
                )
        except LeaseLost:
            continue


def _run_with_sleepers(made: Sessions, settings: Settings, count: int, seconds: float) -> None:
    for _ in range(count):
        making.job(made)
    patient = settings.model_copy(update={"max_failures": 100})
    stop = threading.Event()
    workers = [
        threading.Thread(target=_work, args=(made, settings, f"w{n}", random.Random(n), stop))
        for n in range(4)
    ]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with made.begin() as session:
            endings.sweep(session, patient)
            session.execute(update(Job).where(Job.not_before.is_not(None)).values(not_before=db_now()))
            left = session.scalar(select(func.count()).where(Job.status.in_(("queued", "running"))))
        if not left:
            break
        time.sleep(0.02)
    stop.set()
    for worker in workers:
        worker.join(20)


def test_workers_that_fall_asleep_lose_and_double_nothing(sessions: Sessions, settings: Settings) -> None:
    _run_with_sleepers(sessions, settings, count=6, seconds=30)
    with sessions() as session:
        assert set(session.scalars(select(Job.status))) == {"succeeded"}
        assert Counter(session.scalars(select(Model.job_id))).most_common(1)[0][1] == 1
        assert session.scalar(select(func.count()).select_from(Metric)) == 6 * 5
        steps = select(Event.job_id, Event.message).where(Event.type == "metrics")
        assert Counter(session.execute(steps).all()).most_common(1)[0][1] == 1
        assert session.scalar(select(func.max(Attempt.attempt))) > 1  # there were faults at all


def test_without_the_fence_the_same_run_goes_wrong(
    sessions: Sessions, settings: Settings, monkeypatch: Any
) -> None:
    """The control: the checks above detect a missing fence, if not in every run."""
    monkeypatch.setattr(claims, "held_by", lambda claim: Job.id == claim.job_id)
    late = select(Checkpoint).join(Job, Job.id == Checkpoint.job_id)
    outdated = late.where(Checkpoint.attempt < Job.attempt, Checkpoint.created_at > Job.started_at)
    for _ in range(5):
        _run_with_sleepers(sessions, settings, count=6, seconds=8)
        with sessions() as session:
            models = Counter(session.scalars(select(Model.job_id)))
            if models.most_common(1)[0][1] > 1 or session.scalars(outdated).first() is not None:
                return
    raise AssertionError("five runs without the fence went well")


@pytest.mark.parametrize("wanted", ["cancelled", "paused"])
def test_a_request_against_success_leaves_one_of_both(
    sessions: Sessions, settings: Settings, wanted: str
) -> None:
    for _ in range(20):
        job = making.job(sessions)
        claim = making.claimed(sessions)
        barrier = threading.Barrier(2)
        ends: list[str] = []

        def finish(claim: claims.Claim = claim, barrier: threading.Barrier = barrier) -> None:
            barrier.wait(30)
            with sessions.begin() as session:
                name = f"ft:{claim.job_id}"
                endings.succeed(session, claim, files=[], model=name, certificate={}, trained_tokens=1)

        def ask(job: Job = job, barrier: threading.Barrier = barrier, ends: list[str] = ends) -> None:
            barrier.wait(30)
            try:
                with sessions.begin() as session:
                    if wanted == "paused":
                        control.pause(session, job, settings)
                    else:
                        control.cancel(session, job)
            except JobStateError:
                ends.append("refused")

        pair = [threading.Thread(target=finish), threading.Thread(target=ask)]
        for thread in pair:
            thread.start()
        for thread in pair:
            thread.join(30)
        ended = making.reread(sessions, job.id)
        assert ended.status == ("succeeded" if ends else wanted)
        assert (ended.lease_owner, ended.lease_until) == (None, None)
        with sessions() as session:
            models = session.scalar(select(func.count()).where(Model.job_id == job.id))
        assert models == len(ends)
        texts = making.messages(sessions, job.id)
        assert texts.count("The job has successfully completed") == len(ends)
        if wanted == "paused" and not ends:
            with sessions.begin() as session:
                control.cancel(session, job)  # else the next round would claim it
