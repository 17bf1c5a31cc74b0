"""Cancelling, pausing and resuming: each holds at once, and what a trainer still does changes nothing."""

import random
import time
from typing import Any

import pytest
from sqlalchemy import func, select

from olora_core.errors import TrainingError
from store import claims, control, endings, jobs, progress
from store.errors import JobStateError, LeaseLost
from store.models import Attempt, Checkpoint, Event, Job, Metric, Model
from store.session import Sessions, db_now
from store.settings import Settings
from store.statuses import ENDED
from tests.store import making


def cancel(sessions: Sessions, job: Job) -> Job:
    with sessions.begin() as session:
        return control.cancel(session, job)


def pause(sessions: Sessions, job: Job, settings: Settings) -> Job:
    with sessions.begin() as session:
        return control.pause(session, job, settings)


def resume(sessions: Sessions, job: Job, **limits: Any) -> Job:
    with sessions.begin() as session:
        return control.resume(session, job, limits)


def let_go(sessions: Sessions, claim: claims.Claim, *, crashed: bool = False) -> Job:
    with sessions.begin() as session:
        return endings.hand_back(
            session, claim, reason="released", message="The worker was stopped.", crashed=crashed
        )


def finish(sessions: Sessions, claim: claims.Claim) -> Job:
    file = endings.ResultFile("adapter.zip", 20, "b" * 64, f"jobs/{claim.job_id}/adapter.zip")
    with sessions.begin() as session:
        return endings.succeed(
            session, claim, files=[file], model=f"ft:{claim.job_id}", certificate={}, trained_tokens=1
        )


def expire(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        session.scalars(select(Job).where(Job.id == job_id)).one().lease_until = db_now() - 3600


def nobody_can_claim(sessions: Sessions) -> bool:
    with sessions.begin() as session:
        return claims.claim(session, owner="other", lease_seconds=60) is None


def save(sessions: Sessions, claim: claims.Claim, step: int) -> list[str]:
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(step)])
        return progress.add_checkpoint(session, claim, step, {}, f"jobs/{claim.job_id}/{step}")


# --- cancelling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["validating_files", "queued", "paused"])
def test_a_waiting_job_is_cancelled_at_once(sessions: Sessions, settings: Settings, status: str) -> None:
    job = making.job(sessions, status=status)
    assert cancel(sessions, job).status == "cancelled"
    with sessions.begin() as session:
        jobs.admit(session, settings)
    assert nobody_can_claim(sessions)
    assert making.reread(sessions, job.id).finished_at is not None


