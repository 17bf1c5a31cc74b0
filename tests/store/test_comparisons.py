"""A comparison has a job's life cycle and is never mistaken for a job."""

import math

import pytest
from sqlalchemy import select

from olora_core.errors import TrainingError
from olora_core.progress import Note
from olora_core.specs import ComparisonSpec, TrainSpec
from store import claims, comparisons, control, endings, files, jobs, progress
from store.comparisons import EndedRun
from store.errors import JobStateError, LeaseLost, NotFound, UnknownCursor
from store.events import events_since
from store.kinds import COMPARISON, FINE_TUNING
from store.models import Job, Metric, Model
from store.session import Sessions, db_now
from store.settings import Settings
from tests.store import making

RESULTS = (
    endings.ResultFile("comparison.html", 10, "a" * 64, "jobs/c/1/comparison.html"),
    endings.ResultFile("comparison.json", 20, "b" * 64, "jobs/c/1/comparison.json"),
)
FINDINGS = {
    "verdict": {"sentence": "Take lora.", "take": "lora"},
    "methods": [{"method": "lora"}, {"method": "olora"}],
}


def record(sessions: Sessions, claim: claims.Claim, step: int, *runs: int) -> None:
    with sessions.begin() as session:
        ended = [EndedRun(making.run_finished(run)) for run in runs]
        comparisons.record(session, claim, at=making.compared_step(step), events=ended)


def succeed(sessions: Sessions, claim: claims.Claim) -> Job:
    with sessions.begin() as session:
        return comparisons.succeed(session, claim, files=RESULTS, findings=FINDINGS)


def test_a_comparison_that_goes_well_tells_its_owner_of_every_run(
    sessions: Sessions, settings: Settings
) -> None:
    made = making.comparison(sessions, status="validating_files")
    with sessions.begin() as session:
        assert jobs.admit(session, settings) == 1
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        told = [EndedRun(making.run_finished(3)), Note("info", "The grid goes on upward.")]
        diverged = EndedRun(making.run_finished(4, loss=None))
        comparisons.record(session, claim, at=making.compared_step(30), events=[*told, diverged])
    succeed(sessions, claim)
    assert making.messages(sessions, made.id) == [
        f"Created comparison: {made.id}",
        f"Validating training file: {made.training_file} and validation file: {made.validation_file}",
        "Files validated, moving comparison to queued state",
        "Comparison started",
        "Run 3/20: olora, search, learning rate 0.003, seed 7: loss=1.2346 after 10 steps, 12.3 s",
        "The grid goes on upward.",
        "Run 4/20: olora, search, learning rate 0.003, seed 7: it diverged after 10 steps, 12.3 s",
        "Take lora.",
        "The comparison has successfully completed",
    ]
    done = making.reread(sessions, made.id)
    assert made.id.startswith("cmp-")
    assert (done.status, done.findings, done.fine_tuned_model) == ("succeeded", FINDINGS, None)
    assert (done.lease_owner, done.lease_until, done.estimated_finish) == (None, None, None)
    with sessions() as session:
        results = [files.get_file(session, "p", file_id).filename for file_id in done.result_files]
        assert results == ["comparison.html", "comparison.json"]
        assert session.scalars(select(Model)).all() == []


def test_who_claims_one_learns_what_to_compare(sessions: Sessions) -> None:
    making.comparison(sessions)
    claim = making.claimed(sessions)
    assert claim.kind is COMPARISON
    assert isinstance(claim.spec, ComparisonSpec)
    assert claim.spec == making.COMPARISON
    making.job(sessions)
    claim = making.claimed(sessions)
    assert claim.kind is FINE_TUNING
    assert isinstance(claim.spec, TrainSpec)


def test_jobs_and_comparisons_wait_in_one_queue(sessions: Sessions) -> None:
    first, second = making.job(sessions), making.comparison(sessions)
    urgent = making.comparison(sessions)
    with sessions.begin() as session:
        session.get_one(Job, urgent.seq).priority = 5
    assert [making.claimed(sessions).job_id for _ in range(3)] == [urgent.id, first.id, second.id]


def test_neither_kind_is_found_as_the_other(sessions: Sessions) -> None:
    job, comparison = making.job(sessions), making.comparison(sessions)
    with sessions() as session:
        assert jobs.get_job(session, "p", job.id).id == job.id
        assert jobs.get_job(session, "p", comparison.id, COMPARISON).id == comparison.id
        with pytest.raises(NotFound, match=f"No such fine-tuning job: {comparison.id}"):
            jobs.get_job(session, "p", comparison.id)
        with pytest.raises(NotFound, match=f"No such comparison: {job.id}") as refused:
            jobs.get_job(session, "p", job.id, COMPARISON)
        assert refused.value.param == "comparison_id"


