"""Training-file formats: what a line may hold, and every error of a file with its line, place and remedy.

One pass over the bytes, in constant memory, without torch. What only the model's tokenizer and template can
tell (rows that are too long, rows without a trained token) is told by `data.py`.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

from pydantic import BaseModel, ConfigDict

from .errors import DataError, OloraError
from .specs import nearest

Format = Literal["chat", "completion", "preference", "text"]
Severity = Literal["error", "warning", "note"]
TRAINABLE: dict[str, tuple[Format, ...]] = {
    "supervised": ("chat", "completion"),
    "dpo": ("preference",),
}
"""What each method.type trains on."""
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
KEPT_PROBLEMS = 50
MAX_LINE_BYTES = 16 * 2**20
CHUNK_BYTES = 2**18
NOT_JSONL = "Expected file to have JSONL format, where every line is a JSON dictionary."


class Problem(BaseModel):
    """One finding. `message` says what and where, `fix` what to do about it."""

    model_config = ConfigDict(frozen=True)

    line: int | None
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
    rows: int = 0
    errors: list[Problem] = []
    error_count: int = 0
    warnings: list[Problem] = []
    warning_count: int = 0
    notes: list[Problem] = []
    note_count: int = 0
    fatal: Problem | None = None
    """Set when the file is not JSONL in UTF-8 at all, or empty: such an upload is refused."""


class Add(Protocol):
    """Adds a finding about the line at hand."""

    def __call__(
        self, path: str, code: str, message: str, fix: str, severity: Severity = "error", /
    ) -> None: ...


def validate(stream: Iterable[bytes] | BinaryIO) -> Report:
    """Reads a whole file, given as chunks of any size or as an open file, and reports on it."""
    findings = _Findings()
    try:
        for line in _lines(_chunks(stream), findings):
            findings.report.rows += 1
            _check_line(line, findings)
    except _NotText as problem:
        findings.add(problem.args[0], fatal=True)
    report = findings.report
    if report.rows == 0 and report.fatal is None:
        findings.add(
            Problem(
                line=None,
                path=None,
                code="empty_file",
                message="The file is empty: it holds no line with an example.",
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
) -> OloraError | None:
    """The error that makes a job of this method.type with this file fail, or None.

    Names the line and the remedy.
    """
    code, param = f"invalid_{role}_file", f"{role}_file"
    first = report.fatal or (report.errors[0] if report.errors else None)
    if first is not None:
        more = report.error_count - 1
        rest = f" (and {more} more error{'s' if more > 1 else ''})" if more > 0 else ""
        return DataError(f"{first.sentence}{rest}", code=code, param=param)
    if report.format not in TRAINABLE[type]:
        return DataError(
            f"The {role} file holds {report.format or 'unknown'} data, which method {type} does not "
            f"train on. {_other_way(report.format, type)}",
            code="unexpected_file_format",
            param=param,
        )
    if training_format is not None and report.format != training_format:
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


def _other_way(found: Format | None, type: str) -> str:
    """What to do about a format that the method does not train on."""
    lines = {
        "supervised": '{"messages": […]} or of {"prompt": …, "completion": …}',
        "dpo": '{"input": {"messages": […]}, "preferred_output": […], "non_preferred_output": […]} or of '
        '{"prompt": …, "chosen": …, "rejected": …}',
    }
    fitting = [other for other, formats in TRAINABLE.items() if found in formats]
    method = f'Train it with method.type "{fitting[0]}", or use' if fitting else "Use"
    return f"{method} lines of {lines[type]}."


def read_records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, record) of each line that is not blank.

    Raises DataError at the first line that is not a JSON object.
    """
    findings = _Findings()
    with path.open("rb") as file:
        try:
            for line in _lines(_chunks(file), findings):
                record = _parse(line, findings)
                if record is None:
                    break
                yield line.number, record
        except _NotText as problem:
            findings.add(problem.args[0], fatal=True)
    if findings.report.fatal is not None:
        raise DataError(f"{path.name}: {findings.report.fatal.sentence}")


