"""The queue: Celery, whose messages only wake workers, on Redis or on a folder without any server.

A lost or repeated message does no harm: the task `run_next` claims the best job, or none.
"""

import contextlib
import fcntl
import logging
import os
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from queue import Empty
from typing import Any

from celery import Celery
from kombu.entity import Queue
from kombu.transport import TRANSPORT_ALIASES, filesystem, virtual
from kombu.utils.json import dumps, loads

from .home import make_folder
from .settings import Settings

log = logging.getLogger(__name__)

TASK = "run_next"
QUEUE = "olora"
POLL_SECONDS = 0.05
PUBLISH_SECONDS = 3.0
TRANSPORT_ALIASES["folder"] = f"{__name__}:FolderTransport"

REDIS_OPTIONS = {"health_check_interval": 25, "socket_timeout": 30, "socket_connect_timeout": 5}
"""For workers: the timeout is longer than the wait for a message but still notices a dead socket."""
PUBLISH_OPTIONS = {
    "socket_timeout": PUBLISH_SECONDS,
    "socket_connect_timeout": PUBLISH_SECONDS,
    "max_retries": 0,
    "connect_retries_timeout": PUBLISH_SECONDS,
}


def celery_app(settings: Settings) -> Celery:
    """The Celery app of this service, for publishers and consumers."""
    app = Celery("olora", broker=_broker_url(settings))
    app.conf.update(
        task_acks_late=False,
        task_ignore_result=True,
        task_store_errors_even_if_ignored=False,
        task_publish_retry=False,
        task_serializer="json",
        accept_content=["json"],
        task_default_queue=QUEUE,
        task_queues=[Queue(QUEUE)],
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=settings.queue_folder is None,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=_transport_options(settings),
    )
    return app


def _broker_url(settings: Settings) -> str:
    return "folder://" if settings.queue_folder else settings.broker_url


def _transport_options(settings: Settings) -> dict[str, Any]:
    folder = settings.queue_folder
    if folder is None:
        return REDIS_OPTIONS
    messages, control = folder / "messages", folder / "control"
    for made in (messages, control):
        make_folder(made)
    return {
        "data_folder_in": str(messages),
        "data_folder_out": str(messages),
        "control_folder": str(control),
        "polling_interval": POLL_SECONDS,
    }


def wake(app: Celery, count: int = 1) -> bool:
    """Sends as many wake-ups as are missing for `count` to wait. Returns whether the broker was reached.

    Never raises and never blocks for long; an unreachable broker is logged.
    """
    try:
        options = {**app.conf.broker_transport_options, **PUBLISH_OPTIONS}
        with app.connection_for_write(
            connect_timeout=PUBLISH_SECONDS, transport_options=options
        ) as connection:
            waiting = Queue(QUEUE)(connection.default_channel).queue_declare().message_count
            for _ in range(count - waiting):
                app.send_task(TASK, queue=QUEUE, connection=connection, retry=False, ignore_result=True)
    except Exception as error:  # whatever a broker's client raises: the rows are still there
        log.warning("The queue cannot be reached, jobs wait: %s", error)
        return False
    return True


def remove_leftovers(settings: Settings, older_than_seconds: float = 86_400.0) -> int:
    """Removes old messages, which nobody will read any more, from the folder. Returns how many."""
    if settings.queue_folder is None:
        return 0
    oldest = time.time() - older_than_seconds
    removed = 0
    for path in (settings.queue_folder / "messages").iterdir():
        with contextlib.suppress(FileNotFoundError):  # a reader was faster
            if path.stat().st_mtime < oldest:
                path.unlink()
                removed += 1
    return removed


class FolderChannel(filesystem.Channel):
    """Messages as files. Each appears complete or not at all, and exactly one reader gets it.

    Kombu's own channel writes messages and its table of queues in place, and moves a message by copying it; a
    reader that finds half of one crashes.
    """

    def _put(self, queue: str, payload: Any, **kwargs: Any) -> None:  # type: ignore[override]
        folder = Path(self.data_folder_out)
        # The monotonic clock is the machine's: names sort in the order of sending.
        name = f"{time.monotonic_ns():020d}_{uuid.uuid4().hex}.{queue}.msg"
        _write_whole(folder / name, dumps(payload))

    def _get(self, queue: str, timeout: float | None = None) -> Any:
        folder = Path(self.data_folder_in)
        for name in sorted(os.listdir(folder)):
            if name.partition(".")[2] != f"{queue}.msg":
                continue
            taken = folder / f".{uuid.uuid4().hex}.taken"
            with contextlib.suppress(FileNotFoundError):  # another reader was faster
                os.rename(folder / name, taken)
                payload = taken.read_text()
                taken.unlink()
                return loads(payload)
        raise Empty

    def get_table(self, exchange: str) -> list[Any]:
        try:
            rows = loads(self._exchange_file(exchange).read_text())
        except FileNotFoundError:
            return []
        return [filesystem.exchange_queue_t(*row) for row in rows]

    def _queue_bind(self, exchange: str, routing_key: str, pattern: str, queue: str) -> None:
        row = filesystem.exchange_queue_t(routing_key or "", pattern or "", queue or "")
        with self._changing(exchange) as table:
            if row not in table:
                table.insert(0, row)

    def _delete(
        self, queue: str, exchange: str, routing_key: str, pattern: str, *args: Any, **kwargs: Any
    ) -> None:
        self._purge(queue)
        row = filesystem.exchange_queue_t(routing_key or "", pattern or "", queue or "")
        with self._changing(exchange) as table:
            if row in table:
                table.remove(row)

    @contextlib.contextmanager
    def _changing(self, exchange: str) -> Iterator[list[Any]]:
        """The table of an exchange, locked against changes by other processes."""
        with (self.control_folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            before = self.get_table(exchange)
            table = list(before)
            yield table
            if table != before:
                _write_whole(self._exchange_file(exchange), dumps(table))


class FolderTransport(filesystem.Transport):
    """`folder:///path`: kombu's transport on files, made safe for several readers and writers."""

    Channel = FolderChannel

    def __init__(self, client: Any, **kwargs: Any) -> None:
        super().__init__(client, **kwargs)  # type: ignore[no-untyped-call]
        self.state = virtual.BrokerState()  # bindings differ from folder to folder


def _write_whole(path: Path, text: str) -> None:
    aside = path.with_name(f".{uuid.uuid4().hex}.part")
    aside.write_text(text)
    os.rename(aside, path)