def test_neither_kind_is_listed_with_the_other(sessions: Sessions) -> None:
    made = [making.job(sessions), making.comparison(sessions), making.job(sessions)]
    made.append(making.comparison(sessions))
    with sessions() as session:
        listed = [job.id for job in jobs.list_jobs(session, "p").data]
        compared = [job.id for job in jobs.list_jobs(session, "p", kind=COMPARISON).data]
        page = jobs.list_jobs(session, "p", kind=COMPARISON, limit=1)
        assert page.has_more
        rest = jobs.list_jobs(session, "p", kind=COMPARISON, after=page.data[0].id)
        with pytest.raises(UnknownCursor):
            jobs.list_jobs(session, "p", kind=COMPARISON, after=made[0].id)
    assert listed == [made[2].id, made[0].id]
    assert compared == [made[3].id, made[1].id]
    assert [job.id for job in rest.data] == [made[1].id]


def test_a_step_moves_the_row_and_leaves_nothing_else(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    before = making.messages(sessions, made.id)
    record(sessions, claim, 25)
    record(sessions, claim, 26)
    row = making.reread(sessions, made.id)
    assert (row.step, row.total_steps) == (26, 400)
    assert row.at_run == {
        "run": 3,
        "runs": 20,
        "run_step": 6,
        "run_steps": 10,
        "method": "olora",
        "stage": "search",
        "learning_rate": 3e-3,
        "seed": 7,
        "loss": 0.5,
    }
    assert making.messages(sessions, made.id) == before
    with sessions() as session:
        assert session.scalars(select(Metric)).all() == []


def test_a_loss_that_is_no_number_is_null(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        comparisons.record(session, claim, at=making.compared_step(25, loss=math.nan))
    row = making.reread(sessions, made.id)
    assert row.step == 25
    assert row.at_run is not None
    assert row.at_run["loss"] is None


def test_steps_that_are_done_again_do_not_turn_the_row_back(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    record(sessions, claim, 30)
    record(sessions, claim, 25)
    assert making.reread(sessions, made.id).step == 30


def test_a_run_that_is_done_again_after_a_crash_is_told_once(sessions: Sessions, settings: Settings) -> None:
    made = making.comparison(sessions)
    record(sessions, making.claimed(sessions), 30, 1, 2)
    with sessions.begin() as session:
        session.get_one(Job, made.seq).lease_until = db_now() - 1
    with sessions.begin() as session:
        endings.sweep(session, settings)
        session.get_one(Job, made.seq).not_before = None
    record(sessions, making.claimed(sessions), 40, 2, 3)
    with sessions() as session:
        told = [event.data for event in events_since(session, made.id) if event.type == "run"]
    assert told == [making.run_finished(run) for run in (1, 2, 3)]


def test_the_end_is_expected_after_the_seconds_that_are_left(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        comparisons.record(session, claim, at=making.compared_step(25), seconds_left=600.0)
    row = making.reread(sessions, made.id)
    assert row.estimated_finish == pytest.approx((row.started_at or 0) + 600, abs=60)


def test_an_attempt_that_lost_its_comparison_writes_nothing(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        endings.hand_back(session, claim, reason="released", message="The worker was stopped.")
    making.claimed(sessions, owner="another")
    before = making.everything(sessions)
    with pytest.raises(LeaseLost):
        record(sessions, claim, 30, 3)
    with pytest.raises(LeaseLost):
        succeed(sessions, claim)
    assert making.everything(sessions) == before
    assert making.reread(sessions, made.id).attempt == 2


def test_a_checkpoint_of_a_comparison_sets_its_failures_back(sessions: Sessions) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        endings.hand_back(session, claim, reason="trainer_lost", message="It died.", crashed=True)
        session.get_one(Job, made.seq).not_before = None
    claim = making.claimed(sessions)
    assert making.reread(sessions, made.id).failures == 1
    with sessions.begin() as session:
        progress.add_checkpoint(session, claim, 25, {}, "jobs/c/25")
        assert progress.stored_checkpoints(session, made.id)[0].storage_key == "jobs/c/25"
    assert making.reread(sessions, made.id).failures == 0


def test_its_troubles_are_told_in_its_own_name(sessions: Sessions, settings: Settings) -> None:
    made = making.comparison(sessions)
    claim = making.claimed(sessions)
    record(sessions, claim, 25)
    with sessions.begin() as session:
        endings.hand_back(session, claim, reason="released", message="The worker was stopped.")
    with sessions.begin() as session:
        control.pause(session, session.get_one(Job, made.seq), settings)
        control.resume(session, session.get_one(Job, made.seq))
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        endings.fail(session, claim, TrainingError("Nothing fits."))
    onward = "Step 25 was reached; the comparison is queued again and resumes from the start."
    assert making.messages(sessions, made.id)[-4:] == [
        f"The worker was stopped. {onward}",
        "The comparison was paused.",
        "The comparison was resumed and is queued",
        "The comparison failed: Nothing fits.",
    ]
    with sessions.begin() as session, pytest.raises(JobStateError, match=f"Comparison {made.id} cannot be"):
        control.cancel(session, session.get_one(Job, made.seq))
