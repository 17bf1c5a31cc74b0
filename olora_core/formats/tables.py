"""Tables (CSV and Parquet): columns named after the keys, and cells that may hold JSON."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from .columns import ColumnMap
from .detection import FORMATS, detect_format
from .json_text import BadValue, read_json
from .report import Findings, Problem

OPTIONAL = ("input", "system", "history", "tools", "functions", "parallel_tool_calls", "weight")
"""Columns whose empty cells mean that the key is missing."""
JSON_COLUMNS = {
    *("messages", "conversations", "tools", "functions", "history", "parallel_tool_calls", "weight"),
    *("preferred_output", "non_preferred_output", "preferred_completion", "non_preferred_completion"),
}
MESSAGE_COLUMNS = ("prompt", "completion", "chosen", "rejected")
"""Columns with text or a JSON list of messages."""


def columns_of(names: Sequence[str], mapping: ColumnMap, findings: Findings) -> list[str | None]:
    """The key of each column; None, after a warning, for a column that the format does not have.

    Raises Unreadable for a mapping of columns that the table does not have.
    """
    keys = [mapping.key(name) for name in names]
    mapping.require_all()
    format = detect_format(dict.fromkeys(key for key in keys if key is not None))
    known = (*FORMATS[format].keys, mapping.keep) if format else keys
    for name, key in zip(names, keys, strict=True):
        if key is None or key not in known:
            findings.add(
                Problem(
                    line=None,
                    path=None,
                    code="unrecognized_key",
                    message=f"Column '{name}' is left out by the mapping."
                    if key is None
                    else f"Column '{name}' is not part of the {format} format and is ignored.",
                    fix="",
                    severity="warning",
                )
            )
    columns = [key if key in known else None for key in keys]
    read = (name for name, key in zip(names, columns, strict=True) if key)
    findings.columns = [mapping.shown(name) for name in read]
    return columns


def record_of(cells: Mapping[str, Any], number: int, findings: Findings) -> dict[str, Any] | None:
    """The record of a row, its JSON cells parsed; None after adding an error."""
    record, broken = {}, False
    for name, cell in cells.items():
        if name in OPTIONAL and cell == "":
            continue
        try:
            record[name] = _value(name, cell, cells)
        except (BadValue, json.JSONDecodeError) as error:
            holds = f"holds {error.what}" if isinstance(error, BadValue) else f"is not JSON: {error.msg}"
            findings.on(
                number,
                f"$.{name}",
                "data_type",
                f"the cell {holds} (it begins with: {cell[:40]!r}).",
                "Write the list, object or number as JSON.",
            )
            broken = True
    return None if broken else record


def _value(name: str, cell: Any, cells: Mapping[str, Any]) -> Any:
    if not isinstance(cell, str):
        return cell
    is_json = (
        name in JSON_COLUMNS
        or (name == "input" and "instruction" not in cells)
        or (name in ("chosen", "rejected") and "conversations" in cells)
    )
    if is_json:
        return read_json(cell)
    if name in MESSAGE_COLUMNS and cell.lstrip()[:1] == "[":
        return _messages(cell)
    return cell


def _messages(cell: str) -> Any:
    """A list of messages if the text is one in JSON, otherwise the text."""
    try:
        value = read_json(cell)
    except ValueError:
        return cell
    is_one = isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value)
    return value if is_one else cell