def test_a_running_job_is_cancelled_at_once_and_held_until_its_trainer_has_stopped(
    sessions: Sessions,
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    assert save(sessions, claim, 1) == []
    ended = cancel(sessions, job)
    assert (ended.status, ended.lease_owner) == ("cancelled", claim.owner)
    assert ended.finished_at is not None
    told = making.messages(sessions, job.id)
    assert told[-1] == "The job has been cancelled"
    with sessions.begin() as session:
        assert claims.renew(session, claim, 60) == "cancel"
    assert save(sessions, claim, 2) == [f"jobs/{job.id}/2"]  # for the worker to delete
    assert let_go(sessions, claim).lease_owner is None
    with pytest.raises(LeaseLost):
        save(sessions, claim, 3)
    assert making.messages(sessions, job.id) == told
    assert making.reread(sessions, job.id).step == 1
    with sessions() as session:
        attempt = session.scalars(select(Attempt)).one()
        assert session.scalars(select(Checkpoint.step)).all() == [1]
        assert session.scalars(select(Metric.step)).all() == [1]
    assert (attempt.end_reason, attempt.ended_at is None) == ("cancelled", False)


@pytest.mark.parametrize("end", ["succeeds", "fails", "crashes", "is lost"])
def test_whatever_its_attempt_comes_to_a_cancelled_job_stays_cancelled(
    sessions: Sessions, settings: Settings, end: str
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    before = cancel(sessions, job)
    told = making.messages(sessions, job.id)
    match end:
        case "succeeds":
            finish(sessions, claim)
        case "fails":
            with sessions.begin() as session:
                endings.fail(session, claim, TrainingError("Nothing fits."))
        case "crashes":
            let_go(sessions, claim, crashed=True)
        case "is lost":
            expire(sessions, job.id)
            with sessions.begin() as session:
                assert endings.sweep(session, settings) == 1
    after = making.reread(sessions, job.id)
    assert (after.status, after.finished_at) == ("cancelled", before.finished_at)
    assert (after.error, after.fine_tuned_model, after.result_files) == (None, None, [])
    assert (after.lease_owner, after.lease_until, after.stage) == (None, None, None)
    assert making.messages(sessions, job.id) == told
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 0


def test_cancelling_a_cancelled_job_gives_the_job(sessions: Sessions) -> None:
    job = making.job(sessions)
    cancel(sessions, job)
    before = making.everything(sessions)
    assert cancel(sessions, job).status == "cancelled"
    assert making.everything(sessions) == before


@pytest.mark.parametrize("wanted", ["cancelled", "paused", "resumed"])
@pytest.mark.parametrize("end", ["succeeded", "failed", "cancelled"])
def test_a_job_that_has_ended_takes_no_requests(
    sessions: Sessions, settings: Settings, wanted: str, end: str
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    if end == "succeeded":
        finish(sessions, claim)
    elif end == "failed":
        with sessions.begin() as session:
            endings.fail(session, claim, TrainingError("Nothing fits."))
    else:
        cancel(sessions, job)
    if (wanted, end) == ("cancelled", "cancelled"):
        return
    has = "it was cancelled" if end == "cancelled" else f"it has already {end}"
    requests = {
        "cancelled": lambda: cancel(sessions, job),
        "paused": lambda: pause(sessions, job, settings),
        "resumed": lambda: resume(sessions, job),
    }
    with pytest.raises(JobStateError, match=f"Job {job.id} cannot be {wanted}: {has}"):
        requests[wanted]()


# --- pausing and resuming ------------------------------------------------------------------------------


def test_a_queued_job_waits_until_it_is_resumed(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions)
    paused = pause(sessions, job, settings)
    assert (paused.status, paused.pause_reason, paused.lease_owner) == ("paused", "request", None)
    assert nobody_can_claim(sessions)
    before = making.everything(sessions)
    assert pause(sessions, job, settings).status == "paused"
    assert making.everything(sessions) == before
    resumed = resume(sessions, job)
    assert (resumed.status, resumed.pause_reason, resumed.dispatches) == ("queued", None, 0)
    before = making.everything(sessions)
    assert resume(sessions, job).status == "queued"
    assert making.everything(sessions) == before
    assert making.messages(sessions, job.id)[-2:] == [
        "The job was paused.",
        "The job was resumed and is queued",
    ]
    assert making.claimed(sessions).attempt == 1


def test_resuming_a_running_job_gives_the_job(sessions: Sessions) -> None:
    job = making.job(sessions)
    making.claimed(sessions)
    before = making.everything(sessions)
    assert resume(sessions, job).status == "running"
    assert making.everything(sessions) == before


def test_pausing_admits_a_job_whose_files_were_not_looked_at_yet(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions, status="validating_files")
    assert pause(sessions, job, settings).status == "paused"
    assert "Files validated, moving job to queued state" in making.messages(sessions, job.id)
    assert resume(sessions, job).status == "queued"


def test_a_job_with_unusable_files_cannot_be_paused_and_fails(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as session:
        making.project(session)
        small = making.file(session, [making.CHAT])
    job = making.job(sessions, status="validating_files", training_file=small)
    with pytest.raises(JobStateError, match="already failed"):
        pause(sessions, job, settings)
    with sessions.begin() as session:
        jobs.admit(session, settings)
    assert making.reread(sessions, job.id).status == "failed"


def test_a_running_job_is_paused_at_once_and_its_last_checkpoint_still_counts(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    save(sessions, claim, 1)
    assert pause(sessions, job, settings).status == "paused"
    with sessions.begin() as session:
        assert claims.renew(session, claim, 60) == "pause"
    save(sessions, claim, 2)
    freed = let_go(sessions, claim)
    assert (freed.status, freed.lease_owner, freed.step) == ("paused", None, 2)
    assert freed.estimated_finish is None
    assert making.messages(sessions, job.id)[-1] == (
        "The job is paused and holds no device; it resumes from step 2."
    )
    assert nobody_can_claim(sessions)
    resume(sessions, job)
    again = making.claimed(sessions)
    assert again.attempt == 2
    assert progress_of(sessions, job.id) == 2


def progress_of(sessions: Sessions, job_id: str) -> int:
    with sessions() as session:
        checkpoint = progress.latest_checkpoint(session, job_id)
        assert checkpoint is not None
        return checkpoint.step


def test_a_job_resumed_while_its_trainer_stops_is_claimed_only_after_that(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    pause(sessions, job, settings)
    assert resume(sessions, job).status == "queued"
    assert nobody_can_claim(sessions)
    with sessions.begin() as session:
        assert claims.renew(session, claim, 60) == "pause"
    save(sessions, claim, 1)
    assert let_go(sessions, claim).status == "queued"
    assert making.claimed(sessions).attempt == 2


@pytest.mark.parametrize("resumed", [False, True])
def test_results_that_come_after_the_pause_are_made_again(
    sessions: Sessions, settings: Settings, resumed: bool
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    pause(sessions, job, settings)
    if resumed:
        resume(sessions, job)
    assert finish(sessions, claim).status == ("queued" if resumed else "paused")
    now = making.reread(sessions, job.id)
    assert (now.fine_tuned_model, now.result_files, now.lease_owner) == (None, [], None)
    if not resumed:
        resume(sessions, job)
    assert finish(sessions, making.claimed(sessions)).status == "succeeded"


def test_a_worker_lost_while_it_pauses_frees_the_job_and_counts_no_failure(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions, "worker-7")
    save(sessions, claim, 3)
    pause(sessions, job, settings)
    expire(sessions, job.id)
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 1
        assert endings.sweep(session, settings) == 0
    swept = making.reread(sessions, job.id)
    assert (swept.status, swept.failures, swept.lease_owner) == ("paused", 0, None)
    last = making.messages(sessions, job.id)[-1]
    assert last.startswith("Worker worker-7 was lost")
    assert last.endswith("The job is paused and holds no device; it resumes from step 3.")


def test_a_job_that_is_not_to_start_by_itself_waits_for_resume(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions, status="validating_files", options={"auto_start": False})
    with sessions.begin() as session:
        assert jobs.admit(session, settings) == 1
    waiting = making.reread(sessions, job.id)
    assert (waiting.status, waiting.pause_reason) == ("paused", "auto_start")
    assert nobody_can_claim(sessions)
    assert resume(sessions, job).status == "queued"
    assert making.claimed(sessions).job_id == job.id


def test_limits_begin_anew_with_each_resume(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions, options={"max_seconds": 60, "finish_by": int(time.time()) - 5})
    claim = making.claimed(sessions)
    save(sessions, claim, 4)
    with sessions.begin() as session:
        control.pause_at_limit(session, claim, "max_seconds", "The job has used its max_seconds = 60.")
        control.pause_at_limit(session, claim, "max_seconds", "Only the first counts.")
    let_go(sessions, claim)
    paused = making.reread(sessions, job.id)
    assert (paused.status, paused.pause_reason) == ("paused", "max_seconds")
    assert making.messages(sessions, job.id).count("The job has used its max_seconds = 60.") == 1
    resumed = resume(sessions, job)
    assert (resumed.limits_from_attempt, resumed.limits_from_step) == (1, 4)
    assert resumed.options == {"max_seconds": 60, "finish_by": None}  # that time has passed
    pause(sessions, job, settings)
    soon = int(time.time()) + 3600
    assert resume(sessions, job, max_seconds=None, finish_by=soon).options == {
        "max_seconds": None,
        "finish_by": soon,
    }


# --- any order -----------------------------------------------------------------------------------------


class Walk:
    """Requests and workers in a random order, beside a model of the life cycle as the documents tell it."""

    def __init__(self, sessions: Sessions, settings: Settings, seed: int) -> None:
        self.sessions, self.settings = sessions, settings
        self.chance = random.Random(seed)
        self.job = making.job(sessions)
        self.status = "queued"
        self.holder: claims.Claim | None = None
        self.lost: list[claims.Claim] = []
        """Claims of attempts that no longer hold the job and do not know it."""
        self.steps: set[int] = set()

    def go(self, moves: int) -> None:
        names = ["cancel", "pause", "resume", "claim", "work", "end", "fail", "let_go", "lose", "late"]
        weights = [1, 6, 8, 12, 12, 2, 1, 6, 3, 3]
        for _ in range(moves):
            getattr(self, self.chance.choices(names, weights)[0])()
            now = making.reread(self.sessions, self.job.id)
            assert now.status == self.status
            assert now.lease_owner == (self.holder.owner if self.holder else None)
            assert (now.finished_at is not None) == (self.status in ENDED)

    def _ask(self, wanted: str, request: Any) -> bool:
        """Whether the request was taken; refused exactly when the job has ended otherwise."""
        refused = self.status in ENDED and self.status != wanted
        try:
            request()
        except JobStateError:
            assert refused
            return False
        assert not refused
        return True

    def cancel(self) -> None:
        if self._ask("cancelled", lambda: cancel(self.sessions, self.job)):
            self.status = "cancelled"

    def pause(self) -> None:
        if self._ask("", lambda: pause(self.sessions, self.job, self.settings)):
            self.status = "paused"

    def resume(self) -> None:
        if self._ask("", lambda: resume(self.sessions, self.job)) and self.status == "paused":
            self.status = "queued"

    def claim(self) -> None:
        with self.sessions.begin() as session:
            session.get_one(Job, self.job.seq).not_before = None
        with self.sessions.begin() as session:
            claim = claims.claim(session, owner=f"w{self.chance.random()}", lease_seconds=60)
        assert (claim is not None) == (self.status == "queued" and self.holder is None)
        if claim is not None:
            self.holder, self.status = claim, "running"

    def work(self) -> None:
        if self.holder is None:
            return
        step = len(self.steps) + 1
        pruned = save(self.sessions, self.holder, step)
        if self.status == "cancelled":
            assert pruned == [f"jobs/{self.job.id}/{step}"]
        else:
            self.steps.add(step)

    def end(self) -> None:
        self._leave(lambda claim: finish(self.sessions, claim), "succeeded")

    def fail(self) -> None:
        def failing(claim: claims.Claim) -> None:
            with self.sessions.begin() as session:
                endings.fail(session, claim, TrainingError("Nothing fits."))

        self._leave(failing, "failed")

    def let_go(self) -> None:
        self._leave(lambda claim: let_go(self.sessions, claim), "queued")

    def _leave(self, way: Any, status: str) -> None:
        if self.holder is not None:
            way(self.holder)
            self.status = status if self.status == "running" else self.status
            self.holder = None

    def lose(self) -> None:
        if self.holder is None:
            return
        expire(self.sessions, self.job.id)
        patient = self.settings.model_copy(update={"max_failures": 100})
        with self.sessions.begin() as session:
            assert endings.sweep(session, patient) == 1
        self.lost.append(self.holder)
        self.status = "queued" if self.status == "running" else self.status
        self.holder = None

    def late(self) -> None:
        if self.lost:
            claim = self.chance.choice(self.lost)
            before = making.everything(self.sessions)
            for way in (lambda: save(self.sessions, claim, 99), lambda: finish(self.sessions, claim)):
                with pytest.raises(LeaseLost):
                    way()
            assert making.everything(self.sessions) == before


@pytest.mark.parametrize("seed", range(12))
def test_in_any_order_the_row_is_what_the_documents_say(
    sessions: Sessions, settings: Settings, seed: int
) -> None:
    walk = Walk(sessions, settings, seed)
    walk.go(40)
    with sessions() as session:
        assert set(session.scalars(select(Metric.step))) == walk.steps
        models = session.scalar(select(func.count()).select_from(Model))
        ends = session.scalars(select(Event.message).where(Event.message.contains("successfully completed")))
        assert models == len(ends.all()) == (walk.status == "succeeded")
