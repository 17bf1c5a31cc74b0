"""What can go wrong in the store, in words a user can act on.

StoreError              an OloraError of the core
├── SettingsError        an OLORA_ variable does not fit
├── SchemaBehind         the database was made by an older version
├── NotFound             no such file, job, checkpoint or model in this project
├── UnknownCursor        `after` names nothing that the list holds
├── FileInUse            the file belongs to a job that has not ended, or to a model
├── FileUnusable         the file cannot be used for this
├── BadIntegration       an integration is none, or not one that this service is set up for
├── JobStateError        the job's status does not allow this
├── LeaseLost            the row belongs to another attempt: write nothing, stop
├── RequestMismatch      the same Idempotency-Key with another body
├── RequestPending       the first try of this request has not answered yet
└── StorageError         stored bytes cannot be written or read
    ├── StorageFull      no space is left
    ├── TooLarge         more bytes than allowed
    └── StorageDamaged   stored bytes are not those of their manifest
"""

from olora_core.errors import OloraError


class StoreError(OloraError):
    """An expected error of the store."""


class SettingsError(StoreError):
    """An OLORA_ variable does not fit."""

    code = "invalid_settings"


class SchemaBehind(StoreError):
    """The database was made by an older version of the service."""

    code = "schema_behind"


class NotFound(StoreError):
    """No such thing in this project."""

    code = "not_found"


class UnknownCursor(StoreError):
    """`after` names nothing that the list holds. `param` is how the caller gave it."""

    code = "invalid_cursor"

    def __init__(self, after: str, param: str = "after") -> None:
        super().__init__(
            f"{param} = {after!r} names nothing in this list; use the id of the last item you got.",
            param=param,
        )


class FileInUse(StoreError):
    """The file belongs to a job that has not ended, or to a model."""

    code = "file_in_use"


class FileUnusable(StoreError):
    """The file cannot be used for this."""

    code = "invalid_training_file"


class BadIntegration(StoreError):
    """An integration is none, or not one that this service is set up for."""

    code = "invalid_integration"


class JobStateError(StoreError):
    """The job's status does not allow this."""

    code = "invalid_job_state"


class LeaseLost(StoreError):
    """The row belongs to another attempt, or to none: write nothing, stop."""

    code = "lease_lost"

    def __init__(self, job_id: str, attempt: int) -> None:
        super().__init__(f"Attempt {attempt} no longer holds job {job_id}; it writes nothing more.")


class RequestMismatch(StoreError):
    """The same Idempotency-Key with another body."""

    code = "idempotency_key_reused"


class RequestPending(StoreError):
    """The first try of this request has not answered yet."""

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
    """Stored bytes are not those that their manifest names."""

    code = "storage_damaged"
