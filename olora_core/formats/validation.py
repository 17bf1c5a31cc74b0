"""Validation of a whole training file: its report, and whether a method can train on it."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

from ..errors import DataError, OloraError
from ..progress import result_of
from .containers import read_rows
from .control_tokens import check_control_tokens
from .detection import FORMATS, detect_format, name_unknown_format
from .duplicates import Seen, fingerprint
from .messages import uses_role
from .report import CONTROL_TOKEN, NOUNS, Add, Findings, Format, Problem, Report

ROWS_AT_ONCE = 1000
TRAINABLE: dict[str, tuple[Format, ...]] = {
    "supervised": ("chat", "completion", "text", "alpaca", "sharegpt"),
    "dpo": ("preference", "alpaca-preference", "sharegpt-preference"),
}
"""The formats that each method.type trains on."""
ALIKE: tuple[tuple[Format, ...], ...] = (
    ("chat", "alpaca", "sharegpt"),
    ("preference", "alpaca-preference", "sharegpt-preference"),
)
"""Formats that a training file and its validation file may mix: both are rendered by the chat template, so
that their losses can be compared. Completions and texts are not."""


def validate(stream: Iterable[bytes] | BinaryIO, columns: Mapping[str, str] | None = None) -> Report:
    """Reads a whole file, as chunks of any size or as an open file, and returns its report.

    `columns` has the file's column of each key that has another name there, such as
    {"prompt": "question", "completion": "answer"}. Raises SpecError for a mapping to unknown keys.
    """
    return result_of(checking(stream, columns))


def checking(
    stream: Iterable[bytes] | BinaryIO, columns: Mapping[str, str] | None = None
) -> Generator[int, None, Report]:
    """As `validate`, but yields the number of rows read, every ROWS_AT_ONCE."""
    findings, seen = Findings(), Seen()
    report = findings.report
    for row in read_rows(stream, findings, columns):
        report.rows += 1
        if row.record is not None:
            _check_record(row.number, row.record, findings)
            _check_is_new(row.number, row.record, seen, findings)
        if report.rows % ROWS_AT_ONCE == 0:
            yield report.rows
    findings.say_what_was_detected()
    if report.rows > seen.limit:
        message = f"Only the first {seen.limit} rows were checked for duplicates."
        findings.note_once(seen.limit, "duplicates_not_sought", message)
    if report.rows == 0 and report.fatal is None:
        findings.add(
            Problem(
                line=None,
                path=None,
                code="empty_file",
                message=f"The file is empty: it holds no {NOUNS[report.container]} with an example.",
                fix="Write one JSON object per line.",
            ),
            fatal=True,
        )
    return report


def check_for_training(
    report: Report,
    *,
    role: Literal["training", "validation"],
    minimum_rows: int,
    training_format: str | None = None,
    type: str = "supervised",
    literal: bool = False,
    is_mapped: bool = False,
) -> OloraError | None:
    """The error with which a job of this method.type fails on this file, or None.

    With `literal`, control tokens in messages are ordinary text. `is_mapped` says that the job reads the file
    by a mapping of its columns, and the report does not: then only the number of rows counts, and whether
    they can be read.
    """
    code, param = f"invalid_{role}_file", f"{role}_file"
    errors, count = report.errors, report.error_count
    if literal:
        errors = [problem for problem in errors if problem.code != CONTROL_TOKEN]
        count -= report.control_token_count
    first = report.fatal or (errors[0] if errors and not is_mapped else None)
    if first is not None:
        more = count - 1
        rest = f" (and {more} more error{'s' if more > 1 else ''})" if more > 0 else ""
        return DataError(f"{first.sentence}{rest}", code=code, param=param)
    if not is_mapped and report.format not in TRAINABLE[type]:
        return DataError(
            f"The {role} file holds {report.format or 'unknown'} data, which method {type} does not "
            f"train on. {_other_way(report.format, type)}",
            code="unexpected_file_format",
            param=param,
        )
    if not is_mapped and training_format is not None and not _are_alike(report.format, training_format):
        return DataError(
            f"The {role} file is in {report.format} format, but the training file is in {training_format} "
            "format. Give both the same format.",
            code=code,
            param=param,
        )
    if report.rows < minimum_rows:
        return DataError(
            f"{role.capitalize()} file has {report.rows} example(s), but must have at least "
            f"{minimum_rows} examples. Add {minimum_rows - report.rows} more.",
            code="invalid_n_examples",
            param=param,
        )
    return None


def _are_alike(one: str, other: str) -> bool:
    return one == other or any(one in formats and other in formats for formats in ALIKE)


def _other_way(found: Format | None, type: str) -> str:
    """The remedy for a format that the method does not train on."""
    lines = {
        "supervised": '{"messages": […]} or of {"prompt": …, "completion": …}',
        "dpo": '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]} or of '
        '{"prompt": …, "chosen": …, "rejected": …}',
    }
    fitting = [other for other, formats in TRAINABLE.items() if found in formats]
    method = f'Train it with method.type "{fitting[0]}", or use' if fitting else "Use"
    return f"{method} lines of {lines[type]}."


def read_records(
    path: Path, columns: Mapping[str, str] | None = None, *, keep: str | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number, record) of each row, numbered from 1 by line, element or row. `columns` as for `validate`.

    `keep` is a column of a table that is read although its format does not have it. Raises DataError at the
    first row without a record.
    """
    findings = Findings()
    with path.open("rb") as file:
        for row in read_rows(file, findings, columns, keep=keep):
            if row.record is None:
                break
            yield row.number, row.record
    for problem in findings.report.errors[:1]:
        raise DataError(f"{path.name}: {problem.sentence}")


def _check_record(number: int, record: dict[str, Any], findings: Findings) -> None:
    add: Add = partial(findings.on, number)
    found = detect_format(record)
    report = findings.report
    if found is None:
        name_unknown_format(record, report.format, add)
        return
    if report.format is None:
        report.format = found
    elif found != report.format:
        add(
            "$",
            "unexpected_file_format",
            f"the record is in {found} format, but the file began in {report.format} format.",
            "Keep one format per file.",
        )
    FORMATS[found].check(record, add)
    if not _is_raw(found, record):
        check_control_tokens(record, add)
    if uses_role(record, "developer"):
        findings.note_once(number, "developer_role", "Role 'developer' is trained as 'system'.")


def _is_raw(format: Format, record: dict[str, Any]) -> bool:
    """Whether the record is trained as it stands, without a chat template."""
    return format == "text" or (format == "completion" and isinstance(record.get("prompt"), str))


def _check_is_new(number: int, record: dict[str, Any], seen: Seen, findings: Findings) -> None:
    earlier = seen.earlier(fingerprint(record), number)
    if earlier is not None:
        noun = NOUNS[findings.report.container]
        findings.on(
            number,
            "$",
            "duplicate",
            f"the example is the same as in {noun} {earlier}, so it counts twice.",
            "Leave it out, unless you mean it.",
            "warning",
        )
