"""`olora train`: one run from a file, without the service, and resuming it."""

import hashlib
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.cli.running import ROOT, ROWS, environment, olora, olora_process, wait_for

TRACKERS = """\
integrations:
  - {type: wandb, wandb: {project: tuning}}
  - {type: mlflow, mlflow: {experiment: tuning}}
"""


def write_spec(folder: Path, output: str, seed: int = 5, more: str = "") -> Path:
    rows = ROWS.read_text().splitlines(keepends=True)
    (folder / "train.jsonl").write_text("".join(rows[:40]))
    (folder / "valid.jsonl").write_text("".join(rows[40:50]))
    spec = folder / f"{output}.yaml"
    spec.write_text(
        "model: olora-tiny\n"
        "training_file: train.jsonl\n"
        "validation_file: valid.jsonl\n"
        f"output: {output}\n"
        "adapter: {method: olora, rank: 4}\n"
        "hyperparameters: {n_epochs: 2, batch_size: 2, dtype: float32}\n"
        f"seed: {seed}\n{more}"
    )
    return spec


def weights(folder: Path) -> bytes:
    return (folder / "adapter" / "adapter_model.safetensors").read_bytes()


def charted(folder: Path) -> list[int]:
    """The steps with a training loss in the run's TensorBoard file."""
    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    return [event.step for event in read.Scalars("train/loss")]


def interrupted(spec: Path, home: Path, number: signal.Signals, **settings: str) -> str:
    """Trains for a few steps, then sends the signal. Returns the output."""
    log = home / "train.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "cli.main", "train", str(spec)],
            cwd=ROOT,
            env=environment(home, **settings),
            stdout=output,
            stderr=output,
        )
    try:
        wait_for(lambda: "step 4/40" in log.read_text() or process.poll() is not None, 200, "the fourth step")
        process.send_signal(number)
        assert process.wait(60) == 130, log.read_text()
    finally:
        process.kill()
        process.wait()
    return log.read_text()


def test_merged_weights_replace_the_adapter(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "whole")
    spec.write_text(spec.read_text().replace("rank: 4}", "rank: 4, export: merged}").replace("2, b", "1, b"))
    done = olora(tmp_path, "train", spec)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "whole" / "model")
    assert re.search(r"As written in \w+: largest logit difference", done.stderr)
    assert (tmp_path / "whole" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "whole" / "adapter").exists()
    again = olora(tmp_path, "train", spec)
    assert (again.returncode, "model already exists" in again.stderr) == (1, True)


