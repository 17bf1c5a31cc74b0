"""The command line is fast, and its errors are sentences."""

import stat
import subprocess
import sys
import time
from io import StringIO
from pathlib import Path

import httpx
import pytest
import typer
from rich.console import Console

from cli import main
from cli.progress import TrainingBar
from cli.watching import JOBS, print_table, watch
from store.settings import get_settings
from tests.cli.running import ROOT, ROWS, olora, olora_process

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "celery", "sqlalchemy", "alembic", "openai")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, cli.main; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_help_answers_at_once(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert olora_process(tmp_path, "--help").returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 2, "half a second on an idle machine"


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = olora(tmp_path, "--help").stdout
    commands = ("serve", "worker", "migrate", "train", "compare", "methods", "files", "jobs", "comparisons")
    for command in (*commands, "adapters", "models"):
        assert command in shown
    for command in ("create", "list", "watch", "cancel"):
        assert command in olora(tmp_path, "jobs", "--help").stdout
        assert command in olora(tmp_path, "comparisons", "--help").stdout


def refusal(home: Path, *arguments: str | Path, **settings: str) -> str:
    """The only line that a failed command prints. `serve` runs in its own process."""
    run = olora_process if arguments[0] == "serve" else olora
    done = run(home, *arguments, **settings)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    [sentence] = done.stderr.strip().splitlines()
    return sentence


def test_without_a_key_the_client_says_where_it_looked(tmp_path: Path) -> None:
    assert str(tmp_path / "api_key") in refusal(tmp_path, "jobs", "list")


def test_without_a_service_the_client_says_how_to_start_one(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "jobs", "list", "--base-url", "http://127.0.0.1:9/v1", api_key="k")
    assert "http://127.0.0.1:9/v1" in sentence
    assert "olora serve" in sentence


def test_an_invalid_setting_is_named(tmp_path: Path) -> None:
    assert "OLORA_LEASE_SECONDS" in refusal(tmp_path, "serve", "--port", "0", lease_seconds="soon")
    assert "OLORA_STORAGE_URL" in refusal(tmp_path, "serve", "--port", "0", storage_url="s3://bucket")


def test_a_home_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "OLORA_HOME" in refusal(tmp_path / "file" / "home", "serve", "--port", "0")


def test_an_unreachable_database_is_named(tmp_path: Path) -> None:
    away = "postgresql://olora:hidden@127.0.0.1:9/olora"
    for command in (["serve", "--port", "0"], ["migrate"], ["worker"]):
        sentence = refusal(tmp_path, *command, database_url=away)
        assert "OLORA_DATABASE_URL" in sentence
        assert "hidden" not in sentence


def test_a_worker_needs_a_migrated_database(tmp_path: Path) -> None:
    assert "migrate" in refusal(tmp_path, "worker")


def test_migrating_twice_does_nothing_the_second_time(tmp_path: Path) -> None:
    for _ in range(2):
        done = olora(tmp_path, "migrate")
        assert done.returncode == 0
        assert "up to date" in done.stderr


def test_options_that_are_not_pairs_are_refused(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "jobs", "create", ROWS, "--set", "batch_size", api_key="k")
    assert "NAME=VALUE" in sentence


@pytest.mark.parametrize("option", ["--learning-rates", "--budget"])
def test_what_is_not_a_number_is_refused(tmp_path: Path, option: str) -> None:
    asked = ("comparisons", "create", ROWS, "--validation-file", ROWS, option, "soon")
    sentence = refusal(tmp_path, *asked, api_key="k")
    assert f"{option}: 'soon' is not a number" in sentence


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ("question", "--columns 'question' is not KEY=COLUMN"),
        ("prompt=a,prompt=b", "gives 'prompt' twice"),
        ("prompt=a,completion=a", "column 'a' is given for 'prompt' and for 'completion'"),
        ("promt=a", "did you mean 'prompt'?"),
        ("prompt=", "the column for 'prompt' is empty"),
    ],
)
def test_a_mapping_of_columns_that_cannot_be_meant_is_explained(
    tmp_path: Path, columns: str, says: str
) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: olora-tiny\ntraining_file: {ROWS}\noutput: out\n")
    asked = ("--columns", columns)
    assert says in refusal(tmp_path, "train", spec, *asked)
    assert says in refusal(tmp_path, "jobs", "create", ROWS, *asked, api_key="k")
    assert says in refusal(tmp_path, "compare", ROWS, "--validation", ROWS, *asked)


