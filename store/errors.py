"""Errors of the store, with messages that a user can act on.

StoreError              an OloraError of the core
├── SettingsError        a setting has an invalid value
├── SchemaBehind         the database's schema is older than this version needs
├── NotFound             no such file, job, checkpoint or model in this project
├── UnknownCursor        `after` is not the id of an item of the list
├── FileInUse            an unfinished job or a model needs the file
├── FileUnusable         the file cannot be used for this purpose
├── BadIntegration       unknown integration type, or one this service is not configured for
├── JobStateError        the job's status does not allow this
├── LeaseLost            the row belongs to another attempt: stop without writing
├── RequestMismatch      the Idempotency-Key was used with another body
├── RequestPending       the first try of this request has not been answered yet
└── StorageError         stored bytes cannot be written or read
    ├── StorageFull      no space is left
    ├── TooLarge         more bytes than allowed
    └── StorageDamaged   stored bytes differ from their manifest
"""

from olora_core.errors import OloraError


class StoreError(OloraError):
    """An expected error of the store."""


class SettingsError(StoreError):
    """A setting has an invalid value."""

    code = "invalid_settings"


class SchemaBehind(StoreError):
    """The database's schema is older than this version needs."""

    code = "schema_behind"


class NotFound(StoreError):
    """No such thing in this project."""

    code = "not_found"


class UnknownCursor(StoreError):
    """`after` is not the id of an item of the list. `param` is where the caller gave it."""

    code = "invalid_cursor"

    def __init__(self, after: str, param: str = "after") -> None:
        super().__init__(
            f"{param} = {after!r} is not in this list; use the id of the last item you received.",
            param=param,
        )


class FileInUse(StoreError):
    """An unfinished job or a model needs the file."""

    code = "file_in_use"


class FileUnusable(StoreError):
    """The file cannot be used for this purpose."""

    code = "invalid_training_file"


class BadIntegration(StoreError):
    """Unknown integration type, or one this service is not configured for."""

    code = "invalid_integration"


class JobStateError(StoreError):
    """The job's status does not allow this."""

    code = "invalid_job_state"


class LeaseLost(StoreError):
    """The row belongs to another attempt, or to none: stop without writing."""

    code = "lease_lost"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds job {job_id} and stops.")


class RequestMismatch(StoreError):
    """The Idempotency-Key was used with another body."""

    code = "idempotency_key_reused"


class RequestPending(StoreError):
    """The first try of this request has not been answered yet."""

    code = "request_pending"


class StorageError(StoreError):
    """Stored bytes cannot be written or read."""

    code = "storage_error"


class StorageFull(StorageError):
    """No space is left where files are stored."""

    code = "storage_full"


class TooLarge(StorageError):
    """More bytes than allowed."""

    code = "file_too_large"


class StorageDamaged(StorageError):
    """Stored bytes differ from their manifest."""

    code = "storage_damaged"
