"""The life cycle of a job: which transitions are allowed, and what its owner reads."""

import csv
import io
import json
import math
import time
from typing import Any

import pytest
from sqlalchemy import select

from olora_core.errors import DataError
from olora_core.progress import Note
from olora_core.specs import RunFacts, resolve
from store import checkpoints, claims, control, endings, files, fine_tuned, jobs, progress
from store.errors import FileUnusable, LeaseLost, NotFound, UnknownCursor
from store.events import events_since, list_events
from store.models import Attempt, Event, File, Job, Metric, new_id
from store.session import Sessions, db_now, make_engine
from store.session import sessions as make_sessions
from store.settings import Settings
from tests.store import making

RESULTS = (
    endings.ResultFile("step_metrics.csv", 10, "a" * 64, "jobs/j/1/step_metrics.csv"),
    endings.ResultFile("adapter.zip", 20, "b" * 64, "jobs/j/1/adapter.zip"),
)
MODEL = "ft:olora-tiny:olora::AbCdEfGh"


def succeed(sessions: Sessions, claim: claims.Claim, model: str = MODEL) -> Job:
    with sessions.begin() as session:
        return endings.succeed(
            session,
            claim,
            files=RESULTS,
            model=model,
            certificate={"max_abs_logit_diff": 1e-6, "passed": True},
            trained_tokens=1234,
        )


def hand_back(sessions: Sessions, claim: claims.Claim, *, crashed: bool) -> Job:
    with sessions.begin() as session:
        return endings.hand_back(
            session, claim, reason="trainer_died", message="The trainer died.", crashed=crashed
        )


def add_checkpoint(
    sessions: Sessions, claim: claims.Claim, step: int, best_step: int | None = None
) -> list[str]:
    with sessions.begin() as session:
        return progress.add_checkpoint(
            session, claim, step, {"loss": 0.5}, f"jobs/{claim.job_id}/ckpt-{step}", best_step
        )


def expire(sessions: Sessions, job_id: str) -> None:
    """Expires the lease, as if the worker had been silent for an hour."""
    with sessions.begin() as session:
        job = session.scalars(select(Job).where(Job.id == job_id)).one()
        job.lease_until = db_now() - 3600


def rest_is_over(sessions: Sessions, job_id: str) -> None:
    with sessions.begin() as session:
        session.scalars(select(Job).where(Job.id == job_id)).one().not_before = None


# --- the whole way -------------------------------------------------------------------------------------


def test_a_job_that_goes_well_tells_its_owner_what_clients_expect(
    sessions: Sessions, settings: Settings
) -> None:
    job = making.job(sessions, status="validating_files")
    with sessions.begin() as session:
        assert jobs.admit(session, settings) == 1
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(60, 0.7345, valid_loss=1.4567, total_steps=200)])
    job = succeed(sessions, claim)
    assert making.messages(sessions, job.id) == [
        f"Created fine-tuning job: {job.id}",
        f"Validating training file: {job.training_file}",
        "Files validated, moving job to queued state",
        "Fine-tuning job started",
        "Step 60/200: training loss=0.73, validation loss=1.46",
        f"New fine-tuned model created: {MODEL}",
        "The job has successfully completed",
    ]
    done = making.reread(sessions, job.id)
    assert (done.status, done.fine_tuned_model, done.trained_tokens) == ("succeeded", MODEL, 1234)
    assert done.finished_at is not None
    assert done.finished_at >= (done.started_at or math.inf) >= done.created_at
    assert (done.lease_owner, done.lease_until, done.estimated_finish) == (None, None, None)


def test_the_csv_comes_first_among_the_result_files(sessions: Sessions) -> None:
    making.job(sessions)
    job = succeed(sessions, making.claimed(sessions))
    with sessions() as session:
        results = [files.get_file(session, "p", file_id) for file_id in job.result_files]
        assert [file.filename for file in results] == ["step_metrics.csv", "adapter.zip"]
        assert {file.purpose for file in results} == {"fine-tune-results"}
        assert fine_tuned.get_model(session, "p", MODEL).job_id == job.id


def test_the_event_of_the_model_names_it_in_its_data(sessions: Sessions) -> None:
    making.job(sessions)
    job = succeed(sessions, making.claimed(sessions))
    with sessions() as session:
        named = [event for event in events_since(session, job.id) if MODEL in event.message]
    assert [event.data for event in named] == [{"fine_tuned_model": MODEL}]


