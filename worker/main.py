"""The Celery application of a worker: `celery -A worker.main worker`, as `worker_command` starts it."""

import logging
import sys
from typing import Any

from celery import signals

from store.errors import SchemaBehind
from store.queue import celery_app
from store.session import require_current_schema
from store.settings import get_settings

from .launch import follow_parent, visible_gpus
from .supervisor.supervisor import Supervisor
from .tasks import register

logger = logging.getLogger(__name__)

follow_parent()
settings = get_settings()
app = celery_app(settings)
supervisor = Supervisor(settings)
register(app, supervisor)


@signals.worker_init.connect  # type: ignore[untyped-decorator]
def _on_init(**_: Any) -> None:
    try:
        require_current_schema(supervisor.engine)
    except SchemaBehind as behind:
        sys.exit(behind.message)


@signals.celeryd_after_setup.connect  # type: ignore[untyped-decorator]
def _on_setup(**_: Any) -> None:
    supervisor.begin()
    logger.info("Worker %s trains on %s.", supervisor.owner, ", ".join(visible_gpus()) or "the CPU")


@signals.worker_shutting_down.connect  # type: ignore[untyped-decorator]
def _on_shutting_down(**_: Any) -> None:
    supervisor.stop()


@signals.worker_shutdown.connect  # type: ignore[untyped-decorator]
def _on_shutdown(**_: Any) -> None:
    supervisor.close()
