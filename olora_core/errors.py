"""Expected errors, each with a message that the user can act on.

OloraError
├── SpecError          the request names something unknown or has an invalid value
├── DataError          a training or validation file cannot be used
├── ModelError         the base model cannot be loaded or adapted
├── CheckpointError    a checkpoint is missing, damaged or belongs to another run
├── TrainingError      the run itself went wrong (a loss that is not finite)
├── ProcessLost        another process of this run ended or hangs
└── CertificateError   the exported adapter does not give the trained model's logits
"""

from collections.abc import Sequence


class OloraError(Exception):
    """An expected error: `code` for programs, `message` for people, `param` for the field it is about."""

    code = "error"
    param: str | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param or type(self).param
        self.code = code or type(self).code


class SpecError(OloraError):
    """The request names something unknown or has an invalid value."""

    code = "invalid_request"


class DataError(OloraError):
    """A training or validation file cannot be used; the message names the line."""

    code = "invalid_training_file"


class ModelError(OloraError):
    """The base model cannot be loaded or adapted."""

    code = "model_not_available"
    param = "model"


class CheckpointError(OloraError):
    """A checkpoint is missing, damaged or belongs to another run."""

    code = "invalid_checkpoint"


class TrainingError(OloraError):
    """The run itself went wrong."""

    code = "training_failed"


class ProcessLost(OloraError):
    """Another process of this run ended or hangs; another attempt may succeed."""

    code = "process_lost"


class CertificateError(OloraError):
    """The exported adapter does not give the trained model's logits."""

    code = "certificate_failed"


def shortened(names: Sequence[str], most: int = 4) -> str:
    """The first names of a list and the number of the others: `a, b and 7 more`."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
