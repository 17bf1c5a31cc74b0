"""What was found in a training file: each finding with its place and its remedy."""

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
"""What is counted in a file of each kind, from 1."""
Severity = Literal["error", "warning", "note"]
KEPT_PROBLEMS = 50


class Problem(BaseModel):
    """One finding. `message` says what and where, `fix` what to do about it."""

    model_config = ConfigDict(frozen=True)

    line: int | None
    """Or the number of the element or row, where a file is not made of lines; see NOUNS."""
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
    """What one file holds. The first 50 findings of each kind are kept, all of them are counted."""

    format: Format | None = None
    container: Container = "jsonl"
    rows: int = 0
    errors: list[Problem] = []
    error_count: int = 0
    warnings: list[Problem] = []
    warning_count: int = 0
    notes: list[Problem] = []
    note_count: int = 0
    fatal: Problem | None = None
    """Set when the file cannot be read to its end as rows, or is empty: such an upload is refused."""


class Add(Protocol):
    """Adds a finding about the line at hand."""

    def __call__(
        self, path: str, code: str, message: str, fix: str, severity: Severity = "error", /
    ) -> None: ...


@dataclass
class Findings:
    """A report in the making."""

    report: Report = field(default_factory=Report)
    noted: set[str] = field(default_factory=set)

    def place(self, line: int) -> str:
        """How a line, element or row is called in a sentence."""
        return f"{NOUNS[self.report.container].capitalize()} {line}"

    def add(self, problem: Problem, *, fatal: bool = False) -> None:
        """Counts a finding and keeps it if it is among the first of its kind."""
        kind = problem.severity
        kept: list[Problem] = getattr(self.report, f"{kind}s")
        if len(kept) < KEPT_PROBLEMS:
            kept.append(problem)
        setattr(self.report, f"{kind}_count", getattr(self.report, f"{kind}_count") + 1)
        if fatal and self.report.fatal is None:
            self.report.fatal = problem

    def note_once(self, line: int, code: str, message: str) -> None:
        """A tolerated peculiarity, told at its first place only."""
        if code not in self.noted:
            self.noted.add(code)
            self.add(Problem(line=line, path=None, code=code, message=message, fix="", severity="note"))

    def refuse(self, line: int, what: str, fix: str) -> None:
        """Adds why a row cannot be read at all; `what` goes on after its place."""
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
        """Adds a finding about one place of one line; the message is given the place."""
        place = f"{self.place(line)}, {path}" if path != "$" else self.place(line)
        self.add(
            Problem(
                line=line, path=path, code=code, message=f"{place}: {message}", fix=fix, severity=severity
            )
        )


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
