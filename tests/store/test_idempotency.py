"""A retry gets what the first try created; two deliberate requests create two objects."""

import threading
import time
from typing import Any

import pytest
from sqlalchemy import func, select, update

from store import idempotency
from store.errors import RequestMismatch, RequestPending
from store.idempotency import Opened, close_request, content_digest, drop_request, open_request
from store.models import Request
from store.session import Sessions, db_now

ROUTE = "POST /v1/fine_tuning/jobs"


def opened(sessions: Sessions, body: str = "body", **values: Any) -> Opened:
    given: dict[str, Any] = {"key_id": "key-1", "route": ROUTE, "content": content_digest(body)}
    return open_request(sessions, **{"wait_seconds": 0.3, **given, **values})


def close(sessions: Sessions, request: Opened, object_id: str) -> None:
    with sessions.begin() as session:
        close_request(session, request, object_id)


def test_a_retry_gets_what_the_first_try_made(sessions: Sessions) -> None:
    close(sessions, opened(sessions), "ftjob-1")
    assert opened(sessions, retry_count=1).object_id == "ftjob-1"
    assert opened(sessions, retry_count=2).object_id == "ftjob-1"


def test_two_deliberate_calls_make_two(sessions: Sessions) -> None:
    close(sessions, opened(sessions), "ftjob-1")
    second = opened(sessions)
    assert second.object_id is None
    close(sessions, second, "ftjob-2")
    assert opened(sessions, retry_count=1).object_id == "ftjob-2"


def test_a_retry_of_a_try_that_never_arrived_makes_one(sessions: Sessions) -> None:
    assert opened(sessions, retry_count=1).object_id is None


@pytest.mark.parametrize("other", [{"body": "other"}, {"key_id": "key-2"}, {"route": "POST /v1/files"}])
def test_another_body_key_or_route_is_another_request(sessions: Sessions, other: dict[str, Any]) -> None:
    close(sessions, opened(sessions), "ftjob-1")
    assert opened(sessions, retry_count=1, **other).object_id is None


def test_the_same_idempotency_key_gets_the_stored_answer(sessions: Sessions) -> None:
    close(sessions, opened(sessions, idempotency_key="k"), "ftjob-1")
    assert opened(sessions, idempotency_key="k").object_id == "ftjob-1"
    assert opened(sessions, idempotency_key="other").object_id is None
    assert opened(sessions, idempotency_key="k", key_id="key-2").object_id is None


def test_an_idempotency_key_with_another_body_is_refused(sessions: Sessions) -> None:
    close(sessions, opened(sessions, idempotency_key="k"), "ftjob-1")
    with pytest.raises(RequestMismatch, match="new key"):
        opened(sessions, "other", idempotency_key="k")


@pytest.mark.parametrize("values", [{"retry_count": 1}, {"idempotency_key": "k"}])
def test_a_second_try_in_flight_waits_for_the_firsts_answer(
    sessions: Sessions, values: dict[str, Any]
) -> None:
    first = opened(sessions, idempotency_key=values.get("idempotency_key"))
    answers: list[str | None] = []
    second = threading.Thread(
        target=lambda: answers.append(opened(sessions, wait_seconds=20, **values).object_id)
    )
    second.start()
    time.sleep(0.2)
    assert answers == []
    close(sessions, first, "ftjob-1")
    second.join(20)
    assert answers == ["ftjob-1"]


def test_a_try_that_takes_too_long_is_said(sessions: Sessions) -> None:
    opened(sessions)
    with pytest.raises(RequestPending, match="try again"):
        opened(sessions, retry_count=1)


def test_a_refused_request_is_forgotten(sessions: Sessions) -> None:
    drop_request(sessions, opened(sessions, idempotency_key="k"))
    assert opened(sessions, "corrected", idempotency_key="k").object_id is None


def test_an_answered_request_is_not_forgotten(sessions: Sessions) -> None:
    first = opened(sessions, idempotency_key="k")
    close(sessions, first, "ftjob-1")
    drop_request(sessions, first)
    assert opened(sessions, idempotency_key="k").object_id == "ftjob-1"


def test_a_try_that_died_is_overtaken_and_can_commit_nothing(sessions: Sessions) -> None:
    dead = opened(sessions)
    retry = opened(sessions, retry_count=1, dead_seconds=0.05, wait_seconds=20)
    assert retry.object_id is None
    assert retry.turn == dead.turn + 1
    with pytest.raises(RequestPending, match="taken over"):
        close(sessions, dead, "ftjob-dead")
    close(sessions, retry, "ftjob-1")
    assert opened(sessions, retry_count=2).object_id == "ftjob-1"


@pytest.mark.parametrize("values", [{"retry_count": 1}, {"idempotency_key": "k"}])
def test_of_many_tries_at_once_one_makes_the_object(sessions: Sessions, values: dict[str, Any]) -> None:
    if "retry_count" in values:
        first = opened(sessions)
        threading.Timer(0.3, close, (sessions, first, "ftjob-1")).start()
    answers: list[str | None] = []
    barrier = threading.Barrier(8)

    def attempt(number: int) -> None:
        barrier.wait(20)
        mine = opened(sessions, wait_seconds=20, **values)
        if mine.object_id is None:
            time.sleep(0.1)
            close(sessions, mine, f"ftjob-{number}")
            answers.append(f"ftjob-{number}")
        else:
            answers.append(mine.object_id)

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 8
    assert len(set(answers)) == 1


def test_a_retry_is_recognised_for_more_than_half_an_hour_and_not_for_ever(sessions: Sessions) -> None:
    assert idempotency.RETRY_WINDOW_SECONDS >= 1800
    close(sessions, opened(sessions), "ftjob-1")

    def make_older(seconds: float) -> None:
        with sessions.begin() as session:
            session.execute(update(Request).values(created_at=db_now() - seconds))

    make_older(1900)
    assert opened(sessions, retry_count=1).object_id == "ftjob-1"
    make_older(idempotency.RETRY_WINDOW_SECONDS + 1)
    assert opened(sessions, retry_count=1).object_id is None


def test_old_requests_are_forgotten(sessions: Sessions) -> None:
    opened(sessions)
    with sessions.begin() as session:
        session.execute(update(Request).values(created_at=db_now() - idempotency.KEEP_SECONDS - 1))
    opened(sessions)
    with sessions.begin() as session:
        idempotency.forget_old_requests(session)
    with sessions() as session:
        assert session.scalar(select(func.count()).select_from(Request)) == 1


def test_the_borders_of_what_is_digested_count() -> None:
    assert content_digest("ab", "c") != content_digest("a", "bc")
    assert content_digest("a", b"b") == content_digest("a", "b")