def test_times_are_filled_in_when_the_session_is_gone(sessions: Sessions) -> None:
    making.job(sessions)
    job = succeed(sessions, making.claimed(sessions))
    assert job.created_at <= job.finished_at  # type: ignore[operator]


def test_a_metrics_event_carries_the_numbers(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    measured = making.step(3, tokens=90, valid_loss=0.9, valid_accuracy=0.6)
    with sessions.begin() as session:
        progress.record(session, claim, steps=[measured], total_steps=20)
    with sessions() as session:
        event = list_events(session, claim.job_id).data[0]
    assert event.type == "metrics"
    assert event.data == {
        "step": 3,
        "total_steps": 20,
        "train_loss": 0.5,
        "train_mean_token_accuracy": 0.75,
        "valid_loss": 0.9,
        "valid_mean_token_accuracy": 0.6,
        "tokens": 90,
        "seconds": 0.5,
    }


def test_the_whole_validation_file_joins_its_step(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    evaluation = {"step": 2, "loss": 0.8, "accuracy": 0.7}
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(1), making.step(2)], evaluations=[evaluation])
    with sessions.begin() as session:  # told again after a crash
        progress.record(session, claim, evaluations=[evaluation])
    with sessions() as session:
        events = [e for e in events_since(session, claim.job_id) if e.type == "metrics"]
    assert [event.message for event in events] == [
        "Step 1/20: training loss=0.50",
        "Step 2/20: training loss=0.50, full validation loss=0.80",
    ]
    assert events[1].data is not None
    assert events[1].data["full_valid_mean_token_accuracy"] == 0.7


@pytest.mark.parametrize("first", ["step", "evaluation"])
def test_the_whole_validation_file_may_come_after_its_step_or_before(sessions: Sessions, first: str) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    parts: list[dict[str, Any]] = [
        {"steps": [making.step(2)]},
        {"evaluations": [{"step": 2, "loss": 0.8, "accuracy": 0.7}]},
    ]
    for part in parts if first == "step" else parts[::-1]:
        with sessions.begin() as session:
            progress.record(session, claim, **part)
    with sessions() as session:
        values = session.scalars(select(Metric.values)).one()
    assert (values["train_loss"], values["full_valid_loss"]) == (0.5, 0.8)


def test_what_the_models_answered_is_kept_on_the_job(sessions: Sessions) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    row = {"line": 3, "prompt": "Say\x00 it.", "reference": "It.", "base": "Eh?", "tuned": "It."}
    with sessions.begin() as session:
        progress.record(session, claim, samples={"file": "validation", "rows": [row]})
    with sessions.begin() as session:  # what follows leaves it alone
        progress.record(session, claim, steps=[making.step(1)])
    kept = making.reread(sessions, job.id).samples
    assert kept == {"file": "validation", "rows": [{**row, "prompt": "Say\ufffd it."}]}


def test_the_result_file_has_one_row_per_step(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        steps = [making.step(2, valid_loss=0.9), making.step(1, math.nan)]
        progress.record(session, claim, steps=steps, evaluations=[{"step": 2, "loss": 0.8, "accuracy": 0.6}])
    with sessions() as session:
        rows = list(csv.reader(io.StringIO(progress.metrics_csv(session, claim.job_id))))
    assert rows == [
        [
            *("step", "train_loss", "train_accuracy", "valid_loss", "valid_mean_token_accuracy"),
            *("full_valid_loss", "full_valid_mean_token_accuracy"),
        ],
        ["1", "", "0.75", "", "", "", ""],
        ["2", "0.5", "0.75", "0.9", "", "0.8", "0.6"],
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_not_finite_becomes_null_and_a_warning(sessions: Sessions, value: float) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(4, value)])
        progress.add_checkpoint(session, claim, 4, {"loss": value}, "jobs/j/ckpt-4")
    with sessions() as session:
        for data in session.scalars(select(Event.data).where(Event.data.is_not(None))):
            json.dumps(data, allow_nan=False)
        warning = session.scalars(select(Event).where(Event.level == "warn")).one()
        assert "Step 4" in warning.message
        assert "train_loss" in warning.message
        assert session.scalars(select(Metric.values)).one()["train_loss"] is None
        assert progress.list_checkpoints(session, claim.job_id).data[0].metrics["train_loss"] is None