# --- lines ---------------------------------------------------------------------------------------------


class _NotText(Exception):
    """The bytes are some other kind of file; carries the Problem."""


@dataclass(frozen=True)
class _Line:
    number: int
    data: bytes
    """Without its end; only the beginning when `too_long`."""
    too_long: bool = False


@dataclass
class _Findings:
    report: Report = field(default_factory=Report)
    noted: set[str] = field(default_factory=set)

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
        place = f"Line {line}, {path}" if path != "$" else f"Line {line}"
        self.add(
            Problem(
                line=line, path=path, code=code, message=f"{place}: {message}", fix=fix, severity=severity
            )
        )


def _chunks(stream: Iterable[bytes] | BinaryIO) -> Iterator[bytes]:
    """Bytes in pieces; the first has at least four bytes when the file has."""
    pieces = _read_chunks(cast(BinaryIO, stream)) if hasattr(stream, "read") else iter(stream)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= 4:
            break
    if head:
        yield head
    yield from pieces


def _read_chunks(file: BinaryIO) -> Iterator[bytes]:
    while chunk := file.read(CHUNK_BYTES):
        yield chunk


def _lines(chunks: Iterator[bytes], findings: _Findings) -> Iterator[_Line]:
    """Lines that are not blank, ends stripped; never holds more than MAX_LINE_BYTES and a chunk."""
    number, cut, buffer, begun = 1, False, bytearray(), False
    for chunk in chunks:
        if not begun:
            chunk, begun = _without_mark(chunk, findings), True
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            buffer += chunk[start:end]
            yield from _line(number, buffer, cut, findings)
            number, cut, start = number + 1, False, end + 1
            buffer.clear()
        buffer += chunk[start:]
        if len(buffer) > MAX_LINE_BYTES:
            cut = True
            del buffer[200:]
    yield from _line(number, buffer, cut, findings)


def _line(number: int, buffer: bytearray, cut: bool, findings: _Findings) -> Iterator[_Line]:
    if not cut and len(buffer) <= MAX_LINE_BYTES:
        data = bytes(buffer)
        if data.endswith(b"\r"):
            findings.note_once(number, "crlf", "Lines end in CR LF; read as plain line ends.")
        data = data.strip()
        if data:
            yield _Line(number, data)
        elif buffer:
            findings.note_once(number, "blank_line", f"Line {number} is blank; blank lines are left out.")
    else:
        yield _Line(number, bytes(buffer[:200]), too_long=True)


def _without_mark(head: bytes, findings: _Findings) -> bytes:
    """Strips a UTF-8 byte-order mark; raises _NotText for bytes that begin another kind of file."""
    if head.startswith(b"\xef\xbb\xbf"):
        findings.note_once(1, "byte_order_mark", "The file begins with a byte-order mark; left out.")
        return head[3:]
    for magic, kind, fix in (
        ((b"\xff\xfe", b"\xfe\xff"), "UTF-16 text", "Save the file as UTF-8."),
        ((b"\x1f\x8b",), "a gzip archive", "Unpack it first."),
        ((b"PK\x03\x04",), "a zip archive or a spreadsheet", "Upload the JSONL text itself."),
        ((b"PAR1",), "a parquet file", "Convert it to JSONL: one JSON object per line, in UTF-8."),
    ):
        if head.startswith(magic):
            message = f"{NOT_JSONL} The file is {kind}."
            raise _NotText(Problem(line=1, path=None, code="data_type", message=message, fix=fix))
    return head


# --- one line ------------------------------------------------------------------------------------------


