"""The command line answers at once, and in sentences."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.running import ROOT, ROWS, olora

HEAVY = ("torch", "transformers", "fastapi", "uvicorn", "celery", "sqlalchemy", "alembic", "openai")


def test_help_loads_nothing_heavy() -> None:
    code = "import sys, cli.main; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()).isdisjoint(HEAVY)


def test_help_answers_at_once(tmp_path: Path) -> None:
    seconds = []
    for _ in range(3):
        started = time.monotonic()
        assert olora(tmp_path, "--help").returncode == 0
        seconds.append(time.monotonic() - started)
    assert min(seconds) < 2, "half a second on an idle machine"


def test_help_names_every_command(tmp_path: Path) -> None:
    shown = olora(tmp_path, "--help").stdout
    for command in ("serve", "worker", "migrate", "train", "files", "jobs", "adapters"):
        assert command in shown
    for command in ("create", "list", "watch", "cancel"):
        assert command in olora(tmp_path, "jobs", "--help").stdout


def refusal(home: Path, *arguments: str | Path, **settings: str) -> str:
    """The one sentence that a command ends with."""
    done = olora(home, *arguments, **settings)
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


def test_a_setting_that_does_not_fit_is_named(tmp_path: Path) -> None:
    assert "OLORA_LEASE_SECONDS" in refusal(tmp_path, "serve", "--port", "0", lease_seconds="soon")
    assert "OLORA_STORAGE_URL" in refusal(tmp_path, "serve", "--port", "0", storage_url="s3://bucket")


def test_a_home_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "OLORA_HOME" in refusal(tmp_path / "file" / "home", "serve", "--port", "0")


def test_a_database_that_is_away_is_named(tmp_path: Path) -> None:
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


def test_options_that_are_no_pairs_are_refused(tmp_path: Path) -> None:
    sentence = refusal(tmp_path, "jobs", "create", ROWS, "--set", "batch_size", api_key="k")
    assert "NAME=VALUE" in sentence


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
        ("- a\n- list\n", ["names and values"]),
        ("model: [\n", ["not YAML"]),
        ("model: olora-tiny\ntraining_file: nowhere.jsonl\noutput: out\n", ["nowhere.jsonl", "not a file"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\nadapter: {rank: 0}\n", ["adapter.rank"]),
        (
            "model: olora-tiny\ntraining_file: ROWS\noutput: out\nhyperparameters: {bath_size: 2}\n",
            ["batch_size"],
        ),
        ("model: olora-huge\ntraining_file: ROWS\noutput: out\n", ["olora-huge", "olora-tiny"]),
        ("model: olora-tiny\ntraining_file: spec.yaml\noutput: out\n", ["JSON"]),
        ("model: olora-tiny\ntraining_file: ROWS\noutput: out\nseed: -1\n", ["seed"]),
    ],
)
def test_a_spec_file_that_does_not_fit_is_explained(tmp_path: Path, content: str, words: list[str]) -> None:
    spec = tmp_path / "spec.yaml"
    spec.write_text(content.replace("ROWS", str(ROWS)))
    sentence = refusal(tmp_path, "train", spec)
    for word in words:
        assert word in sentence
    assert not (tmp_path / "out").exists()


def test_a_spec_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "none.yaml" in refusal(tmp_path, "train", tmp_path / "none.yaml")
