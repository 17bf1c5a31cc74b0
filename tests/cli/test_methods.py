"""`olora methods` lists the methods and their options, on a pipe and on a terminal."""

from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from cli import methods
from olora_core.specs import ADAPTER_SPECS
from tests.cli.running import olora


def test_the_methods_are_a_line_each_on_a_pipe(tmp_path: Path) -> None:
    done = olora(tmp_path, "methods")
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == list(ADAPTER_SPECS)
    assert rows[0][1] == "arXiv 2406.01775"
    assert all(len(row) == 3 and row[2].endswith(".") for row in rows)


def test_a_methods_options_are_a_line_each_on_a_pipe(tmp_path: Path) -> None:
    rows = [line.split("\t") for line in olora(tmp_path, "methods", "lora").stdout.splitlines()]
    options = {name: (default, takes) for name, default, takes, _ in rows}
    assert options["rank"] == ("8", "integer, 1 to 4096")
    assert options["alpha"] == ("16", "number above 0 and at most 65536")
    assert options["dropout"] == ("0.0", "number at least 0 and below 1")
    assert options["rslora"] == ("false", "boolean")
    assert options["target_modules"] == ('"auto"', '"auto" or string or list')
    assert options["export_rank"] == ("null", "integer, 1 to 4096 or null")
    assert "method" not in options
    assert all(meaning.endswith(".") for *_, meaning in rows)


@pytest.mark.parametrize("method", ADAPTER_SPECS)
@pytest.mark.parametrize("width", [160, 60])
def test_a_terminal_shows_cost_use_and_every_option(
    monkeypatch: pytest.MonkeyPatch, method: str, width: int
) -> None:
    screen = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    monkeypatch.setattr(methods, "Console", lambda: screen)
    methods.methods(method)
    shown = screen.file.getvalue()  # type: ignore[attr-defined]
    spec = ADAPTER_SPECS[method]
    words = set(shown.split())
    for sentence in (spec.summary, spec.paper, spec.cost, spec.choose):
        assert set((sentence or "").split()) <= words
    assert max(map(len, shown.splitlines())) <= width
    if width >= 100:
        assert spec.model_fields.keys() <= words | {"method"}


def test_an_unknown_method_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    done = olora(tmp_path, "methods", "olorra")
    assert done.returncode == 1
    assert "did you mean 'olora'" in done.stderr
    assert "Traceback" not in done.stderr