def _check_line(line: _Line, findings: _Findings) -> None:
    record = _parse(line, findings)
    if record is None:
        return
    add: Add = partial(findings.on, line.number)
    found = detect_format(record)
    report = findings.report
    if found is None:
        _name_unknown_format(record, report.format, add)
        return
    if report.format is None:
        report.format = found
    elif found != report.format:
        add(
            "$",
            "unexpected_file_format",
            f"the line is in {found} format, but the file began in {report.format} format.",
            "Keep one format per file.",
        )
    if found == "chat":
        _check_chat(record, add)
    elif found == "completion":
        _check_completion(record, add)
    elif found == "preference":
        _check_preference(record, add)
    if _uses_role(record, "developer"):
        findings.note_once(line.number, "developer_role", "Role 'developer' is trained as 'system'.")


def _parse(line: _Line, findings: _Findings) -> dict[str, Any] | None:
    """The line's JSON object, or None after adding why it has none."""

    def refuse(message: str, fix: str) -> None:
        problem = Problem(line=line.number, path=None, code="data_type", message=message, fix=fix)
        findings.add(problem, fatal=True)

    if line.too_long:
        refuse(
            f"Line {line.number} is longer than {MAX_LINE_BYTES // 2**20} MB.",
            "Split the example; one line holds one conversation.",
        )
        return None
    try:
        text = line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        refuse(
            f"Line {line.number} is not UTF-8 (byte 0x{line.data[error.start]:02x} at position "
            f"{error.start + 1} of the line).",
            "Save the file as UTF-8.",
        )
        return None
    try:
        record = _DECODER.decode(text)
        if "\\ud" in text.lower():
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except _NotFinite as error:
        refuse(
            f"Line {line.number} holds {error}, which is not JSON.",
            "Write null or a finite number instead.",
        )
    except UnicodeEncodeError:
        refuse(
            f"Line {line.number} holds half of a surrogate pair (\\ud800 to \\udfff), which is no character.",
            "Write both halves, or the character itself.",
        )
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at position {error.pos + 1}"
        refuse(_not_a_dictionary(line.number, text), f"{_remedy(text)} The parser says: {reason}.")
    except (ValueError, RecursionError):
        refuse(
            f"Line {line.number} holds a number of too many digits or lists nested too deeply.",
            "Shorten the number or flatten the value.",
        )
    else:
        if isinstance(record, dict):
            return record
        refuse(_not_a_dictionary(line.number, text), _remedy(text))
    return None


def _not_a_dictionary(number: int, text: str) -> str:
    start = text[:40].replace('"', "'")
    return f'{NOT_JSONL} Line {number} is not a dictionary (HINT: line starts with: "{start}").'


def _remedy(text: str) -> str:
    if text.startswith("["):
        return "Write each element of the list as a line of its own, without brackets and commas between."
    if text in ("{", "[") or text.endswith((",", "{", ": [")):
        return "Write each object on one line; pretty-printed JSON is not JSONL."
    return "Write one complete JSON object per line."


class _NotFinite(ValueError):
    """NaN or an infinite number."""


def _refuse_constant(name: str) -> Any:
    raise _NotFinite(name)


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise _NotFinite(digits[:20])
    return number


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant, parse_float=_finite)


# --- formats -------------------------------------------------------------------------------------------

PREFERENCE_SPELLINGS = (
    ("preferred_output", "non_preferred_output"),
    ("preferred_completion", "non_preferred_completion"),
    ("chosen", "rejected"),
)
"""The better and the worse answer: OpenAI's guide, its older clients, TRL."""
PREFERENCE_KEYS = tuple(key for spelling in PREFERENCE_SPELLINGS for key in spelling)


def detect_format(record: Mapping[str, Any]) -> Format | None:
    """The format of one record by its keys, or None."""
    if any(key in record for key in PREFERENCE_KEYS):
        return "preference"
    if "messages" in record:
        return "chat"
    if "prompt" in record and "completion" in record:
        return "completion"
    if "text" in record:
        return "text"
    return None


