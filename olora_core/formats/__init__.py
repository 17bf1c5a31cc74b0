"""Training-file formats: what a record may hold, and a file's errors with their place and remedy.

One pass over the bytes, in constant memory, without torch. Checks that need the model's tokenizer and
template (rows that are too long, rows without trained tokens) are in `data/tokenising.py`.
"""

from .columns import check_columns
from .containers import container_of
from .control_tokens import texts_in
from .detection import canonical, detect_format
from .messages import REASONING, plain_text
from .preference import Preference, read_preference
from .report import NOUNS, Container, Format, Problem, Report
from .rows import MAX_ROW_BYTES
from .validation import check_for_training, checking, read_records, validate

__all__ = [
    "MAX_ROW_BYTES",
    "NOUNS",
    "REASONING",
    "Container",
    "Format",
    "Preference",
    "Problem",
    "Report",
    "canonical",
    "check_columns",
    "check_for_training",
    "checking",
    "container_of",
    "detect_format",
    "plain_text",
    "read_preference",
    "read_records",
    "texts_in",
    "validate",
]