def test_a_share_of_the_rows_is_held_out_in_place_of_a_file(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "shared", more="validation_share: 0.1\n")
    spec.write_text(spec.read_text().replace("validation_file: valid.jsonl\n", "").replace("2, b", "1, b"))
    done = olora(tmp_path, "train", spec, "--validation-share", "0.25")  # the option goes before the file
    assert done.returncode == 0, done.stderr
    assert "10 of 40 examples of the training file are held out" in " ".join(done.stderr.split())
    manifest = json.loads((tmp_path / "shared" / "adapter" / "manifest.json").read_text())
    held_out = manifest["data"]["validation"]["held_out"]
    assert held_out == {"share": 0.25, "seed": 5, "group_by": None, "examples": 10, "of": 40}
    assert manifest["metrics"]["valid_loss_after"] < manifest["metrics"]["valid_loss_before"]


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own
def test_an_interrupted_run_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    through = olora(tmp_path, "train", write_spec(tmp_path, "through"))
    assert len(list((tmp_path / "through" / "tokens").iterdir())) == 2
    assert through.returncode == 0, through.stderr
    assert through.stdout.strip() == str(tmp_path / "through" / "adapter")
    assert re.search(r"\.jsonl: read as JSONL, \d+ examples", through.stderr)
    assert "step 40/40" in through.stderr
    assert "Adapter verified" in through.stderr
    assert "Validation loss" in through.stderr
    assert "Sample answers to rows of the validation file:" in through.stderr
    assert charted(tmp_path / "through") == list(range(1, 41))

    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    trackers = {"wandb_mode": "offline", "mlflow_tracking_uri": uri}
    spec = write_spec(tmp_path, "stopped", more=TRACKERS)
    output = interrupted(spec, tmp_path, signal.SIGINT, **trackers)
    assert "Run the same command to resume" in output
    assert not (tmp_path / "stopped" / "adapter").exists()
    again = olora(tmp_path, "train", spec, **trackers)
    assert again.returncode == 0, again.stderr
    assert "Resuming from step-" in again.stderr
    assert "is not receiving" not in again.stderr
    assert "step 40/40" in again.stderr
    assert weights(tmp_path / "stopped") == weights(tmp_path / "through")
    assert charted(tmp_path / "stopped") == list(range(1, 41))
    assert len(list((tmp_path / "stopped" / "tensorboard").iterdir())) == 1

    assert len(list((tmp_path / "trackers" / "wandb").glob("offline-run-*"))) == 1
    client = MlflowClient(uri)
    [run] = client.search_runs([client.get_experiment_by_name("tuning").experiment_id])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [metric.step for metric in history] == list(range(1, 41))
    assert run.info.status == "FINISHED"
    assert run.data.params["adapter.rank"] == "4"
    digest = hashlib.sha256(weights(tmp_path / "stopped")).hexdigest()
    assert run.data.tags["olora.adapter_sha256"] == digest

    manifest = json.loads((tmp_path / "stopped" / "adapter" / "manifest.json").read_text())
    assert manifest["certificate"]["passed"]
    assert len(manifest["samples"]["rows"]) == 4
    other = json.loads((tmp_path / "through" / "adapter" / "manifest.json").read_text())
    assert manifest["samples"] == other["samples"]

    refused = olora(tmp_path, "train", spec, **trackers)
    assert refused.returncode == 1
    assert "already exists" in refused.stderr
    assert "--fresh" in refused.stderr


def test_a_tracker_without_an_account_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    refused = olora(tmp_path, "train", write_spec(tmp_path, "out", more=TRACKERS))
    assert refused.returncode == 1
    assert "operator to set OLORA_WANDB_API_KEY" in " ".join(refused.stderr.split())
    assert not (tmp_path / "out").exists()
    unknown = olora(tmp_path, "train", write_spec(tmp_path, "out", more="integrations: [{type: comet}]\n"))
    assert "integrations[0] must be an object whose type is 'wandb' or 'mlflow'" in unknown.stderr


def test_an_unfinished_run_is_not_mixed_with_another(tmp_path: Path) -> None:
    interrupted(write_spec(tmp_path, "out"), tmp_path, signal.SIGTERM)
    other = write_spec(tmp_path, "out", seed=6)
    refused = olora(tmp_path, "train", other)
    assert refused.returncode == 1
    assert "another spec" in refused.stderr
    fresh = olora(tmp_path, "train", other, "--fresh")
    assert fresh.returncode == 0, fresh.stderr
    assert "Resuming" not in fresh.stderr
    assert json.loads((tmp_path / "out" / "run.json").read_text())["asked"]["seed"] == 6