def _name_unknown_format(record: dict[str, Any], expected: Format | None, add: Add) -> None:
    """Says what a line lacks that fits no format."""
    for key, name in (("conversations", "ShareGPT"), ("instruction", "Alpaca")):
        if key in record:
            add(
                "$",
                "unexpected_file_format",
                f"the line is in {name} format, which is not read.",
                'Convert it to {"messages": [{"role": "user", "content": …}, '
                '{"role": "assistant", "content": …}]}.',
            )
            return
    if "prompt" in record or "completion" in record or expected == "completion":
        missing = "completion" if "prompt" in record else "prompt"
        add(
            f"$.{missing}",
            "missing_key",
            f"'{missing}' is missing.",
            "Give each line a prompt and a completion.",
        )
        return
    for key in record:
        if hint := nearest(key, ("messages", "prompt", "completion")):
            add(
                "$",
                "missing_messages_list",
                f"'messages' is missing; '{key}' is unknown{hint}.",
                "Rename it.",
            )
            return
    add(
        "$",
        "missing_messages_list",
        "neither 'messages' nor 'prompt' with 'completion' is there.",
        'Give each line {"messages": […]} or {"prompt": …, "completion": …}.',
    )


CHAT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")
MESSAGE_KEYS = ("role", "content", "name", "weight", "tool_calls", "tool_call_id", "function_call")
RESPONSE_KEYS = ("refusal", "audio", "annotations")
"""Left over in messages copied from an API's answer; ignored while they are empty."""


def _check_chat(record: dict[str, Any], add: Add) -> None:
    _check_other_keys(record, CHAT_KEYS, add)
    _check_tools(record, add)
    messages = record["messages"]
    if not isinstance(messages, list) or not messages:
        add(
            "$.messages",
            "missing_messages_list",
            f"'messages' must be a list with at least one message, not {_named(messages)}.",
            'Write [{"role": "user", "content": …}, {"role": "assistant", "content": …}].',
        )
        return
    _check_messages(messages, "$.messages", add)
    _check_assistant(messages, "$.messages", add)


def _check_completion(record: dict[str, Any], add: Add) -> None:
    _check_other_keys(record, ("prompt", "completion", "tools"), add)
    _check_tools(record, add)
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            add(
                "$.completion",
                "missing_content",
                "the completion is empty, so there is nothing to learn.",
                "Write the answer, or leave the line out.",
            )
        return
    if not (isinstance(prompt, list) and isinstance(completion, list)):
        wrong = "completion" if isinstance(prompt, str | list) else "prompt"
        add(
            f"$.{wrong}",
            "data_type",
            f"prompt is {_named(prompt)} and completion is {_named(completion)}.",
            "Make both of them strings, or both lists of messages.",
        )
        return
    _check_messages(prompt, "$.prompt", add)
    _check_messages(completion, "$.completion", add, _call_ids(prompt))
    _check_assistant(completion, "$.completion", add)
    for i, message in enumerate(completion):
        if isinstance(message, dict) and message.get("role") in ("system", "developer", "user"):
            add(
                f"$.completion[{i}].role",
                "unrecognized_role",
                f"a completion holds no '{message['role']}' message.",
                "Move it to the prompt.",
            )


@dataclass(frozen=True)
class Preference:
    """One prompt with a better and a worse answer, whichever way they were spelled."""

    prompt: Any
    """A string, or a list of messages; the answers likewise."""
    chosen: Any
    rejected: Any
    tools: Any
    functions: Any


def read_preference(record: Mapping[str, Any]) -> Preference:
    """The pair of a record that passed its check."""
    better, worse = _preference_spelling(record)
    around = record["input"] if "input" in record else record
    prompt = around["messages"] if "input" in record else record["prompt"]
    return Preference(prompt, record[better], record[worse], around.get("tools"), around.get("functions"))


def _preference_spelling(record: Mapping[str, Any]) -> tuple[str, str]:
    return next(spelling for spelling in PREFERENCE_SPELLINGS if any(key in record for key in spelling))


INPUT_KEYS = ("messages", "tools", "parallel_tool_calls", "functions")


