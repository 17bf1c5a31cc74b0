"""The one task: a wake-up."""

from celery import Celery

from store.queue import TASK

from .supervisor.supervisor import Supervisor


def register(app: Celery, supervisor: Supervisor) -> None:
    """Makes a wake-up run the jobs that wait. A second, a late or a lost one changes nothing."""

    @app.task(name=TASK)  # type: ignore[untyped-decorator]
    def run_next() -> None:
        supervisor.run_until_idle()
