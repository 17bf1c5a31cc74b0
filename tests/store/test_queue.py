"""The queue loses no wake-up while it works, and does no harm while it is down."""

import json
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kombu.entity import Queue
from kombu.exceptions import ChannelError

from store.queue import QUEUE, TASK, celery_app, remove_leftovers, wake
from store.settings import Settings, read_settings
from tests import services

PUBLISHERS, MESSAGES, CONSUMERS = 3, 200, 3


@pytest.fixture(params=["folder", "redis"])
def settings(request: pytest.FixtureRequest, tmp_path: Path) -> Settings:
    """Settings with each kind of queue in turn."""
    if request.param == "folder":
        return read_settings(home=tmp_path / "home")
    return read_settings(home=tmp_path / "home", broker_url=request.getfixturevalue("redis_url"))


def waiting(settings: Settings) -> int:
    with celery_app(settings).connection_for_read() as connection:
        return int(Queue(QUEUE)(connection.default_channel).queue_declare().message_count)


def take(settings: Settings, count: int) -> list[Any]:
    """The next messages, as (headers, body)."""
    taken: list[Any] = []
    with celery_app(settings).connection_for_read() as connection:

        def receive(body: Any, message: Any) -> None:
            taken.append((message.headers, body, message.content_type))
            message.ack()

        with connection.Consumer([Queue(QUEUE)], callbacks=[receive], accept=["json"]):
            while len(taken) < count:
                connection.drain_events(timeout=5)
    return taken


# --- wake-ups ------------------------------------------------------------------------------------------


def test_a_wake_up_is_the_task_without_arguments(settings: Settings) -> None:
    assert wake(celery_app(settings))
    ((headers, body, content_type),) = take(settings, 1)
    assert headers["task"] == TASK
    assert (body[0], body[1]) == ([], {})
    assert content_type == "application/json"


def test_no_more_wake_ups_wait_than_are_wanted(settings: Settings) -> None:
    app = celery_app(settings)
    assert waiting(settings) == 0
    for count, there in ((1, 1), (1, 1), (3, 3), (2, 3)):
        assert wake(app, count)
        assert waiting(settings) == there
    take(settings, 3)
    wake(app)
    assert waiting(settings) == 1


def test_the_configuration_is_the_one_that_survives_long_jobs(settings: Settings) -> None:
    conf = celery_app(settings).conf
    assert conf.task_acks_late is False
    assert conf.task_ignore_result is True
    assert conf.result_backend is None
    assert conf.worker_prefetch_multiplier == 1
    assert conf.worker_disable_prefetch is (settings.queue_folder is None)
    assert conf.accept_content == ["json"]
    assert conf.task_serializer == "json"
    assert conf.broker_connection_retry_on_startup is True
    assert conf.broker_connection_max_retries is None
    assert conf.worker_send_task_events is False


def within(seconds: float, call: Callable[[], bool]) -> bool:
    start = time.monotonic()
    answer = call()
    assert time.monotonic() - start < seconds
    return answer