def _check_preference(record: dict[str, Any], add: Add) -> None:
    """Either spelling of the prompt goes with any spelling of the answers."""
    better, worse = _preference_spelling(record)
    missing = [key for key in (better, worse) if key not in record]
    if "input" not in record and "prompt" not in record:
        missing.insert(0, "prompt" if better == "chosen" else "input")
    for key in missing:
        add(
            f"$.{key}",
            "missing_key",
            f"'{key}' is missing.",
            f"Give each line a prompt, {better} and {worse}.",
        )
    if missing:
        return
    if "input" in record:
        _check_other_keys(record, ("input", better, worse), add)
        around, path = record["input"], "$.input.messages"
        if not isinstance(around, dict):
            add("$.input", "data_type", f"'input' is {_named(around)}.", 'Make it {"messages": […]}.')
            return
        _check_other_keys(around, INPUT_KEYS, add, "$.input")
        _check_tools(around, add, "$.input")
        prompt = around.get("messages")
    else:
        _check_other_keys(record, ("prompt", better, worse, "tools"), add)
        _check_tools(record, add)
        prompt, path = record["prompt"], "$.prompt"
    _check_pair(prompt, path, {f"$.{key}": record[key] for key in (better, worse)}, add)


def _check_pair(prompt: Any, path: str, answers: dict[str, Any], add: Add) -> None:
    """A prompt and its two answers by their paths: all of them strings, or all lists of messages."""
    sides, messages_only = list(answers.values()), path != "$.prompt"
    if not messages_only and all(isinstance(value, str) for value in (prompt, *sides)):
        for place, answer in answers.items():
            if not answer.strip():
                add(
                    place,
                    "empty_answer",
                    "the answer is empty, so the pair is left out.",
                    "Write it, or leave the line out.",
                    "warning",
                )
    elif all(isinstance(value, list) for value in (prompt, *sides)):
        if not prompt:
            add(
                path,
                "missing_messages_list",
                "the prompt holds no message.",
                'Write [{"role": "user", "content": …}].',
            )
        _check_messages(prompt, path, add)
        for place, answer in answers.items():
            _check_messages(answer, place, add, _call_ids(prompt))
            _check_assistant(answer, place, add)
            _check_answer_roles(answer, place, add)
    else:
        wish = list if messages_only or isinstance(prompt, list) else str
        everything = {path: prompt, **answers}
        place, value = next(((k, v) for k, v in everything.items() if not isinstance(v, wish)))
        add(
            place,
            "data_type",
            f"this is {_named(value)}, and the prompt and both answers are of one kind.",
            "Make all three lists of messages."
            if messages_only
            else "Make all three strings, or all three lists of messages.",
        )
        return
    if sides[0] == sides[1]:
        better, worse = (place.removeprefix("$.") for place in answers)
        add(
            "$",
            "equal_preference",
            f"{better} and {worse} are equal, so there is nothing to prefer.",
            "Give two different answers, or leave the line out.",
        )


def _check_answer_roles(messages: list[Any], path: str, add: Add) -> None:
    for i, message in enumerate(messages):
        if isinstance(message, dict) and message.get("role") in ("system", "developer", "user"):
            add(
                f"{path}[{i}].role",
                "unrecognized_role",
                f"an answer holds no '{message['role']}' message.",
                "Move it to the prompt.",
            )


def _check_other_keys(record: dict[str, Any], known: tuple[str, ...], add: Add, path: str = "$") -> None:
    for key in record:
        if key not in known:
            hint = nearest(key, known)
            add(
                f"{path}.{key}",
                "unrecognized_key",
                f"'{key}' is not part of the format{hint} and is ignored.",
                "",
                "warning",
            )


