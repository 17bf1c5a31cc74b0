"""Training-file formats: what a record may hold, and every error of a file with its place and remedy.

One pass over the bytes, in constant memory, without torch. What only the model's tokenizer and template can
tell (rows that are too long, rows without a trained token) is told by `examples.py`.
"""

from .detection import detect_format
from .messages import plain_text
from .preference import Preference, read_preference
from .report import Format, Problem, Report
from .rows import MAX_ROW_BYTES
from .validation import check_for_training, read_records, validate

__all__ = [
    "MAX_ROW_BYTES",
    "Format",
    "Preference",
    "Problem",
    "Report",
    "check_for_training",
    "detect_format",
    "plain_text",
    "read_preference",
    "read_records",
    "validate",
]
