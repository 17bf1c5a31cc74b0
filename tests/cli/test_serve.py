"""`olora serve` and its clients, from an upload to a loaded adapter, and the life of its processes."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.cli.running import (
    ROOT,
    ROWS,
    SHIPPED,
    Serving,
    descendants,
    lives,
    olora_process,
    serving,
    wait_for,
)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def few_rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "few.jsonl"
    path.write_text("".join(ROWS.read_text().splitlines(keepends=True)[:24]))
    return path


@pytest.fixture(scope="module")
def service(home: Path) -> Iterator[Serving]:
    with serving(home) as started:
        yield started


@pytest.fixture(scope="module")
def api_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    """A service without a worker, in a home with a space in its name."""
    home = tmp_path_factory.mktemp("alone") / "my home"
    with serving(home, "--no-worker", "--host", "127.0.0.1") as started:
        yield started


def only_worker(service: Serving) -> int:
    found = [pid for pid, line in descendants(service.process.pid).items() if "celery" in line]
    return found[0] if len(found) == 1 else 0


def test_the_printed_examples_work(service: Serving) -> None:
    shown, key = service.log.read_text(), (service.home / "api_key").read_text().strip()
    assert f"API key: {key}" in shown
    assert f'openai.OpenAI(base_url="{service.url}", api_key="{key}")' in shown
    [command] = re.findall(r"curl .*", shown)
    url, header = re.fullmatch(r'curl (\S+) -H "(.*)"', command).groups()  # type: ignore[union-attr]
    name, value = header.split(": ")
    assert "olora-tiny" in httpx.get(url, headers={name: value}).text


def test_only_its_owner_can_read_the_key(service: Serving) -> None:
    assert (service.home / "api_key").stat().st_mode & 0o777 == 0o600


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks transformers
def test_a_job_is_created_watched_and_downloaded(service: Serving, few_rows: Path, tmp_path: Path) -> None:
    created = service.run(
        *("jobs", "create", few_rows, "--rank", "4", "--epochs", "1", "--seed", "7", "--suffix", "cli"),
        *("--set", "batch_size=8", "--set", "dtype=float32", "--watch"),
    )
    assert created.returncode == 0, created.stderr
    job = created.stdout.strip()
    assert re.search(r"step 3/3 .*loss \d", created.stderr)
    assert "succeeded" in created.stderr
    assert "Sample answers to rows of the training file:" in created.stderr
    assert len(re.findall(r"^  tuned  ", created.stderr, re.MULTILINE)) == 4
    listed = service.run("jobs", "list").stdout
    assert job in listed
    assert "succeeded" in listed

    refused = service.run("adapters", "download", job, "--to", "/proc/none")
    assert re.fullmatch(r"Error: /proc/none cannot be written: .* --to\.", refused.stderr.strip())
    fetched = service.run("adapters", "download", job, "--to", tmp_path / "adapter")
    assert fetched.stdout.strip() == str(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)
    ids = torch.arange(12)[None]
    before = base(ids).logits
    tuned = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert not torch.equal(tuned(ids).logits, before)
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["spec"]["asked"]["adapter"]["rank"] == 4
    assert manifest["certificate"]["passed"]
    checkpoint = get(service, f"fine_tuning/jobs/{job}/checkpoints")["data"][0]["id"]
    to = ("--checkpoint", checkpoint, "--to", tmp_path / "checkpoint")
    fetched = service.run("adapters", "download", job, *to)
    assert fetched.stdout.strip() == str(tmp_path / "checkpoint"), fetched.stderr
    weights = "adapter_model.safetensors"
    newest = (tmp_path / "checkpoint" / weights).read_bytes()
    assert newest == (tmp_path / "adapter" / weights).read_bytes()


def test_a_merged_model_is_downloaded_instead_of_an_adapter(
    service: Serving, few_rows: Path, tmp_path: Path
) -> None:
    created = service.run(
        *("jobs", "create", few_rows, "--method", "mora", "--set", "type=6", "--set", "export=merged"),
        *("--epochs", "1", "--set", "max_steps=2", "--set", "samples=0", "--watch"),
    )
    assert created.returncode == 0, created.stderr
    job = created.stdout.strip()
    assert f"Download it: olora adapters download {job}" in created.stderr
    fetched = service.run("adapters", "download", job, "--to", tmp_path / "model")
    assert fetched.stdout.strip() == str(tmp_path / "model"), fetched.stderr
    assert not (tmp_path / "model" / "adapter_config.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "model")


def test_an_uploaded_file_is_named_by_its_id(service: Serving, few_rows: Path, tmp_path: Path) -> None:
    odd_name = tmp_path / "[b] few.jsonl"
    odd_name.write_bytes(few_rows.read_bytes())
    uploaded = service.run("files", "upload", odd_name)
    assert odd_name.name in uploaded.stderr
    assert uploaded.stdout.startswith("file-")
    created = service.run("jobs", "create", uploaded.stdout.strip(), "--set", "max_steps=1", "--epochs", "1")
    job = created.stdout.strip()
    assert job.startswith("ftjob-")
    assert service.run("jobs", "watch", job).returncode == 0


def test_the_calls_in_the_readme_work(service: Serving, few_rows: Path, tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    ask, ask_for_more, fetch = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    ended = "client.fine_tuning.jobs.retrieve(job.id).status in ('succeeded', 'failed', 'cancelled')"
    wait = f"while not {ended}:\n    __import__('time').sleep(0.5)\n"
    code = ask + ask_for_more + wait + fetch
    for theirs, ours in (
        ("http://127.0.0.1:8000/v1", service.url),
        (".olora/api_key", str(service.home / "api_key")),
        ("examples/docstrings/train.jsonl", str(few_rows)),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    assert "Created fine-tuning job" in done.stdout
    with zipfile.ZipFile(tmp_path / "adapter.zip") as adapter:
        assert "adapter_model.safetensors" in adapter.namelist()


def test_a_comparison_is_created_watched_and_downloaded(
    service: Serving, few_rows: Path, tmp_path: Path
) -> None:
    held_out = tmp_path / "valid.jsonl"
    held_out.write_text("".join(ROWS.read_text().splitlines(keepends=True)[24:36]))
    created = service.run(
        *("comparisons", "create", few_rows, "--validation-file", held_out, "--methods", "olora,lora"),
        *("--learning-rates", "1e-3,3e-3", "--seeds", "1", "--epochs", "1"),
        *("--set", "batch_size=8", "--set", "dtype=float32", "--watch"),
    )
    assert created.returncode == 0, created.stderr
    comparison = created.stdout.strip()
    assert re.search(r"run 1/\d+  (olora|lora), search, \d+ steps, rate", created.stderr)
    assert f"Download the report: olora comparisons report {comparison}" in created.stderr
    listed = service.run("comparisons", "list").stdout.split("\t")
    assert listed[:2] == [comparison, "succeeded"]
    assert listed[-1].strip() in " ".join(created.stderr.split()), "the sentence"
    assert comparison not in service.run("jobs", "list").stdout

    page, numbers = tmp_path / "report.html", tmp_path / "report.json"
    assert service.run("comparisons", "report", comparison, "--to", page).stdout.strip() == str(page)
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert service.run("comparisons", "report", comparison, "--to", numbers).returncode == 0
    assert json.loads(numbers.read_text())
    refused = service.run("comparisons", "report", comparison, "--to", "/proc/none.html")
    assert re.fullmatch(r"Error: /proc/none.html cannot be written: .* --to\.", refused.stderr.strip())


def test_a_job_and_a_comparison_hold_out_a_share_of_their_rows(service: Serving, few_rows: Path) -> None:
    """Of 24 rows a quarter."""
    shared = (few_rows, "--validation-share", "0.25", "--epochs", "1", "--set", "batch_size=8")
    created = service.run("jobs", "create", *shared, "--set", "samples=1", "--watch")
    assert created.returncode == 0, created.stderr
    assert "6 of 24 examples of the training file are held out for validation" in " ".join(
        created.stderr.split()
    )
    assert "Sample answers to held-out rows of the training file:" in created.stderr
    compared = service.run(
        *("comparisons", "create", *shared, "--methods", "lora", "--learning-rates", "1e-3", "--seeds", "1"),
        "--watch",
    )
    assert compared.returncode == 0, compared.stderr


def test_a_comparison_is_cancelled(service: Serving, few_rows: Path) -> None:
    arguments = ("comparisons", "create", ROWS, "--validation-file", few_rows, "--methods", "olora")
    comparison = service.run(*arguments).stdout.strip()
    assert service.run("comparisons", "cancel", comparison).returncode == 0
    watched = service.run("comparisons", "watch", comparison)
    assert watched.returncode == 1
    assert "cancelled" in watched.stderr


def test_a_job_is_paused_and_resumed(service: Serving) -> None:
    job = service.run("jobs", "create", ROWS, "--epochs", "50").stdout.strip()
    paused = service.run("jobs", "pause", job)
    assert paused.stdout.startswith(f"{job}: paused"), paused.stderr
    assert service.run("jobs", "resume", job).stdout.startswith(f"{job}: queued")
    assert service.run("jobs", "cancel", job).stdout.startswith(f"{job}: cancelled")
    again = service.run("jobs", "resume", job)
    assert (again.returncode, "it was cancelled" in again.stderr) == (1, True)


def test_a_job_is_cancelled(service: Serving) -> None:
    job = service.run("jobs", "create", ROWS, "--epochs", "50").stdout.strip()
    assert service.run("jobs", "cancel", job).returncode == 0
    watched = service.run("jobs", "watch", job)
    assert watched.returncode == 1
    assert "cancelled" in watched.stderr
    refused = service.run("adapters", "download", job, "--to", service.home / "none")
    assert refused.returncode == 1
    assert "cancelled" in refused.stderr


def test_a_failed_job_ends_the_watch_with_its_reason(service: Serving, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(ROWS.read_text() + '{"messages": []}\n')
    watched = service.run("jobs", "create", tmp_path / "bad.jsonl", "--watch")
    assert watched.returncode == 1
    assert re.search(r"Error: ftjob-\w+ failed: .*1501", watched.stderr)


def test_the_services_errors_are_printed_unchanged(service: Serving) -> None:
    refused = service.run("jobs", "create", "file-unknown", "--model", "olora-tinny")
    assert refused.returncode == 1
    assert re.match(r"Error: .*olora-tinny.*did you mean 'olora-tiny'", refused.stderr)


def test_a_taken_port_is_one_sentence(service: Serving, tmp_path: Path) -> None:
    refused = olora_process(tmp_path, "serve", "--port", str(service.port))
    assert refused.returncode == 1
    assert str(service.port) in refused.stderr
    assert "--port" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert service.process.poll() is None


def test_a_worker_that_dies_is_restarted(service: Serving, few_rows: Path) -> None:
    wait_for(lambda: only_worker(service), what="a worker")
    first = only_worker(service)
    below = [first, *descendants(first)]
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: only_worker(service) not in (0, first), 90, "a new worker")
    wait_for(lambda: not any(map(lives, below)), 20, "the end of the old worker's processes")
    assert "Worker cpu was killed by SIGKILL; restarting in 1 s" in service.log.read_text()
    done = service.run("jobs", "create", few_rows, "--epochs", "1", "--set", "max_steps=1", "--watch")
    assert done.returncode == 0, done.stderr


def test_the_api_runs_without_a_worker(api_alone: Serving) -> None:
    assert descendants(api_alone.process.pid) == {}
    assert httpx.get(f"{api_alone.url[:-3]}/readyz").json()["ready"]


def test_the_pasted_command_works_in_a_home_with_a_space(api_alone: Serving) -> None:
    [command] = re.findall(r"OLORA_HOME=.* jobs list .*", api_alone.log.read_text())
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(command, shell=True, env={"PATH": path}, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_listening_beyond_loopback_without_tls_warns(
    api_alone: Serving, tmp_path: Path, free_port: int
) -> None:
    assert "TLS" not in api_alone.log.read_text()
    with serving(tmp_path, "--no-worker", "--host", "0.0.0.0", "--port", str(free_port)) as loud:
        assert "TLS" in loud.log.read_text()


def test_ctrl_c_ends_everything(tmp_path: Path) -> None:
    with serving(tmp_path) as service:
        wait_for(lambda: only_worker(service), what="a worker")
        below = descendants(service.process.pid)
        service.process.send_signal(signal.SIGINT)
        assert service.process.wait(130) == 0
        assert not any(map(lives, below))
        assert "Traceback" not in service.log.read_text()


def test_a_stopped_job_resumes_with_the_next_start(tmp_path: Path, few_rows: Path) -> None:
    with serving(tmp_path) as service:
        job = endless_job(service, few_rows)
        wait_for(lambda: steps(service, job) > 0, 120, "the first step")
        below = descendants(service.process.pid)
        assert any("worker.trainer.trainer" in line for line in below.values())
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(130) == 0
        assert not any(map(lives, below))
        reached = steps_in(tmp_path)
    with serving(tmp_path) as again:
        wait_for(lambda: steps(again, job) > reached, 120, "a further step")
        events = get(again, f"fine_tuning/jobs/{job}/events?limit=100")["data"]
        assert [e["message"] for e in events].count("Fine-tuning job started") == 1
        assert get(again, f"fine_tuning/jobs/{job}")["olora"]["failures"] == 0
        assert again.run("jobs", "cancel", job).returncode == 0


def test_killing_the_service_leaves_no_process_behind(tmp_path: Path, few_rows: Path) -> None:
    with serving(tmp_path) as service:
        job = endless_job(service, few_rows)
        wait_for(lambda: steps(service, job) > 0, 120, "the first step")
        below = descendants(service.process.pid)
        assert len(below) >= 2
        service.process.kill()
        service.process.wait()
        wait_for(lambda: not any(map(lives, below)), 10, "the end of its processes")


def endless_job(service: Serving, rows: Path) -> str:
    created = service.run(
        "jobs", "create", rows, "--epochs", "50", "-s", "dtype=float32", "-s", "batch_size=1"
    )
    return created.stdout.strip()


def get(service: Serving, path: str) -> dict:  # type: ignore[type-arg]
    key = (service.home / "api_key").read_text().strip()
    answer = httpx.get(f"{service.url}/{path}", headers={"Authorization": f"Bearer {key}"}, timeout=30)
    return answer.json()  # type: ignore[no-any-return]


def steps(service: Serving, job: str) -> int:
    return int(get(service, f"fine_tuning/jobs/{job}")["olora"]["step"])


def steps_in(home: Path) -> int:
    """The last recorded step, once nothing runs any more."""
    with sqlite3.connect(home / "olora.db") as database:
        return int(database.execute("SELECT max(step) FROM jobs").fetchone()[0])
