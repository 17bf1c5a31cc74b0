"""The text from which everything in this folder is made: the standard library of the running CPython.

Defines which modules are used, which of them are held out, and how a module is split into documents.
"""

import ast
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

LEFT_OUT = {
    "site-packages",  # not the standard library
    "dist-packages",
    "test",  # the test suites: more text than the library itself, in another style
    "tests",
    "idle_test",
    "encodings",  # mostly generated tables of code points
}
GENERATED = ("_sysconfigdata", "config-")  # generated when the interpreter is built; differ by machine
HELD_OUT_ONE_IN = 10
MADE_FROM = "033073e18ac8a767e033dcc588446d06fbe7d629d8903f13503e5e8f76cb735d"  # digest() of CPython 3.11.7


@dataclass(frozen=True)
class Module:
    name: str  # dotted, as it is imported
    source: str

    @property
    def held_out(self) -> bool:
        """Whether the module, by its name alone, is excluded from training."""
        return zlib.crc32(self.name.encode()) % HELD_OUT_ONE_IN == 0


@cache
def modules() -> tuple[Module, ...]:
    """All modules of the library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    read = (_read(root, path) for path in root.rglob("*.py"))
    return tuple(sorted((module for module in read if module), key=lambda module: module.name))


def _read(root: Path, path: Path) -> Module | None:
    parts = path.relative_to(root).with_suffix("").parts
    if LEFT_OUT.intersection(parts) or any(part.startswith(GENERATED) for part in parts):
        return None
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, path.read_text(encoding="utf-8"))


def documents(module: Module) -> Iterator[str]:
    """A module's text, split before its top-level functions and classes."""
    lines = module.source.split("\n")  # not splitlines(), which also cuts at form feeds
    cuts = [_first_line(node) for node in ast.parse(module.source).body if _is_definition(node)]
    for start, stop in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        text = "\n".join(lines[start:stop]).strip()
        if text:
            yield text


def _is_definition(node: ast.stmt) -> bool:
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _first_line(node: ast.stmt) -> int:
    """The line of a definition or its first decorator, counted from 0."""
    decorators = getattr(node, "decorator_list", [])
    return min([node.lineno, *(decorator.lineno for decorator in decorators)]) - 1


def digest() -> str:
    """SHA-256 of the text. The same digest gives the same files on any machine."""
    total = hashlib.sha256()
    for module in modules():
        total.update(f"{module.name}\0{module.source}\0".encode())
    return total.hexdigest()