def test_a_download_spares_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    sentence = refusal(tmp_path, "adapters", "download", "ftjob-1", "--to", tmp_path / "mine", api_key="k")
    assert "--to" in sentence


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("model: olora-tiny\n", ["training_file", "output", "must be given"]),
        ("model: olora-tiny\ntrainingfile: x\noutput: y\n", ["trainingfile", "did you mean 'training_file'"]),
        ("- a\n- list\n", ["mapping of names to values"]),
        ("model: [\n", ["not valid YAML"]),
        ("model: olora-tiny\ntraining_file: nowhere.jsonl\noutput: out\n", ["nowhere.jsonl", "not a file"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\nadapter: {rank: 0}\n", ["adapter.rank"]),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\nhyperparameters: {bath_size: 2}\n",
            ["batch_size"],
        ),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\nhyperparameters: {1: 2}\n",
            ["hyperparameters.1 is unknown"],
        ),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\nadapter: {1: 2}\n", ["adapter.1 is unknown"]),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\nhyperparameters: {eval_steps: 2}\n",
            ["eval_steps", "there is no validation_file"],
        ),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\nvalidation_share: 1\n",
            ["validation_share must be less than 1"],
        ),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\ngroup_by: user\n",
            ["group_by says which rows validation_share keeps together"],
        ),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\n"
            "validation_file: ROWS\nvalidation_share: 0.1\n",
            ["exclude each other"],
        ),
        ("model: olora-huge\ntraining_file: ROWS\noutput: out\n", ["olora-huge", "olora-tiny"]),
        ("model: olora-tiny\ntraining_file: spec.yaml\noutput: out\n", ["JSON"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\nseed: -1\n", ["seed"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\ncolumns: {promt: a}\n", ["promt", "prompt"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\ncolumns: {text: a}\n", ["no column 'a'"]),
    ],
)
def test_an_invalid_spec_file_is_explained(tmp_path: Path, content: str, words: list[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(content.replace("ROWS", str(ROWS)))
    sentence = refusal(tmp_path, "train", spec)
    for word in words:
        assert word in sentence
    assert not (tmp_path / "out").exists()


def test_a_missing_spec_file_is_named(tmp_path: Path) -> None:
    assert "none.yaml" in refusal(tmp_path, "train", tmp_path / "none.yaml")


@pytest.mark.parametrize("option", [[], ["--fresh"]])
@pytest.mark.parametrize("output", ["spec.yaml", "spec.yaml/below", "/proc/x", "o" * 300])
def test_an_output_that_cannot_be_created_is_named(tmp_path: Path, output: str, option: list[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: olora-tiny\ntraining_file: {ROWS}\noutput: {output}\n")
    sentence = refusal(tmp_path, "train", spec, *option)
    assert output in sentence
    assert "hoose another" in sentence


def test_a_damaged_record_of_a_run_is_named(tmp_path: Path) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"model: olora-tiny\ntraining_file: {ROWS}\noutput: out\n")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run.json").write_text('{"asked": ')
    sentence = refusal(tmp_path, "train", spec)
    assert str(tmp_path / "out" / "run.json") in sentence
    assert "--fresh" in sentence


def test_a_path_that_the_system_refuses_is_named(tmp_path: Path) -> None:
    long = "n" * 300
    assert long in refusal(tmp_path, "jobs", "create", long, api_key="k")
    assert long in refusal(tmp_path, "files", "upload", long, api_key="k")
    assert long in refusal(tmp_path, "adapters", "download", "ftjob-1", "--to", long, api_key="k")


def test_an_invalid_url_is_named(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "jobs", "list", "--base-url", "http://[::1", api_key="k")
    assert "--base-url" in sentence


def test_an_unexpected_error_is_one_sentence_and_debug_adds_the_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise TypeError("two\nlines")

    monkeypatch.setattr(main, "app", broken)
    with pytest.raises(SystemExit, match="1"):
        main.main()
    [sentence] = capsys.readouterr().err.splitlines()
    assert "TypeError: two lines" in sentence
    assert "OLORA_LOG_LEVEL=debug" in sentence

    monkeypatch.setenv("OLORA_LOG_LEVEL", "debug")
    get_settings.cache_clear()
    with pytest.raises(SystemExit, match="1"):
        main.main()
    assert "Traceback" in capsys.readouterr().err


LISTED = [
    {
        "id": "ftjob-" + "i" * 24,
        "status": "failed",
        "created_at": 1_700_000_000,
        "model": "Qwen/Qwen3-0.6B-Base",
        "fine_tuned_model": None,
        "error": {"message": "Line 1501 of the [training] file\nhas no assistant message to learn from."},
    }
]


@pytest.mark.parametrize("width", [200, 80, 30])
def test_the_list_of_jobs_keeps_ids_whole_on_any_terminal(width: int) -> None:
    console = Console(file=StringIO(), width=width, force_terminal=True, color_system=None)
    print_table(LISTED, console, JOBS)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert LISTED[0]["id"] in shown
    if width >= 80:
        assert "…" not in shown
        assert "failed" in shown
        assert max(map(len, shown.splitlines())) <= width


def test_the_list_of_jobs_has_one_line_each_on_a_pipe() -> None:
    console = Console(file=StringIO(), width=80)
    print_table(LISTED * 2, console, JOBS)
    lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    assert len(lines) == 2
    cells = lines[0].split("\t")
    assert cells[:2] == [LISTED[0]["id"], "failed"]
    assert cells[3:] == [
        "Qwen/Qwen3-0.6B-Base",
        "Line 1501 of the [training] file has no assistant message to learn from.",
    ]
    assert " " not in "".join(cells[:4]), "awk splits columns at spaces"


def test_ctrl_c_stops_watching_and_prints_the_command_on_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(request: httpx.Request) -> httpx.Response:
        raise KeyboardInterrupt

    job_id = LISTED[0]["id"]
    bar = TrainingBar(Console(stderr=True, width=40))
    with httpx.Client(transport=httpx.MockTransport(interrupted), base_url="http://service/v1") as client:
        with pytest.raises(typer.Exit):
            watch(client, JOBS, job_id, bar)
    assert f"olora jobs watch {job_id}\n" in capsys.readouterr().err


def test_only_its_owner_can_read_a_new_home(tmp_path: Path) -> None:
    home = tmp_path / "a" / "home"
    assert olora(home, "migrate").returncode == 0
    assert [stat.S_IMODE(path.stat().st_mode) for path in (home.parent, home)] == [0o700, 0o700]
    assert stat.S_IMODE((home / "olora.db").stat().st_mode) == 0o600
