"""The report on a training file: each finding with its place and remedy."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict

Format = Literal[
    "chat",
    "completion",
    "text",
    "alpaca",
    "sharegpt",
    "preference",
    "alpaca-preference",
    "sharegpt-preference",
]
Container = Literal["jsonl", "json", "csv", "parquet"]
NOUNS: dict[Container, str] = {"jsonl": "line", "json": "element", "csv": "line", "parquet": "row"}
"""What rows are called in each kind of file."""
WORDS: dict[Container, str] = {"jsonl": "JSONL", "json": "a JSON array", "csv": "CSV", "parquet": "Parquet"}
COLUMNS_NAMED = 8
"""At most, in a sentence."""
MAP_COLUMNS = (
    "Or map your columns to these keys: --columns prompt=question,completion=answer on the command line, "
    "olora.columns in a request."
)
"""The remedy for keys of another name."""
Severity = Literal["error", "warning", "note"]
KEPT_PROBLEMS = 50
CONTROL_TOKEN = "control_token"
"""The code of an error about a control token in a message."""


class Problem(BaseModel):
    """One finding. `message` says what and where, `fix` is the remedy."""

    model_config = ConfigDict(frozen=True)

    line: int | None
    """From 1; the number of the element or row if the file does not consist of lines, see NOUNS."""
    path: str | None
    code: str
    message: str
    fix: str
    severity: Severity = "error"

    @property
    def sentence(self) -> str:
        """Message and remedy as one text."""
        return f"{self.message} {self.fix}".strip()


class Report(BaseModel):
    """The report on one file. All findings are counted, the first 50 of each severity are kept."""

    format: Format | None = None
    container: Container = "jsonl"
    detected: str = ""
    """How the file was read, in words: "read as CSV, columns prompt, completion". Empty in older reports."""
    rows: int = 0
    errors: list[Problem] = []
    error_count: int = 0
    control_token_count: int = 0
    """How many of the errors are control tokens in messages, which a job may take as ordinary text."""
    warnings: list[Problem] = []
    warning_count: int = 0
    notes: list[Problem] = []
    note_count: int = 0
    fatal: Problem | None = None
    """Set if the file is empty or cannot be read to its end; such an upload is refused."""


class Add(Protocol):
    """Adds a finding about the current row."""

    def __call__(
        self, path: str, code: str, message: str, fix: str, severity: Severity = "error", /
    ) -> None: ...


@dataclass
class Findings:
    """Collects findings in a report."""

    report: Report = field(default_factory=Report)
    noted: set[str] = field(default_factory=set)
    columns: list[str] = field(default_factory=list)
    """The columns of a table that are read."""

    def place(self, line: int) -> str:
        """The place of a row in a sentence, such as "Line 3"."""
        return f"{NOUNS[self.report.container].capitalize()} {line}"

    def add(self, problem: Problem, *, fatal: bool = False) -> None:
        """Counts a finding, and keeps it if it is among the first of its severity."""
        kind = problem.severity
        kept: list[Problem] = getattr(self.report, f"{kind}s")
        if len(kept) < KEPT_PROBLEMS:
            kept.append(problem)
        setattr(self.report, f"{kind}_count", getattr(self.report, f"{kind}_count") + 1)
        self.report.control_token_count += problem.code == CONTROL_TOKEN
        if fatal and self.report.fatal is None:
            self.report.fatal = problem

    def say_what_was_detected(self) -> None:
        """Sets the report's `detected`, once its container and columns are known."""
        columns = f", columns {listed(self.columns)}" if self.columns else ""
        self.report.detected = f"read as {WORDS[self.report.container]}{columns}"

    def note_once(self, line: int, code: str, message: str) -> None:
        """Adds a note, once per code, at its first place."""
        if code not in self.noted:
            self.noted.add(code)
            self.add(Problem(line=line, path=None, code=code, message=message, fix="", severity="note"))

    def refuse(self, line: int, what: str, fix: str) -> None:
        """Adds a fatal error about a row that cannot be read; `what` continues the sentence "Line 3 …"."""
        message = f"{self.place(line)} {what}"
        self.add(Problem(line=line, path=None, code="data_type", message=message, fix=fix), fatal=True)

    def on(
        self,
        line: int,
        path: str,
        code: str,
        message: str,
        fix: str,
        severity: Severity = "error",
        /,
    ) -> None:
        """Adds a finding about `path` in a row; its place is put before the message."""
        place = f"{self.place(line)}, {path}" if path != "$" else self.place(line)
        self.add(
            Problem(
                line=line, path=path, code=code, message=f"{place}: {message}", fix=fix, severity=severity
            )
        )


def listed(names: Sequence[str]) -> str:
    """The first names, separated by commas."""
    return ", ".join(names[:COLUMNS_NAMED]) + (", …" if len(names) > COLUMNS_NAMED else "")


def named(value: Any) -> str:
    """The JSON kind of a value, with its article."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
    }
    if isinstance(value, list | str) and not value:
        return "an empty list" if isinstance(value, list) else "an empty string"
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
