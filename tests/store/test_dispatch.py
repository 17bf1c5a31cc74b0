"""The dispatcher moves waiting jobs, in several threads too, and survives outages of database and broker."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from kombu.entity import Queue
from sqlalchemy import Engine, select, text, update

from store import dispatch, files, jobs, workers
from store.dispatch import Dispatcher, take_wake_ups
from store.models import File, Job, Worker
from store.queue import QUEUE, celery_app
from store.session import Sessions, db_now, make_engine
from store.settings import Settings, read_settings
from store.storage import INCOMING, storage
from store.workers import WorkerFacts
from tests import services
from tests.store import making


@pytest.fixture
def dispatcher(settings: Settings, engine: Engine) -> Iterator[Dispatcher]:
    made = Dispatcher(settings, engine)
    yield made
    made.stop()


def waiting(settings: Settings) -> int:
    with celery_app(settings).connection_for_read() as connection:
        return int(Queue(QUEUE)(connection.default_channel).queue_declare().message_count)


def lose_messages(settings: Settings) -> None:
    with celery_app(settings).connection_for_read() as connection:
        Queue(QUEUE)(connection.default_channel).purge()


def wait_until(ready: Callable[[], object]) -> float:
    start = time.monotonic()
    services.wait_until(ready, "It")
    return time.monotonic() - start


def statuses(sessions: Sessions) -> list[str]:
    with sessions() as session:
        return list(session.scalars(select(Job.status).order_by(Job.seq)))


def make_older(sessions: Sessions, seconds: float) -> None:
    """As if the last wake-up had been sent so much earlier."""
    with sessions.begin() as session:
        session.execute(update(Job).values(dispatched_at=Job.dispatched_at - seconds))


# --- a round -------------------------------------------------------------------------------------------


def test_a_new_job_is_admitted_and_a_worker_woken(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions, status="validating_files")
    dispatcher.tick()
    assert statuses(sessions) == ["queued"]
    assert waiting(settings) == 1


def test_a_job_that_waits_with_no_worker_there_says_so_once(
    dispatcher: Dispatcher, sessions: Sessions
) -> None:
    job = making.job(sessions, status="validating_files")
    dispatcher.tick()

    def told() -> list[str]:
        return [text for text in making.messages(sessions, job.id) if "no worker" in text]

    def wait(seconds: float) -> None:
        with sessions.begin() as session:
            session.execute(update(Job).values(waiting_since=Job.waiting_since - seconds))
            session.execute(update(Worker).values(seen_at=Worker.seen_at - seconds))
        dispatcher.tick()

    with sessions.begin() as session:
        workers.report(session, WorkerFacts("w", "host", "CPU", None, {}), None)
    wait(30)
    assert told() == []
    with sessions.begin() as session:
        workers.report(session, WorkerFacts("w", "host", "CPU", None, {}), None)
    wait(40)
    assert told() == [], "a worker was there 40 s ago"
    wait(30)
    assert told() == [
        "The job waits, and no worker has been seen for 60 s. Start one with `olora serve` or `olora worker`."
    ]
    wait(300)
    assert len(told()) == 1


def test_a_lost_workers_job_waits_again_and_a_worker_is_woken(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions)
    making.claimed(sessions)
    with sessions.begin() as session:
        session.execute(update(Job).values(lease_until=db_now() - 1))
    dispatcher.tick()
    assert statuses(sessions) == ["queued"]
    assert waiting(settings) == 0  # it rests for a second
    time.sleep(1.1)
    dispatcher.tick()
    assert waiting(settings) == 1


def test_a_lost_message_is_sent_again_at_growing_intervals(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions)
    dispatcher.tick()
    for pause in (2, 4, 8, 16, 32, 60, 60):
        lose_messages(settings)
        make_older(sessions, pause - 1)
        dispatcher.tick()
        assert waiting(settings) == 0
        make_older(sessions, 1)
        dispatcher.tick()
        assert waiting(settings) == 1


def test_many_waiting_jobs_do_not_fill_the_queue(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions)
    with sessions.begin() as session:
        file = making.file(session)
        for _ in range(39):
            jobs.create(session, project_id="p", spec=making.SPEC, training_file=file).status = "queued"
    for _ in range(5):
        dispatcher.tick()
    assert waiting(settings) == dispatch.MAX_WAKE_UPS
    lose_messages(settings)
    make_older(sessions, 100)
    dispatcher.tick()
    assert waiting(settings) == 1  # one for all that had one before


def test_nothing_is_sent_while_nothing_waits(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions)
    making.claimed(sessions)
    dispatcher.tick()
    assert waiting(settings) == 0


def test_a_second_round_changes_nothing(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    making.job(sessions, status="validating_files")
    dispatcher.tick()
    before = making.everything(sessions)
    dispatcher.tick(tidy=True)
    assert making.everything(sessions) == before
    assert waiting(settings) == 1


def test_two_dispatchers_note_each_wake_up_once(sessions: Sessions) -> None:
    making.job(sessions)
    with sessions.begin() as session:
        file = making.file(session)
        for _ in range(9):
            jobs.create(session, project_id="p", spec=making.SPEC, training_file=file).status = "queued"
    counts: list[int] = []
    barrier = threading.Barrier(4)

    def dispatch_once() -> None:
        barrier.wait(20)
        with sessions.begin() as session:
            counts.append(take_wake_ups(session))

    threads = [threading.Thread(target=dispatch_once) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sum(counts) == 10
    with sessions() as session:
        assert set(session.scalars(select(Job.dispatches))) == {1}


# --- tidying up ----------------------------------------------------------------------------------------


def test_leftovers_are_removed_at_the_start(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    store = storage(settings)
    leftover = store.root / INCOMING / "abc.part"
    leftover.write_bytes(b"half")
    with sessions.begin() as session:
        making.project(session)
        file = making.file(session, expires_in=3600)
    with store.writer(files.file_key(file.id)) as writer:
        writer.write(b"x")
    with sessions.begin() as session:
        session.execute(update(File).values(expires_at=db_now() - 1))
    dispatcher.tick()
    assert not leftover.exists()
    assert store.list("files") == []


def test_a_nudge_removes_what_was_deleted(
    dispatcher: Dispatcher, settings: Settings, sessions: Sessions
) -> None:
    dispatcher.start()
    store = storage(settings)
    with sessions.begin() as session:
        making.project(session)
        file = making.file(session)
    with store.writer(files.file_key(file.id)) as writer:
        writer.write(b"x")
    with sessions.begin() as session:
        files.delete_file(session, "p", file.id)
    dispatcher.nudge()
    wait_until(lambda: not store.exists(files.file_key(file.id)))


# --- the thread ----------------------------------------------------------------------------------------


def test_a_nudge_is_followed_at_once_and_its_lack_after_a_while(
    settings: Settings, engine: Engine, sessions: Sessions
) -> None:
    slow = Dispatcher(settings, engine, tick_seconds=30)
    slow.start()
    time.sleep(0.3)
    making.job(sessions, status="validating_files")
    slow.nudge()
    assert wait_until(lambda: statuses(sessions) == ["queued"]) < 5
    slow.stop()
    quick = Dispatcher(settings, engine, tick_seconds=0.3)
    quick.start()
    making.job(sessions, status="validating_files")
    wait_until(lambda: statuses(sessions) == ["queued", "queued"])
    quick.stop()


def test_it_stops_quickly(dispatcher: Dispatcher) -> None:
    dispatcher.start()
    start = time.monotonic()
    dispatcher.stop()
    assert not dispatcher.is_alive()
    assert time.monotonic() - start < 5


def test_trouble_with_the_database_is_logged_once_and_outlived(
    dispatcher: Dispatcher, sessions: Sessions, caplog: pytest.LogCaptureFixture
) -> None:
    making.job(sessions, status="validating_files")
    with sessions.begin() as session:
        session.execute(text("ALTER TABLE jobs RENAME TO away"))
    with caplog.at_level(logging.WARNING, logger="store.dispatch"):
        for _ in range(3):
            dispatcher.tick()
        said = [r.getMessage() for r in caplog.records if "cannot admit jobs" in r.getMessage()]
        assert len(said) == 1
        with sessions.begin() as session:
            session.execute(text("ALTER TABLE away RENAME TO jobs"))
        dispatcher.tick()
    assert "can admit jobs again" in caplog.text
    assert "Traceback" not in caplog.text
    assert statuses(sessions) == ["queued"]


def test_a_database_that_is_away_is_outlived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = read_settings(home=tmp_path / "home")
    engine = make_engine(f"postgresql+psycopg://nobody@127.0.0.1:{services.free_port()}/none")
    lonely = Dispatcher(settings, engine, tick_seconds=0.1)
    lonely.start()
    time.sleep(0.7)
    assert lonely.is_alive()
    lonely.stop()
    assert len([r for r in caplog.records if "cannot admit jobs" in r.getMessage()]) == 1
    engine.dispose()


def test_a_wake_up_owed_is_sent_when_the_broker_is_back(
    home: Path, database_url: str, engine: Engine, sessions: Sessions, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "FIRST_BACK_OFF_SECONDS", 0.1)
    port = services.free_port()
    settings = read_settings(home=home, database_url=database_url, broker_url=f"redis://127.0.0.1:{port}/0")
    dispatcher = Dispatcher(settings, engine)
    making.job(sessions)
    dispatcher.tick()
    with services.redis_server(port):
        time.sleep(0.2)
        dispatcher.tick()
        assert waiting(settings) == 1