def _check_messages(messages: list[Any], path: str, add: Add, calls: Iterable[str] = ()) -> None:
    """Each message on its own, and each tool answer against the calls before it."""
    known_calls = set(calls)
    for i, message in enumerate(messages):
        place = f"{path}[{i}]"
        if not isinstance(message, dict):
            add(
                place,
                "data_type",
                f"a message is an object, not {_named(message)}.",
                "Give it role and content.",
            )
            continue
        _check_keys(message, place, add)
        role = message.get("role")
        if role is None:
            add(f"{place}.role", "message_missing_key", "the message has no role.", f"Use one of {_ROLES}.")
            continue
        if not isinstance(role, str) or role not in ROLES:
            hint = nearest(role, ROLES) if isinstance(role, str) else ""
            add(f"{place}.role", "unrecognized_role", f"{role!r} is no role{hint}.", f"Use one of {_ROLES}.")
            continue
        _check_content(message, role, place, add)
        _check_weight(message, role, place, add)
        _check_calls(message, role, place, add)
        known_calls.update(_call_ids([message]))
        _check_answer(message, role, place, known_calls, add)


_ROLES = ", ".join(ROLES)


def _check_keys(message: dict[str, Any], place: str, add: Add) -> None:
    for key, value in message.items():
        if key in MESSAGE_KEYS or (key in RESPONSE_KEYS and not value):
            continue
        add(
            f"{place}.{key}",
            "message_unrecognized_key",
            f"'{key}' is not a key of a message{nearest(key, MESSAGE_KEYS)}.",
            f"Known keys: {', '.join(MESSAGE_KEYS)}.",
        )
    name = message.get("name")
    if name is not None and not isinstance(name, str):
        add(f"{place}.name", "data_type", f"the name is {_named(name)}.", "Make it a string.")


