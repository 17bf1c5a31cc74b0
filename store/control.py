"""What a job's owner may ask for while it has not ended."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from olora_core.progress import Note

from .endings import end_cancelled
from .errors import JobStateError
from .events import add_notes
from .kinds import KINDS
from .models import Job
from .statuses import WAITING


def cancel(session: Session, job: Job) -> Job:
    """Ends a waiting job, asks a running one to stop; a cancelled one stays as it is.

    Raises JobStateError if the job has succeeded or failed.
    """
    current = session.scalar(
        select(Job).where(Job.id == job.id).with_for_update().execution_options(populate_existing=True)
    )
    assert current is not None
    if current.status in WAITING:
        end_cancelled(session, current)
    elif current.status == "running":
        if current.stop_request != "cancel":
            current.stop_request = "cancel"
            add_notes(
                session,
                current.id,
                Note(
                    "info",
                    f"Cancellation requested; the {KINDS[current.kind].word} stops at its next step",
                ),
            )
    elif current.status != "cancelled":
        name = KINDS[current.kind].word.capitalize()
        raise JobStateError(f"{name} {current.id} cannot be cancelled: it has already {current.status}.")
    session.flush()
    return current
