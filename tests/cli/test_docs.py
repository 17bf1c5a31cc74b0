"""The documentation agrees with the code."""

import re
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import text as sql
from typer.main import get_command

from cli.main import app
from cli.train import read_run
from olora_core.specs import ADAPTER_SPECS, read_spec
from store.keys import find_key, first_key
from store.session import make_engine, migrate, sessions
from store.settings import Settings, read_settings, settings_table

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):.*## ", (ROOT / "Makefile").read_text(), re.MULTILINE))


def test_the_functions_on_the_architecture_page_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py): ([\w.]+)`", " ".join(text.split()))
    assert len(named) > 20
    files = [
        file for folder in ("api", "store", "worker", "olora_core") for file in (ROOT / folder).rglob("*.py")
    ]
    for path, name in named:
        sources = [file.read_text(encoding="utf-8") for file in files if str(file).endswith(f"/{path}")]
        last = name.rpartition(".")[2]
        assert any(
            re.search(rf"^ *(async )?(def|class) {last}\b", source, re.MULTILINE) for source in sources
        ), name


def test_the_table_of_settings_is_the_settings() -> None:
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text.partition("|---|---|---|\n")[2].partition("\n\n")[0]
    expected = [f"| `{name}` | {default} | {meaning} |" for name, default, meaning in settings_table()]
    assert table.splitlines() == expected
    assert len(expected) == len(Settings.model_fields)


def test_the_exported_ranks_on_the_page_of_methods_are_those_of_the_defaults() -> None:
    text = " ".join((ROOT / "docs" / "methods.md").read_text(encoding="utf-8").split())
    fit, _, wide = text.partition("Exports with the defaults: ")[2].partition(" fit; ")
    told = {
        name: (int(rank), fits)
        for part, fits in ((fit, True), (wide.partition(" do not")[0], False))
        for name, rank in re.findall(r"`(\w+)` (\d+)", part)
    }
    assert told == {
        name: (spec().pair_rank, spec().pair_rank <= 16)
        for name, spec in ADAPTER_SPECS.items()
        if name not in ("xgblora", "mora")  # theirs depend on the steps and on the layers
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, str(page), "exec")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_make_commands_in_the_pages_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`|\s)make ([a-z][a-z-]*)(?=`|\s+#|\s*$)", text, re.MULTILINE))
    assert named <= targets()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_olora_commands_in_the_pages_exist(page: Path) -> None:
    commands = get_command(app).commands
    for code in blocks(page, "bash"):
        for line in re.findall(r"^(?:\S+=\S*\s+)*olora ([a-z]+(?: [a-z]+)?)", code, re.MULTILINE):
            first, _, second = line.partition(" ")
            assert first in commands, line
            if hasattr(commands[first], "commands"):
                assert second in commands[first].commands, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_the_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_variables_in_the_pages_are_settings(page: Path) -> None:
    known = {f"OLORA_{name.upper()}" for name in Settings.model_fields}
    known |= {"OLORA_BASE_URL", "OLORA_REQUIRE_SERVICES"}
    assert set(re.findall(r"\bOLORA_[A-Z_]+[A-Z]", page.read_text(encoding="utf-8"))) <= known


def test_the_readme_opens_with_the_three_commands() -> None:
    first = blocks(ROOT / "README.md", "bash")[0]
    assert [line.split()[1] for line in first.splitlines()] == ["quickstart", "serve", "test"]


def test_the_readme_calls_the_api_on_its_first_screen() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert any("fine_tuning.jobs.create(" in line for line in lines[:40])


def test_the_spec_file_of_the_readme_can_be_read(tmp_path: Path) -> None:
    [code] = blocks(ROOT / "README.md", "yaml")
    (tmp_path / "spec.yaml").write_text(code)
    run = read_run(tmp_path / "spec.yaml")
    assert (ROOT / run.training_file).is_file()
    read_spec(model=run.model, adapter=run.adapter, hyperparameters=run.hyperparameters, seed=run.seed)


def test_the_page_on_another_key_tells_what_happens() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    [statement] = re.findall(r'"(UPDATE keys [^"]*)"', text)
    settings = read_settings()
    settings.home.mkdir()
    migrate(settings.database_url)
    engine = make_engine(settings.database_url)

    def start(key: str | None) -> str | None:
        with sessions(engine).begin() as session:
            return first_key(session, read_settings(api_key=key))

    def holds(token: str | None) -> bool:
        with sessions(engine)() as session:
            return find_key(session, token or "") is not None

    made = start(None)
    start("first-value")
    assert holds(made)
    assert holds("first-value")
    start("second-value")
    assert holds(made)
    assert not holds("first-value")
    settings.key_file.unlink()
    with engine.begin() as connection:
        connection.execute(sql(statement))
    assert not holds(made)
    assert holds("second-value")
    another = start(None)
    assert another not in (None, made)
    assert holds(another)
    assert not holds("second-value")
    engine.dispose()


def test_make_help_explains_every_target() -> None:
    shown = subprocess.run(
        ["make", "--no-print-directory", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[1] for line in shown.splitlines()} == targets()
    assert {"quickstart", "serve", "test", "check", "fix", "bench", "help"} <= targets()


def test_the_check_that_lands_changes_runs_everything() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111
    assert "OLORA_REQUIRE_SERVICES=1" in script
    assert "make check" in script
    assert "make test" in script
