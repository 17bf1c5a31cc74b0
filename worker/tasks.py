"""The one task: a wake-up."""

from celery import Celery

from store.queue import TASK

from .supervisor.supervisor import Supervisor


def register(app: Celery, supervisor: Supervisor) -> None:
    """Registers the wake-up, which runs all waiting jobs. It may arrive late, twice or never."""

    @app.task(name=TASK)  # type: ignore[untyped-decorator]
    def run_next() -> None:
        supervisor.run_until_idle()
