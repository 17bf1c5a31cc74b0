"""Column mappings: which of a file's columns is which key of a format."""

from collections.abc import Mapping

from ..errors import SpecError
from ..specs import nearest
from .detection import FORMATS, KEYS, detect_format
from .report import listed
from .rows import Row, Unreadable


def check_columns(columns: Mapping[str, str] | None, place: str = "columns") -> None:
    """Raises SpecError, naming the place, unless each key is one of a format and each column named once."""
    keys: dict[str, str] = {}
    for key, column in (columns or {}).items():
        if key not in KEYS:
            raise SpecError(
                f"{place}: '{key}' is no key of a training file{nearest(key, KEYS)}; write the format's key "
                "first and the file's column second, such as prompt and question.",
                param=place,
            )
        if not column:
            raise SpecError(f"{place}: the column for '{key}' is empty; name one.", param=place)
        if column in keys:
            raise SpecError(
                f"{place}: column '{column}' is given for '{keys[column]}' and for '{key}'; give it once.",
                param=place,
            )
        keys[column] = key


class ColumnMap:
    """Gives a file's columns their keys; without a mapping, their own names.

    A column with the name of a key that another column is mapped to is left out; so is one that would make a
    row another format than the mapped keys do.
    """

    def __init__(self, columns: Mapping[str, str] | None = None, keep: str | None = None) -> None:
        """`columns` has the column of each key; `keep` is a column that is read although its format does not
        have it. Raises SpecError."""
        check_columns(columns)
        self.columns = dict(columns or {})
        self.keep = keep
        self._keys = {column: key for key, column in self.columns.items()}
        format = detect_format(self.columns)
        self._hidden = {*self.columns, *(KEYS.difference(FORMATS[format].keys) if format else ())}
        self._missing = dict(self._keys)
        self._found: dict[str, None] = {}

    def key(self, name: str) -> str | None:
        """The key of a column; None if it is left out."""
        if len(self._found) < 100:
            self._found[name] = None
        if name in self._keys:
            self._missing.pop(name, None)
            return self._keys[name]
        return None if name in self._hidden and name != self.keep else name

    def row(self, row: Row) -> Row:
        """The row with its record under the mapped keys."""
        if row.record is None or not self.columns:
            return row
        keys = {name: self.key(name) for name in row.record}
        return Row(row.number, {key: row.record[name] for name, key in keys.items() if key is not None})

    def shown(self, name: str) -> str:
        """A column in a sentence."""
        key = self._keys.get(name, name)
        return name if key == name else f"{name} as {key}"

    def require_all(self) -> None:
        """Raises Unreadable for a mapped column that has not been seen."""
        for column, key in self._missing.items() if self._found else ():
            raise Unreadable(
                f"The file has no column '{column}', which is mapped to '{key}'; found columns "
                f"{listed(list(self._found))}.",
                "Correct the mapping: the format's key comes first, then the file's column.",
            )