def test_preferences_are_trained_by_the_type_dpo(tmp_path: Path) -> None:
    pairs = [{"prompt": f"{n} + 1 =", "chosen": f" {n + 1}", "rejected": " 0"} for n in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    spec = tmp_path / "dpo.yaml"
    content = "model: olora-tiny\ntraining_file: pairs.jsonl\noutput: dpo\nhyperparameters: {max_steps: 2}\n"
    spec.write_text(content)
    refused = olora(tmp_path, "train", spec)
    assert refused.returncode == 1
    assert 'method.type "dpo"' in " ".join(refused.stderr.split())
    spec.write_text(f"{content}type: dpo\n")
    done = olora(tmp_path, "train", spec)
    assert done.returncode == 0, done.stderr
    assert "beta = 0.1" in done.stderr
    asked = json.loads((tmp_path / "dpo" / "adapter" / "manifest.json").read_text())["spec"]
    assert json.dumps(asked).count('"dpo"') == 2


def test_columns_of_other_names_are_mapped(tmp_path: Path) -> None:
    table = "question;answer\n" + "".join(f"{n} + 1 =;{n + 1}\n" for n in range(12))
    (tmp_path / "table.csv").write_text(table)
    spec = tmp_path / "mapped.yaml"
    content = "model: olora-tiny\ntraining_file: table.csv\noutput: out\nhyperparameters: {max_steps: 2}\n"
    spec.write_text(content)
    refused = " ".join(olora(tmp_path, "train", spec).stderr.split())
    assert "found columns question, answer; expected messages" in refused
    assert "--columns prompt=question,completion=answer" in refused
    done = olora(tmp_path, "train", spec, "--columns", "prompt=question, completion=answer")
    assert done.returncode == 0, done.stderr
    read = "table.csv: read as CSV, columns question as prompt, answer as completion, 12 examples\n"
    assert read in done.stderr
    manifest = json.loads((tmp_path / "out" / "adapter" / "manifest.json").read_text())
    assert manifest["spec"]["asked"]["columns"] == {"prompt": "question", "completion": "answer"}
    spec.write_text(f"{content}columns: {{prompt: question, completion: other}}\n")
    assert "no column 'other'" in olora(tmp_path, "train", spec, "--fresh").stderr


def test_the_manifest_records_how_the_base_was_quantised(tmp_path: Path) -> None:
    spec = write_spec(tmp_path, "nf4")
    content = spec.read_text().replace("n_epochs: 2,", "max_steps: 2, quantization: nf4,")
    spec.write_text(content)
    done = olora_process(tmp_path, "train", spec, timeout=250)  # it loads what a quantised base needs
    assert done.returncode == 0, done.stderr
    assert "Failed to load" not in done.stderr
    manifest = json.loads((tmp_path / "nf4" / "adapter" / "manifest.json").read_text())
    assert manifest["base_model"]["quantization"]["kind"] == "nf4"
    spec.write_text(content.replace("nf4,", "fp4,").replace("output: nf4", "output: fp4"))
    refused = olora(tmp_path, "train", spec)
    assert refused.returncode == 1
    assert "hyperparameters.quantization must be 'none', 'nf4'" in " ".join(refused.stderr.split())


def test_torchrun_trains_one_adapter_on_two_devices(tmp_path: Path) -> None:
    """Also after an interruption, with the losses of one device."""
    alone = olora(tmp_path, "train", write_spec(tmp_path, "alone"))
    assert alone.returncode == 0, alone.stderr
    spec, log = write_spec(tmp_path, "together"), tmp_path / "train.log"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "cli.main", "train", str(spec)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=ROOT, env=environment(tmp_path), stdout=output, stderr=output)
    try:
        wait_for(lambda: "step 4/40" in log.read_text() or process.poll() is not None, 100, "step 4")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
    assert log.read_text().count("Run the same command to resume") == 1, log.read_text()
    assert not (tmp_path / "together" / "adapter").exists()

    again = subprocess.run(
        command, cwd=ROOT, env=environment(tmp_path), capture_output=True, text=True, timeout=250
    )
    assert again.returncode == 0, again.stderr
    assert again.stdout.strip() == str(tmp_path / "together" / "adapter")
    assert again.stderr.count("Resuming from step-") == again.stderr.count("Adapter verified") == 1

    metrics = {
        name: json.loads((tmp_path / name / "adapter" / "manifest.json").read_text())["metrics"]
        for name in ("alone", "together")
    }
    for figure in ("train_loss", "valid_loss_after"):
        assert metrics["together"][figure] == pytest.approx(metrics["alone"][figure], rel=0, abs=1e-5)