def test_a_broker_that_is_away_is_said_and_waited_for_briefly(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://127.0.0.1:{services.free_port()}/0"
    app = celery_app(read_settings(home=tmp_path, broker_url=url))
    assert within(10, lambda: wake(app)) is False
    assert "jobs wait" in caplog.text
    assert "Traceback" not in caplog.text


def test_a_broker_that_never_answers_is_waited_for_briefly(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
        app = celery_app(read_settings(home=tmp_path, broker_url=url))
        assert within(20, lambda: wake(app)) is False


def test_a_redis_that_comes_back_is_used_again(tmp_path: Path) -> None:
    port = services.free_port()
    settings = read_settings(home=tmp_path, broker_url=f"redis://127.0.0.1:{port}/0")
    app = celery_app(settings)
    with services.redis_server(port):
        assert wake(app)
    assert wake(app) is False
    with services.redis_server(port):
        assert wake(app)
        assert waiting(settings) == 1


def test_a_password_in_the_brokers_url_is_not_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    url = f"redis://:hidden@127.0.0.1:{services.free_port()}/0"
    wake(celery_app(read_settings(home=tmp_path, broker_url=url)))
    assert caplog.text
    assert "hidden" not in caplog.text


# --- many at once --------------------------------------------------------------------------------------


def _publish(settings: Settings, publisher: int) -> None:
    app = celery_app(settings)
    with app.connection_for_write() as connection:
        for number in range(MESSAGES):
            app.send_task(TASK, args=[f"{publisher}-{number}"], queue=QUEUE, connection=connection)


def _consume(settings: Settings, results: Any, stop: Any) -> None:
    """Reads like a worker, with a consumer on a connection, until it must stop and no message is left."""
    taken: list[str] = []

    def receive(body: Any, message: Any) -> None:
        taken.append(body[0][0])
        message.ack()

    with celery_app(settings).connection_for_read() as connection:
        with connection.Consumer([Queue(QUEUE)], callbacks=[receive], accept=["json"]):
            while True:
                stopping = stop.is_set()
                try:
                    connection.drain_events(timeout=0.5)
                except TimeoutError:
                    if stopping:
                        break
    results.put(taken)


def test_many_publishers_and_consumers_lose_and_double_nothing(settings: Settings) -> None:
    context = services.process_context()
    results, stop = context.Queue(), context.Event()
    consumers = [context.Process(target=_consume, args=(settings, results, stop)) for _ in range(CONSUMERS)]
    publishers = [context.Process(target=_publish, args=(settings, n)) for n in range(PUBLISHERS)]
    for process in [*consumers, *publishers]:
        process.start()
    for process in publishers:
        process.join(60)
    stop.set()
    taken = [message for _ in consumers for message in results.get(timeout=60)]
    for process in consumers:
        process.join(30)
    assert [process.exitcode for process in [*publishers, *consumers]] == [0] * (PUBLISHERS + CONSUMERS)
    sent = {f"{publisher}-{number}" for publisher in range(PUBLISHERS) for number in range(MESSAGES)}
    assert set(taken) == sent
    assert Counter(taken).most_common(1)[0][1] == 1


# --- the folder ----------------------------------------------------------------------------------------


@pytest.fixture
def folder_settings(tmp_path: Path) -> Settings:
    return read_settings(home=tmp_path / "home")


def test_messages_leave_the_folder_in_the_order_of_sending(folder_settings: Settings) -> None:
    app = celery_app(folder_settings)
    with app.connection_for_write() as connection:
        for number in range(20):
            app.send_task(TASK, args=[number], queue=QUEUE, connection=connection)
    assert [body[0][0] for _, body, _ in take(folder_settings, 20)] == list(range(20))
    assert folder_settings.queue_folder
    assert os.listdir(folder_settings.queue_folder / "messages") == []


def test_half_a_message_is_not_seen(folder_settings: Settings) -> None:
    """What a publisher that was killed leaves behind."""
    app = celery_app(folder_settings)
    assert folder_settings.queue_folder
    (folder_settings.queue_folder / "messages" / ".abc.part").write_text('{"body": ')
    assert waiting(folder_settings) == 0
    wake(app)
    assert len(take(folder_settings, 1)) == 1


def test_what_nobody_reads_any_more_is_removed(folder_settings: Settings) -> None:
    wake(celery_app(folder_settings))
    assert folder_settings.queue_folder
    folder = folder_settings.queue_folder / "messages"
    for name in (".abc.part", ".abc.taken", "1_a.reply.celery.pidbox.msg"):
        (folder / name).write_text("{")
        os.utime(folder / name, (0, 0))
    assert remove_leftovers(folder_settings) == 3
    assert waiting(folder_settings) == 1


def test_the_queue_folder_is_its_owners_alone(folder_settings: Settings) -> None:
    celery_app(folder_settings)
    assert folder_settings.queue_folder
    for name in (".", "messages", "control"):
        assert (folder_settings.queue_folder / name).stat().st_mode & 0o077 == 0


def test_a_table_of_queues_is_changed_by_many_at_once(folder_settings: Settings) -> None:
    app = celery_app(folder_settings)
    errors: list[BaseException] = []

    def bind(number: int) -> None:
        try:
            with app.connection_for_write() as connection:
                channel = connection.default_channel
                for round_number in range(10):
                    channel._queue_bind("fan", "", "", f"q{number}-{round_number}")
                    channel.get_table("fan")
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=bind, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert errors == []
    with app.connection_for_write() as connection:
        channel = connection.default_channel
        bound = {row.queue for row in channel.get_table("fan")}
        assert bound == {f"q{n}-{r}" for n in range(6) for r in range(10)}
        channel._delete("q0-0", "fan", "", "")
        assert "q0-0" not in {row.queue for row in channel.get_table("fan")}
        with pytest.raises(ChannelError):
            channel.get_table("../outside")


def test_two_folders_are_two_queues(tmp_path: Path) -> None:
    first, second = (read_settings(home=tmp_path / name) for name in ("a", "b"))
    for settings in (first, second):
        wake(celery_app(settings))
    take(first, 1)
    assert (waiting(first), waiting(second)) == (0, 1)


def test_a_message_is_plain_json(folder_settings: Settings) -> None:
    wake(celery_app(folder_settings))
    assert folder_settings.queue_folder
    (path,) = (folder_settings.queue_folder / "messages").iterdir()
    assert json.loads(path.read_text())["content-type"] == "application/json"
