"""The file object."""

from typing import Any, Literal

from pydantic import BaseModel

from store.models import File

ADAPTER_PURPOSE = "fine-tune-adapter"
UPLOAD_PURPOSES = ("fine-tune", ADAPTER_PURPOSE, "assistants", "batch", "vision", "user_data", "evals")


class FileObject(BaseModel):
    """An uploaded or produced file. `olora.report` says how it was read and what its validation found,
    in a list only the counts.
    """

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None
    expires_at: int | None
    olora: dict[str, Any]

    @classmethod
    def of(cls, row: File, *, listed: bool = False) -> "FileObject":
        return cls(
            id=row.id,
            bytes=row.bytes,
            created_at=int(row.created_at),
            filename=row.filename,
            purpose=row.purpose,
            status=row.status,
            status_details=row.status_details,
            expires_at=None if row.expires_at is None else int(row.expires_at),
            olora={"sha256": row.sha256, "report": _counts(row.report) if listed else row.report},
        )


def _counts(report: dict[str, Any] | None) -> dict[str, Any] | None:
    shown = ("format", "rows", "error_count", "warning_count", "note_count")
    return None if report is None else {name: report[name] for name in shown}
