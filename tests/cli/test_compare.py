"""`olora compare`: its verdict, resuming it, and its errors."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.browser import chromium
from tests.cli.running import ROOT, environment, olora, wait_for
from tests.rows import chat_file

TIMINGS = ("seconds", "tokens_per_second", "peak_memory_bytes")


@pytest.fixture(scope="module")
def base(models_dir: Path) -> Path:
    return models_dir / "tiny"


def command(folder: Path, base: Path, *more: str) -> list[str | Path]:
    (folder / "train.jsonl").write_bytes(chat_file(40))
    (folder / "valid.jsonl").write_bytes(chat_file(10, first=100))
    return [
        *("compare", folder / "train.jsonl", "--validation", folder / "valid.jsonl"),
        *("--base", base, "--methods", "olora, lora", "--learning-rates", "1e-3,3e-3"),
        *("--seeds", "2", "--max-steps", "8", "--batch-size", "2", "--set", "dtype=float32"),
        *("--output", folder / "out"),
        *more,
    ]


def report(folder: Path) -> dict[str, Any]:
    """The report without its timings, which differ between equal runs."""
    found = json.loads((folder / "comparison.json").read_text())
    for method in found["methods"]:
        for name in TIMINGS:
            assert method.pop(name) > 0
    return found


def interrupted(folder: Path, arguments: list[str | Path]) -> str:
    log = folder / "compare.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", *map(str, arguments)],
            cwd=ROOT,
            env=environment(folder),
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "run 3/" in log.read_text() or process.poll() is not None, 200, "the third run")
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
    return log.read_text()


@pytest.fixture(scope="module")
def through(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """The home of an uninterrupted comparison; tests only read it."""
    home = tmp_path_factory.mktemp("through")
    done = olora(home, *command(home, base))
    assert done.returncode == 0, done.stderr
    (home / "stderr").write_text(done.stderr)
    (home / "stdout").write_text(done.stdout)
    return home


def test_a_comparison_prints_its_verdict_and_its_page(through: Path, base: Path) -> None:
    page = through / "out" / "comparison.html"
    assert (through / "stdout").read_text().strip() == str(page)
    found = report(through / "out")
    assert found["verdict"]["sentence"] in (through / "stderr").read_text()
    assert [method["label"] for method in found["methods"]] == ["olora", "lora"]
    assert not (through / "out" / "checkpoints").exists()

    refused = olora(through, *command(through, base))
    assert refused.returncode == 1
    assert "finished" in refused.stderr
    assert "--fresh" in refused.stderr


def test_a_browser_opens_the_page(through: Path, tmp_path: Path) -> None:
    page, browser = through / "out" / "comparison.html", chromium(tmp_path)
    assert report(through / "out")["verdict"]["sentence"] in browser.document(page)
    assert browser.overflow(page, 500) == 0


def test_train_accepts_the_winners_spec(through: Path, base: Path, tmp_path: Path) -> None:
    found = report(through / "out")
    command(tmp_path, base)  # the files
    spec = tmp_path / "winner.yaml"
    spec.write_text(json.dumps(found["winner"]))
    trained = olora(tmp_path, "train", spec)
    assert trained.returncode == 0, trained.stderr
    manifest = json.loads((tmp_path / found["winner"]["output"] / "adapter" / "manifest.json").read_text())
    taken = next(m for m in found["methods"] if m["label"] == found["verdict"]["take"])
    assert manifest["metrics"]["valid_loss_after"] == pytest.approx(taken["final"]["losses"][0], abs=1e-5)


def test_the_same_command_resumes_after_an_interruption(through: Path, base: Path, tmp_path: Path) -> None:
    output = interrupted(tmp_path, command(tmp_path, base))
    assert "Run the same command to resume" in output
    assert not (tmp_path / "out" / "comparison.html").exists()
    changed = olora(tmp_path, *command(tmp_path, base, "--seeds", "3"))
    assert changed.returncode == 1
    assert "with different seeds" in changed.stderr
    again = olora(tmp_path, *command(tmp_path, base))
    assert again.returncode == 0, again.stderr
    assert "Resuming from step-" in again.stderr
    assert "run 1/" not in again.stderr
    assert report(tmp_path / "out") == report(through / "out")


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (("--methods", "olora, lara"), "method 'lara' is unknown (did you mean 'lora'?)"),
        (("--methods", "olora, {"), "is not a list such as"),
        (("--learning-rates", "quick"), "--learning-rates: 'quick' is not a number"),
        (("--set", "learning_rate=1"), "learning_rate must be left out"),
        (("--set", "nonsense"), "is not NAME=VALUE"),
        (("--seeds", "0"), "seeds must be at least 1 (got 0)"),
        (("--validation", "missing.jsonl"), "missing.jsonl is not a file"),
        (("--validation-share", "0.1"), "validation_share and a validation_file exclude each other"),
        (("--group-by", "user"), "group_by says which rows validation_share keeps together"),
        (("--base", "no-such-model"), "no-such-model"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_loaded(
    tmp_path: Path, base: Path, more: tuple[str, ...], sentence: str
) -> None:
    refused = olora(tmp_path, *command(tmp_path, base, *more))
    assert refused.returncode == 1
    assert sentence in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()