def test_the_end_is_estimated_from_the_last_steps(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(n, seconds=2.0) for n in (1, 2)], total_steps=12)
    job = making.reread(sessions, claim.job_id)
    assert job.estimated_finish is not None
    assert job.estimated_finish - time.time() == pytest.approx(20, abs=3)


def test_what_the_first_attempt_resolved_the_second_one_keeps(sessions: Sessions) -> None:
    making.job(sessions)
    first = making.claimed(sessions)
    assert not first.resolved
    resolved, _ = resolve(making.SPEC, RunFacts(examples=40, hidden_size=192, context_length=256))
    other, _ = resolve(making.SPEC, RunFacts(examples=4000, hidden_size=192, context_length=256))
    with sessions.begin() as session:
        progress.record(session, first, resolved=resolved)
        progress.record(session, first, resolved=other)
    hand_back(sessions, first, crashed=False)
    second = making.claimed(sessions)
    assert second.resolved
    assert second.spec == resolved


# --- creation and admission ----------------------------------------------------------------------------


def test_a_job_names_both_files_it_checks(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        validation = making.file(session)
    job = making.job(sessions, validation_file=validation)
    assert (
        f"Validating training file: {job.training_file} and validation file: {validation.id}"
        in making.messages(sessions, job.id)
    )


@pytest.mark.parametrize(
    ("rows", "code", "says"),
    [
        (
            [making.CHAT] * 7,
            "invalid_n_examples",
            "Training file has 7 example(s), but must have at least 10",
        ),
        ([making.PREFERENCE] * 10, "unexpected_file_format", "preference"),
        (
            [{"messages": [{"role": "user", "content": "hello"}]}] * 10,
            "invalid_training_file",
            "Line 1",
        ),
    ],
)
def test_a_file_that_cannot_be_trained_on_fails_the_job_and_says_why(
    sessions: Sessions, settings: Settings, rows: list[dict[str, object]], code: str, says: str
) -> None:
    with sessions.begin() as session:
        making.project(session)
        file = making.file(session, rows)
    job = making.job(sessions, status="validating_files", training_file=file)
    with sessions.begin() as session:
        jobs.admit(session, settings)
    failed = making.reread(sessions, job.id)
    assert failed.status == "failed"
    assert failed.finished_at is not None
    assert failed.error is not None
    assert (failed.error["code"], failed.error["param"]) == (code, "training_file")
    assert says in failed.error["message"]
    assert failed.error["message"] in making.messages(sessions, job.id)[-1]


def test_a_validation_file_of_another_format_fails_the_job(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as session:
        making.project(session)
        validation = making.file(session, [making.COMPLETION] * 2)
    job = making.job(sessions, status="validating_files", validation_file=validation)
    with sessions.begin() as session:
        jobs.admit(session, settings)
    error = making.reread(sessions, job.id).error
    assert error is not None
    assert (error["code"], error["param"]) == ("invalid_validation_file", "validation_file")


def test_a_short_validation_file_is_fine(sessions: Sessions, settings: Settings) -> None:
    with sessions.begin() as session:
        making.project(session)
        validation = making.file(session, [making.CHAT])
    job = making.job(sessions, status="validating_files", validation_file=validation)
    with sessions.begin() as session:
        jobs.admit(session, settings)
    assert making.reread(sessions, job.id).status == "queued"


def test_a_file_deleted_meanwhile_fails_the_job(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions, status="validating_files")
    with sessions.begin() as session:
        session.scalars(select(File)).one().deleted_at = db_now()
    with sessions.begin() as session:
        jobs.admit(session, settings)
    error = making.reread(sessions, job.id).error
    assert error is not None
    assert error["code"] == "invalid_training_file"
    assert "deleted" in error["message"]


def test_a_job_cannot_begin_on_a_deleted_file_or_on_another_purpose(sessions: Sessions) -> None:
    with sessions.begin() as session:
        making.project(session)
        gone, picture = making.file(session), making.file(session, purpose="vision")
        files.delete_file(session, "p", gone.id)
    with pytest.raises(NotFound, match="deleted"):
        making.job(sessions, training_file=gone)
    with pytest.raises(FileUnusable, match="purpose"):
        making.job(sessions, training_file=picture)


def test_admitting_twice_changes_nothing_more(sessions: Sessions, settings: Settings) -> None:
    making.job(sessions, status="validating_files")
    with sessions.begin() as session:
        jobs.admit(session, settings)
    before = making.everything(sessions)
    with sessions.begin() as session:
        assert jobs.admit(session, settings) == 0
    assert making.everything(sessions) == before


# --- claims --------------------------------------------------------------------------------------------


def test_a_claim_sets_a_lease_by_the_databases_clock(sessions: Sessions) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions, lease_seconds=100)
    claimed = making.reread(sessions, job.id)
    with sessions() as session:
        now = session.scalar(select(db_now()))
    assert (claim.attempt, claimed.attempt, claimed.status) == (1, 1, "running")
    assert claimed.lease_until - now == pytest.approx(100, abs=5)  # type: ignore[operator]
    assert claim.training_key == f"files/{job.training_file}"


def test_a_second_delivery_does_nothing(sessions: Sessions) -> None:
    making.job(sessions)
    making.claimed(sessions)
    before = making.everything(sessions)
    for _ in range(10):
        with sessions.begin() as session:
            assert claims.claim(session, owner="late", lease_seconds=60) is None
    assert making.everything(sessions) == before


def test_an_idle_worker_waits_for_no_writer(sqlite_url: str) -> None:
    engine = make_engine(sqlite_url)
    with engine.begin():  # BEGIN IMMEDIATE: any other writer waits for up to 30 s
        start = time.monotonic()
        with make_sessions(engine).begin() as session:
            assert claims.claim(session, owner="idle", lease_seconds=60) is None
        assert time.monotonic() - start < 5
    engine.dispose()


def test_higher_priority_goes_first_then_age(sessions: Sessions) -> None:
    made = [making.job(sessions) for _ in range(3)]
    with sessions.begin() as session:
        session.merge(made[2]).priority = 5
    order = [making.claimed(sessions).job_id for _ in range(3)]
    assert order == [made[2].id, made[0].id, made[1].id]


def test_projects_take_turns(sessions: Sessions) -> None:
    for project_id in ("a", "a", "a", "b", "b", "c"):
        making.job(sessions, project_id)
    order = []
    for _ in range(6):
        order.append(making.claimed(sessions).project_id)
        time.sleep(0.005)  # SQLite's clock shows milliseconds
    assert sorted(order[:3]) == ["a", "b", "c"]
    assert sorted(order[3:5]) == ["a", "b"]
    assert order[5] == "a"


def test_a_job_that_rests_is_not_claimed(sessions: Sessions) -> None:
    job = making.job(sessions)
    with sessions.begin() as session:
        session.merge(job).not_before = db_now() + 60
    with sessions.begin() as session:
        assert claims.claim(session, owner="w", lease_seconds=60) is None
    rest_is_over(sessions, job.id)
    assert making.claimed(sessions).job_id == job.id


# --- the fence -----------------------------------------------------------------------------------------


def test_a_loser_changes_nothing(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions)
    loser = making.claimed(sessions, "loser")
    expire(sessions, job.id)
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 1
    rest_is_over(sessions, job.id)
    winner = making.claimed(sessions, "winner")
    assert winner.attempt == loser.attempt + 1
    before = making.everything(sessions)
    with sessions() as session:
        for write in (
            lambda: claims.renew(session, loser, 60),
            lambda: progress.record(session, loser, steps=[making.step(1)], events=[Note("info", "!")]),
            lambda: progress.add_checkpoint(session, loser, 1, {}, "jobs/j/ckpt-1"),
            lambda: endings.fail(session, loser, DataError("no")),
            lambda: endings.hand_back(session, loser, reason="r", message="m", crashed=True),
            lambda: endings.succeed(
                session, loser, files=RESULTS, model=MODEL, certificate={}, trained_tokens=1
            ),
        ):
            with pytest.raises(LeaseLost):
                write()
            session.commit()  # even if its caller went on
    assert making.everything(sessions) == before
    succeed(sessions, winner)


def test_a_report_after_success_changes_nothing(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    succeed(sessions, claim)
    before = making.everything(sessions)
    with pytest.raises(LeaseLost):
        succeed(sessions, claim, "ft:other")
    with pytest.raises(LeaseLost), sessions.begin() as session:
        endings.fail(session, claim, DataError("no"))
    assert making.everything(sessions) == before


def test_the_attempt_never_falls(sessions: Sessions) -> None:
    making.job(sessions)
    attempts = []
    for _ in range(4):
        claim = making.claimed(sessions)
        attempts.append(claim.attempt)
        hand_back(sessions, claim, crashed=False)
    assert attempts == [1, 2, 3, 4]


def test_renewing_prolongs_the_lease_and_tells_the_wish(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions, lease_seconds=1)
    with sessions.begin() as session:
        assert claims.renew(session, claim, 60) is None
        control.cancel(session, job)
    with sessions.begin() as session:
        assert claims.renew(session, claim, 60) == "cancel"
        assert endings.sweep(session, settings) == 0


# --- redone steps --------------------------------------------------------------------------------------


def test_redone_steps_leave_no_second_row_and_no_second_event(sessions: Sessions) -> None:
    making.job(sessions)
    first = making.claimed(sessions)
    with sessions.begin() as session:
        progress.record(session, first, steps=[making.step(n) for n in (1, 2, 3)])
    hand_back(sessions, first, crashed=False)
    second = making.claimed(sessions)
    with sessions.begin() as session:
        progress.record(session, second, steps=[making.step(n, 0.1) for n in (2, 3, 4)])
    with sessions() as session:
        rows = session.execute(select(Metric.step, Metric.values).order_by(Metric.step)).all()
        steps = session.scalars(select(Event.message).where(Event.type == "metrics").order_by(Event.seq))
        assert [(step, values["train_loss"]) for step, values in rows] == [
            (1, 0.5),
            (2, 0.5),
            (3, 0.5),
            (4, 0.1),
        ]
        assert [message.split(":")[0] for message in steps] == [f"Step {n}/20" for n in (1, 2, 3, 4)]
    assert making.reread(sessions, first.job_id).step == 4


# --- handing back, crashes, sweeping -------------------------------------------------------------------


def test_a_job_handed_back_waits_again_and_counts_no_failure(sessions: Sessions) -> None:
    making.job(sessions)
    job = hand_back(sessions, making.claimed(sessions), crashed=False)
    assert (job.status, job.failures, job.not_before) == ("queued", 0, None)
    assert making.claimed(sessions).attempt == 2


def test_a_crash_counts_rests_and_tells_where_the_job_goes_on(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    add_checkpoint(sessions, claim, 40)
    with sessions.begin() as session:
        progress.record(session, claim, steps=[making.step(57)])
    job = hand_back(sessions, claim, crashed=True)
    assert (job.status, job.failures) == ("queued", 1)
    assert 0 < job.not_before - time.time() < 2  # type: ignore[operator]
    with sessions() as session:
        warnings = session.scalars(select(Event).where(Event.level == "warn")).all()
    assert [warning.message for warning in warnings] == [
        "The trainer died. Step 57 was reached; the job is queued again and resumes from step 40."
    ]


def test_three_crashes_without_a_checkpoint_end_the_job_and_say_why(sessions: Sessions) -> None:
    job = making.job(sessions)
    for _ in range(3):
        rest_is_over(sessions, job.id)
        job = hand_back(sessions, making.claimed(sessions), crashed=True)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "trainer_died"
    assert "3 times without a new checkpoint" in job.error["message"]
    assert "The trainer died." in job.error["message"]


def test_a_new_checkpoint_sets_the_failures_back(sessions: Sessions) -> None:
    job = making.job(sessions)
    for step in range(1, 6):
        rest_is_over(sessions, job.id)
        claim = making.claimed(sessions)
        add_checkpoint(sessions, claim, step)
        job = hand_back(sessions, claim, crashed=True)
        assert (job.status, job.failures) == ("queued", 1)


def test_the_same_checkpoint_again_is_no_progress(sessions: Sessions) -> None:
    job = making.job(sessions)
    statuses = []
    for _ in range(4):
        rest_is_over(sessions, job.id)
        claim = making.claimed(sessions)
        add_checkpoint(sessions, claim, 10)
        statuses.append(hand_back(sessions, claim, crashed=True).status)
        if statuses[-1] == "failed":
            break
    assert statuses == ["queued", "queued", "failed"]


def test_an_expired_lease_puts_the_job_back_with_one_warning(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions)
    making.claimed(sessions, "worker-7")
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 0
    expire(sessions, job.id)
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 1
    before = making.everything(sessions)
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 0  # idempotent
    assert making.everything(sessions) == before
    swept = making.reread(sessions, job.id)
    assert (swept.status, swept.failures, swept.lease_owner) == ("queued", 1, None)
    with sessions() as session:
        warning = session.scalars(select(Event).where(Event.level == "warn")).one()
        attempt = session.scalars(select(Attempt)).one()
    assert "worker-7" in warning.message
    assert "from the start" in warning.message
    assert attempt.end_reason == "lease_lost"


def test_a_running_job_without_a_lease_is_swept_too(sessions: Sessions, settings: Settings) -> None:
    job = making.job(sessions)
    making.claimed(sessions)
    with sessions.begin() as session:
        session.scalars(select(Job)).one().lease_until = None
    with sessions.begin() as session:
        assert endings.sweep(session, settings) == 1
    assert making.reread(sessions, job.id).status == "queued"


def test_the_rest_after_a_crash_grows_and_ends() -> None:
    assert [endings.back_off(n) for n in (1, 2, 3, 10)] == [1, 2, 4, 60]


# --- checkpoints ---------------------------------------------------------------------------------------


def test_two_checkpoints_are_kept(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    pruned = [add_checkpoint(sessions, claim, step) for step in (10, 20, 30, 40)]
    prefix = f"jobs/{claim.job_id}/ckpt"
    assert pruned == [[], [], [f"{prefix}-10"], [f"{prefix}-20"]]
    with sessions() as session:
        assert [c.step for c in progress.stored_checkpoints(session, claim.job_id)] == [40, 30]
        assert [c.step for c in progress.list_checkpoints(session, claim.job_id).data] == [40, 30]
        latest = progress.latest_checkpoint(session, claim.job_id)
        assert latest is not None
        assert latest.step == 40


def test_the_best_checkpoint_is_kept_beside_them_until_another_is_better(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    told = [(10, 10), (20, 20), (30, 20), (40, 20), (50, 20), (60, 60), (70, 60)]
    pruned = [add_checkpoint(sessions, claim, step, best) for step, best in told]
    prefix = f"jobs/{claim.job_id}/ckpt"
    gone = [[], [], ["10"], [], ["30"], ["40", "20"], ["50"]]
    assert pruned == [[f"{prefix}-{step}" for step in steps] for steps in gone]
    with sessions() as session:
        assert [c.step for c in progress.stored_checkpoints(session, claim.job_id)] == [70, 60]


def test_a_checkpoint_made_again_replaces_its_forerunner(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    add_checkpoint(sessions, claim, 10)
    with sessions.begin() as session:
        assert progress.add_checkpoint(session, claim, 10, {}, "jobs/again") == [
            f"jobs/{claim.job_id}/ckpt-10"
        ]
    with sessions() as session:
        assert [c.storage_key for c in progress.stored_checkpoints(session, claim.job_id)] == ["jobs/again"]


def test_a_pruned_checkpoint_is_not_found(sessions: Sessions) -> None:
    job = making.job(sessions)
    claim = making.claimed(sessions)
    add_checkpoint(sessions, claim, 1)
    with sessions() as session:
        first = progress.list_checkpoints(session, claim.job_id).data[0]
        assert checkpoints.get_checkpoint(session, job.project_id, first.id).step == 1
    for step in (2, 3):
        add_checkpoint(sessions, claim, step)
    with sessions() as session, pytest.raises(NotFound):
        checkpoints.get_checkpoint(session, job.project_id, first.id)


# --- reading -------------------------------------------------------------------------------------------


def test_walking_the_events_neither_repeats_nor_skips_while_new_ones_come(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)

    def take(number: int) -> None:
        with sessions.begin() as session:
            progress.record(session, claim, steps=[making.step(number)])

    for number in range(1, 11):
        take(number)
    with sessions() as session:
        there = [event.id for event in events_since(session, claim.job_id)]
    walked: list[str] = []
    number = 11
    while True:
        with sessions() as session:
            page = list_events(session, claim.job_id, after=walked[-1] if walked else None, limit=3)
        walked += [event.id for event in page.data]
        take(number)  # arrives while the client walks
        number += 1
        if not page.has_more:
            break
    assert walked == there[::-1]


def test_following_the_events_misses_none(sessions: Sessions) -> None:
    making.job(sessions)
    claim = making.claimed(sessions)
    seen: list[str] = []
    last = 0
    for number in range(1, 5):
        with sessions.begin() as session:
            progress.record(session, claim, steps=[making.step(number)])
        with sessions() as session:
            for event in events_since(session, claim.job_id, last, limit=2):
                seen.append(event.message)
                last = event.seq
    with sessions() as session:
        seen += [event.message for event in events_since(session, claim.job_id, last)]
    assert seen == making.messages(sessions, claim.job_id)


def test_an_unknown_cursor_is_an_error_also_when_it_belongs_to_somebody_else(sessions: Sessions) -> None:
    job, other = making.job(sessions, "a"), making.job(sessions, "b")
    with sessions() as session:
        with pytest.raises(UnknownCursor):
            jobs.list_jobs(session, "a", after="ftjob-nothing")
        with pytest.raises(UnknownCursor):
            jobs.list_jobs(session, "a", after=other.id)
        event = events_since(session, other.id)[0]
        with pytest.raises(UnknownCursor):
            list_events(session, job.id, after=event.id)


def test_jobs_are_listed_newest_first_and_by_project(sessions: Sessions) -> None:
    made = [making.job(sessions, "a") for _ in range(5)]
    making.job(sessions, "b")
    with sessions() as session:
        first = jobs.list_jobs(session, "a", limit=3)
        second = jobs.list_jobs(session, "a", limit=3, after=first.data[-1].id)
    assert [job.id for job in first.data] == [job.id for job in made[:1:-1]]
    assert first.has_more
    assert [job.id for job in second.data] == [made[1].id, made[0].id]
    assert not second.has_more


def test_jobs_are_found_by_their_metadata(sessions: Sessions) -> None:
    plain = making.job(sessions)
    one = making.job(sessions, metadata={"team": "x", "quote\"'$.": "y"})
    both = making.job(sessions, metadata={"team": "x", "stage": ""})

    def found(metadata: dict[str, str] | str | None) -> list[str]:
        with sessions() as session:
            return [job.id for job in jobs.list_jobs(session, "p", metadata=metadata).data]  # type: ignore[arg-type]

    assert found(None) == [both.id, one.id, plain.id]
    assert found({"team": "x"}) == [both.id, one.id]
    assert found({"team": "x", "stage": ""}) == [both.id]
    assert found({"quote\"'$.": "y"}) == [one.id]
    assert found({"team": "z"}) == []
    assert found("null") == [plain.id]


def test_another_projects_job_is_not_found(sessions: Sessions) -> None:
    job = making.job(sessions, "a")
    with sessions() as session:
        assert jobs.get_job(session, "a", job.id).id == job.id
        with pytest.raises(NotFound):
            jobs.get_job(session, "b", job.id)


# --- models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "suffix", "begins"),
    [
        ("meta-llama/Llama-3.2-1B", None, "ft:meta-llama--llama-3.2-1b:olora::"),
        ("olora-tiny", "my-suffix", "ft:olora-tiny:olora:my-suffix:"),
    ],
)
def test_a_model_is_named_as_clients_expect(base: str, suffix: str | None, begins: str) -> None:
    job_id = new_id("ftjob-")
    assert fine_tuned.model_name(base, "olora", suffix, job_id) == begins + job_id[-8:]


def test_deleting_a_model_takes_its_adapter_and_keeps_the_jobs_record(sessions: Sessions) -> None:
    making.job(sessions)
    job = succeed(sessions, making.claimed(sessions))
    with sessions() as session, pytest.raises(NotFound):
        fine_tuned.delete_model(session, "other", MODEL)
    with sessions.begin() as session:
        fine_tuned.delete_model(session, "p", MODEL)
    with sessions() as session:
        assert fine_tuned.list_models(session, "p") == []
        with pytest.raises(NotFound):
            fine_tuned.get_model(session, "p", MODEL)
        files.get_file(session, "p", job.result_files[0])
        with pytest.raises(NotFound):
            files.get_file(session, "p", job.result_files[1])
        assert jobs.get_job(session, "p", job.id).fine_tuned_model == MODEL