def _check_content(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    content = message.get("content")
    path = f"{place}.content"
    if content is None:
        if role == "assistant" and (message.get("tool_calls") or message.get("function_call")):
            return
        code = "missing_content" if "content" in message else "message_missing_key"
        needs = " or tool_calls" if role == "assistant" else ""
        add(path, code, f"the {role} message has no content{needs}.", "Write its text.")
    elif isinstance(content, list):
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else None
            if kind != "text" or not isinstance(part.get("text"), str):
                add(
                    f"{path}[{i}]",
                    "unsupported_content",
                    f"only parts of type text are read, not {kind or _named(part)}.",
                    'Use {"type": "text", "text": …} or a plain string.',
                )
    elif not isinstance(content, str):
        add(path, "data_type", f"the content is {_named(content)}.", "Make it a string.")
    elif role == "assistant" and not content.strip() and not message.get("tool_calls"):
        add(path, "empty_answer", "the answer is empty.", "Write it, or leave the line out.", "warning")


def _check_weight(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    weight = message.get("weight")
    if weight is None:
        return
    path = f"{place}.weight"
    if role != "assistant":
        add(path, "invalid_weight", f"a {role} message has no weight.", "Keep weight for assistant messages.")
    elif isinstance(weight, bool) or weight not in (0, 1):
        add(path, "invalid_weight", f"the weight is {weight!r}.", "Use 0 (not trained) or 1 (trained).")


def _check_calls(message: dict[str, Any], role: str, place: str, add: Add) -> None:
    """Tool calls of an assistant: ids, names, and arguments that are JSON."""
    call = message.get("function_call")
    if call is not None:
        _check_function(call, f"{place}.function_call", add)
    calls = message.get("tool_calls")
    if calls is None:
        return
    path = f"{place}.tool_calls"
    if role != "assistant":
        add(path, "tool_call_mismatch", f"a {role} message makes no calls.", "Move them to the assistant.")
        return
    if not isinstance(calls, list):
        add(path, "data_type", f"tool_calls is {_named(calls)}.", "Make it a list.")
        return
    for i, item in enumerate(calls):
        if not isinstance(item, dict):
            add(
                f"{path}[{i}]",
                "data_type",
                f"a call is an object, not {_named(item)}.",
                "Give it a function.",
            )
            continue
        if not isinstance(item.get("id"), str):
            add(f"{path}[{i}].id", "tool_call_mismatch", "the call has no id.", "Give each call an id.")
        if (item.get("type") or "function") != "function":
            add(f"{path}[{i}].type", "data_type", f"type {item['type']!r} is unknown.", "Use 'function'.")
        _check_function(item.get("function"), f"{path}[{i}].function", add)


def _check_function(call: Any, path: str, add: Add) -> None:
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        add(path, "tool_call_mismatch", "the call names no function.", "Give it name and arguments.")
        return
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            arguments = None
    if not isinstance(arguments, dict):
        add(
            f"{path}.arguments",
            "tool_call_mismatch",
            f"the arguments of '{call['name']}' are not a JSON object.",
            'Write them as a string of JSON, such as "{}".',
        )


def _check_answer(message: dict[str, Any], role: str, place: str, calls: set[str], add: Add) -> None:
    """A tool's message must answer a call made before it."""
    if role == "function" and not message.get("name"):
        add(f"{place}.name", "message_missing_key", "the function message has no name.", "Name the function.")
    call_id = message.get("tool_call_id")
    path = f"{place}.tool_call_id"
    if role != "tool":
        if call_id is not None:
            add(path, "tool_call_mismatch", f"a {role} message answers no call.", "Leave tool_call_id out.")
    elif call_id is None:
        add(path, "tool_call_mismatch", "the tool message has no tool_call_id.", "Name the call it answers.")
    elif not isinstance(call_id, str) or call_id not in calls:
        add(
            path,
            "tool_call_mismatch",
            f"no earlier call has the id {call_id!r}.",
            "Use the id of an assistant's tool call before it.",
        )


def _check_assistant(messages: list[Any], path: str, add: Add) -> None:
    """Something must be there to learn from."""
    answers = [m for m in messages if isinstance(m, dict) and m.get("role") == "assistant"]
    if not answers:
        add(
            path,
            "example_missing_assistant_message",
            "the example has no assistant message, so there is nothing to learn.",
            "Add the answer as an assistant message.",
        )
    elif all(_is_zero(m.get("weight")) for m in answers):
        add(
            path,
            "example_missing_assistant_message",
            "every assistant message has weight 0, so there is nothing to learn.",
            "Give at least one of them weight 1, or leave the line out.",
        )


def _is_zero(weight: Any) -> bool:
    return weight == 0 and not isinstance(weight, bool)


def _check_tools(record: dict[str, Any], add: Add, path: str = "$") -> None:
    for key, name_of in (("tools", _tool_name), ("functions", _function_name)):
        tools = record.get(key)
        if tools is None:
            continue
        if not isinstance(tools, list):
            add(f"{path}.{key}", "data_type", f"'{key}' is {_named(tools)}.", "Make it a list.")
            continue
        for i, tool in enumerate(tools):
            if not isinstance(name_of(tool), str):
                add(
                    f"{path}.{key}[{i}]",
                    "data_type",
                    "the tool has no function with a name.",
                    'Write {"type": "function", "function": {"name": …, "parameters": {…}}}.',
                )


def _tool_name(tool: Any) -> Any:
    return _function_name(tool.get("function")) if isinstance(tool, dict) else None


def _function_name(function: Any) -> Any:
    return function.get("name") if isinstance(function, dict) else None


def _call_ids(messages: list[Any]) -> list[str]:
    calls = [m.get("tool_calls") for m in messages if isinstance(m, dict)]
    items = [item for group in calls if isinstance(group, list) for item in group]
    return [i["id"] for i in items if isinstance(i, dict) and isinstance(i.get("id"), str)]


def _uses_role(record: dict[str, Any], role: str) -> bool:
    around = record.get("input")
    asked = around.get("messages") if isinstance(around, dict) else None
    lists = (record.get("messages"), record.get("prompt"), asked)
    messages = [m for group in lists if isinstance(group, list) for m in group]
    return any(isinstance(m, dict) and m.get("role") == role for m in messages)


def _named(value: Any) -> str:
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


def plain_text(content: Any) -> str:
    """The text of a message's content: a string, a list of text parts, or null."""
    if isinstance(content, list):
        return "".join(part["text"] for part in content)
    return content or ""
