"""A run that is interrupted and resumed in another process equals one that never stopped, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_core.bases.loading import load_base
from olora_core.progress import Evaluated, Finished, Resolved, Saved, Step
from olora_core.specs import TrainSpec
from olora_core.training.train import train

from ..loaded_bases import fresh_base
from ..runs import chat_rows, spec_for, write_rows

ROOT = Path(__file__).parents[3]
CASES = {
    "olora": ("llama", spec_for("olora")),
    "lora": ("llama", spec_for("lora")),
    "olora with dropout": ("llama", spec_for("olora", adapter={"dropout": 0.2})),
    "lora with dropout": ("llama", spec_for("lora", adapter={"dropout": 0.2}, schedule="cosine")),
    "olora in bf16": ("llama-bf16", spec_for("olora", adapter={"dropout": 0.2}, dtype="bfloat16")),
    "lora in bf16": ("llama-bf16", spec_for("lora", dtype="bfloat16")),
    "pissa": ("llama", spec_for("pissa", adapter={"dropout": 0.2, "svd_iterations": 2})),
    "melora": ("llama", spec_for("melora", adapter={"dropout": 0.2, "lora_plus_ratio": 4})),
    "ba_lora": ("llama", spec_for("ba_lora", adapter={"dropout": 0.2, "lambda_diversity": 0.1})),
    "ba_lora from LoRA's start": (
        "llama",
        spec_for("ba_lora", adapter={"init": "lora", "center_logits": True}, packing=True),
    ),
    "cola at its knots": ("llama", spec_for("cola", adapter={"dropout": 0.2})),
    "cola within its links": (
        "llama",
        spec_for("cola", adapter={"links": 2, "link_ranks": [4, 2]}, schedule="cosine", weight_decay=0.1),
    ),
    "xgblora at its rounds' ends": (
        "llama",
        spec_for("xgblora", adapter={"dropout": 0.2, "steps_per_round": 2, "layers_per_round": 1}),
    ),
    "xgblora within its rounds": (
        "llama",
        spec_for("xgblora", adapter={"steps_per_round": 3, "ramp_steps": 2}, weight_decay=0.1),
    ),
    "olora packed on GPT-2": ("gpt2", spec_for("olora", packing=True)),
    "olora with LoRA+ and decay": (
        "llama",
        spec_for("olora", adapter={"lora_plus_ratio": 8}, weight_decay=0.1, schedule="constant"),
    ),
    "lora with LoRA+ and rsLoRA": (
        "llama",
        spec_for("lora", adapter={"lora_plus_ratio": 16, "rslora": True}, max_grad_norm=0.1),
    ),
    "olora with noise": ("llama", spec_for("olora", neftune_alpha=5)),
    "adalora while its budget falls": ("llama", spec_for("adalora", adapter={"dropout": 0.2})),
    "rm_lora with masks": ("llama", spec_for("rm_lora", adapter={"dropout": 0.2, "variant": "v2"})),
    "sora while gates close": (
        "llama",
        spec_for("sora", adapter={"dropout": 0.2, "threshold": 0.1, "gate_learning_rate": 0.2}),
    ),
    "lora with noise and dropout, packed": (
        "llama",
        spec_for("lora", adapter={"dropout": 0.2}, neftune_alpha=5, packing=True, schedule="cosine"),
    ),
    "olora stopping early": (
        "llama",
        spec_for("olora", eval_steps=1, early_stopping_patience=4, early_stopping_min_delta=9.0),
    ),
    "prilora between two prunings": (
        "llama",
        spec_for("prilora", adapter={"prune_every": 3, "dropout": 0.2}, packing=False),
    ),
    "prilora that keeps its zeros": (
        "llama",
        spec_for("prilora", adapter={"prune_every": 1, "regrow": False}),
    ),
    "tt_lora with dropout": (
        "llama",
        spec_for("tt_lora", adapter={"dropout": 0.2, "modes": {32: [8, 4]}}, weight_decay=0.1),
    ),
    "mora": ("llama", spec_for("mora", adapter={"dropout": 0.2, "type": 4}, weight_decay=0.1)),
    "mora at its restarts": (
        "llama",
        spec_for("mora", adapter={"dropout": 0.2, "restart_every": 2, "ramp_steps": 2}),
    ),
    "mora within its rounds": (
        "llama-bf16",
        spec_for("mora", adapter={"restart_every": 3, "restart_types": [1, 2]}, dtype="bfloat16"),
    ),
    "mora of type 6": (
        "llama",
        spec_for("mora", adapter={"type": 6, "export": "merged", "dropout": 0.2}),
    ),
    "olora on nf4": ("wide-llama", spec_for("olora", adapter={"dropout": 0.2}, quantization="nf4")),
    "lora on int8": ("wide-llama", spec_for("lora", quantization="int8")),
    "olora on torchao-int8": ("wide-llama", spec_for("olora", quantization="torchao-int8")),
    "olora on torchao-fp8": ("wide-llama", spec_for("olora", quantization="torchao-fp8")),
}
INTERRUPTED_AFTER = (2, 4)
"""Steps of six, three an epoch: in the middle of the first epoch, and at the beginning of the second."""

PROGRAM = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from olora_core.bases.precision import DTYPES
from olora_core.specs import TrainSpec
from olora_core.progress import Evaluated, Finished, Step
from olora_core.training.train import train
from tests.core.loaded_bases import fresh_base

for case in json.load(sys.stdin):
    spec = TrainSpec.model_validate(case["spec"])
    dtype, quantization = DTYPES[spec.hyperparameters.dtype], spec.hyperparameters.quantization
    base = fresh_base(Path(case["base"]), dtype=dtype, quantization=quantization)
    paths = [Path(case[name]) for name in ("training", "validation", "folder")]
    result = {"steps": [], "evaluated": []}
    for progress in train(spec, base, *paths, resume=Path(case["resume"])):
        if isinstance(progress, Step):
            result["steps"].append([progress.step, progress.loss, progress.grad_norm, progress.valid_loss])
        if isinstance(progress, Evaluated):
            result["evaluated"].append([progress.step, progress.loss, progress.accuracy])
        if isinstance(progress, Finished):
            result["folder"], result["trained_tokens"] = str(progress.folder), progress.trained_tokens
            result["metrics"] = progress.metrics
    print(json.dumps(result))
"""


@dataclass
class Unbroken:
    """A run from end to end, and the checkpoints it left on its way."""

    steps: list[list[Any]]
    evaluated: list[list[Any]]
    checkpoints: dict[int, Path]
    finished: Finished
    spec: TrainSpec


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    rows = chat_rows(16)
    return write_rows(folder / "training.jsonl", rows[:11]), write_rows(
        folder / "validation.jsonl", rows[11:]
    )


def run_unbroken(base_folder: Path, spec: TrainSpec, files: tuple[Path, Path], folder: Path) -> Unbroken:
    dtype = getattr(torch, spec.hyperparameters.dtype)
    base = fresh_base(base_folder, dtype=dtype, quantization=spec.hyperparameters.quantization)
    steps, evaluated, checkpoints, resolved, finished = [], [], {}, None, None
    progress = train(spec, base, *files, folder)
    update = next(progress)
    while update is not None:
        stop_request = None
        if isinstance(update, Resolved):
            resolved = update.spec
        elif isinstance(update, Step):
            steps.append([update.step, update.loss, update.grad_norm, update.valid_loss])
            stop_request = "save" if update.step in INTERRUPTED_AFTER else None
        elif isinstance(update, Saved) and update.step in INTERRUPTED_AFTER:
            kept = folder / f"kept-{update.step}"
            shutil.rmtree(kept, ignore_errors=True)  # an evaluation brings a second checkpoint of its step
            checkpoints[update.step] = update.folder.rename(kept)
        elif isinstance(update, Evaluated):
            evaluated.append([update.step, update.loss, update.accuracy])
        elif isinstance(update, Finished):
            finished = update
        try:
            update = progress.send(stop_request)
        except StopIteration:
            update = None
    assert resolved is not None
    assert finished is not None
    return Unbroken(steps, evaluated, checkpoints, finished, resolved)


@pytest.fixture(scope="module")
def unbroken(base_folders, files, tmp_path_factory) -> dict[str, Unbroken]:
    root = tmp_path_factory.mktemp("unbroken")
    return {
        name: run_unbroken(base_folders[base], spec, files, root / name.replace(" ", "-"))
        for name, (base, spec) in CASES.items()
    }


@pytest.fixture(scope="module")
def resumed(unbroken, base_folders, files, tmp_path_factory) -> dict[tuple[str, int], dict[str, Any]]:
    """Each case resumed from each of its checkpoints, all in one other process."""
    root = tmp_path_factory.mktemp("resumed")
    keys = [(name, step) for name in CASES for step in INTERRUPTED_AFTER]
    orders = [
        {
            "spec": unbroken[name].spec.model_dump(mode="json"),
            "base": str(base_folders[CASES[name][0]]),
            "training": str(files[0]),
            "validation": str(files[1]),
            "folder": str(root / f"{name}-{step}".replace(" ", "-")),
            "resume": str(unbroken[name].checkpoints[step]),
        }
        for name, step in keys
    ]
    # The other process starts with another number of threads, and takes the checkpoint's.
    environment = os.environ | {"OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", PROGRAM],
        input=json.dumps(orders),
        capture_output=True,
        text=True,
        env=environment,
        cwd=root,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(keys, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.methods
@pytest.mark.parametrize("step", INTERRUPTED_AFTER)
@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_an_unbroken_one(unbroken, resumed, name, step) -> None:
    whole, rest = unbroken[name], resumed[name, step]
    assert rest["steps"] == whole.steps[step:]
    assert rest["evaluated"] == [entry for entry in whole.evaluated if entry[0] > step]
    assert rest["trained_tokens"] == whole.finished.trained_tokens
    merged = whole.finished.folder.name == "model"
    for file in (
        "model.safetensors" if merged else "adapter_model.safetensors",
        "native/adapter.safetensors",
    ):
        assert (Path(rest["folder"]) / file).read_bytes() == (whole.finished.folder / file).read_bytes()
    timed = {"seconds", "tokens_per_second", "peak_memory_bytes"}
    for metric in whole.finished.metrics.keys() - timed:
        assert rest["metrics"][metric] == whole.finished.metrics[metric]


def test_dropout_makes_these_runs_depend_on_the_random_state(unbroken) -> None:
    """Else the cases with dropout would prove nothing."""
    for method in ("olora", "lora"):
        assert unbroken[method].steps[-1] != unbroken[f"{method} with dropout"].steps[-1]


def test_noise_and_early_stopping_do_something_in_these_runs(unbroken) -> None:
    assert unbroken["olora"].steps[-1] != unbroken["olora with noise"].steps[-1]
    stopped = unbroken["olora stopping early"].finished
    assert stopped.steps == 5  # the first evaluation, and four that are not 9 nats lower


def test_every_checkpoint_of_a_run_with_every_option_leads_to_the_same_end(
    base_folders, files, tmp_path
) -> None:
    adapter = {"dropout": 0.2, "rslora": True, "lora_plus_ratio": 4}
    options = {"neftune_alpha": 5, "label_smoothing": 0.1, "weight_decay": 0.1, "schedule": "cosine"}
    stopping = {"eval_steps": 2, "early_stopping_patience": 9, "samples": 1, "max_grad_norm": 0.5}
    spec = spec_for("olora", adapter=adapter, learning_rate=0.02, **options, **stopping)
    base = load_base(base_folders["llama"], name="tiny")
    steps, kept = [], []
    for update in train(spec, base, *files, tmp_path / "whole", checkpoint_seconds=0.0):
        if isinstance(update, Step):
            steps.append((update.step, update.loss, update.grad_norm))
        elif isinstance(update, Saved):
            kept.append(update.folder.rename(tmp_path / f"kept-{update.step}"))
    whole = update
    assert isinstance(whole, Finished)
    assert len(kept) == 6
    for step, checkpoint in enumerate(kept, 1):
        rest = list(train(spec, base, *files, tmp_path / f"rest-{step}", resume=checkpoint))
        assert [(p.step, p.loss, p.grad_norm) for p in rest if isinstance(p, Step)] == steps[step:]
        assert rest[-1].metrics["exported_step"] == whole.metrics["exported_step"]
        for file in ("adapter_model.safetensors", "native/adapter.safetensors"):
            assert (rest[-1].folder / file).read_bytes() == (whole.folder / file).read_bytes()


def test_a_finished_run_resumes_to_its_export(unbroken, base_folders, files, tmp_path) -> None:
    whole = unbroken["olora"]
    base = load_base(base_folders["llama"], name="tiny")
    last = next((whole.finished.folder.parent / "checkpoints").glob("step-00000006"))
    updates = list(train(whole.spec, base, *files, tmp_path / "run", resume=last))
    assert not [p for p in updates if isinstance(p, Step | Evaluated)]
    adapter = updates[-1].folder / "adapter_model.safetensors"
    assert adapter.read_bytes() == (whole.finished.folder / "adapter_model.safetensors").read_bytes()


def test_a_checkpoint_requested_at_an_epochs_end_still_gets_its_evaluation(
    base_folders, files, tmp_path
) -> None:
    base = load_base(base_folders["llama"], name="tiny")
    progress = train(spec_for(), base, *files, tmp_path / "run")
    update = next(p for p in progress if isinstance(p, Step) and p.step == 3)
    saved = progress.send("save")
    progress.close()
    rest = train(spec_for(), base, *files, tmp_path / "run", resume=saved.folder)
    assert next(p for p in rest if isinstance(p, Evaluated)).step == update.step
    rest.close()


def test_the_checkpoints_thread_count_rules_and_the_own_one_returns(unbroken, base_folders, files, tmp_path):
    base = load_base(base_folders["llama"], name="tiny")
    torch.set_num_threads(2)
    try:
        checkpoint = unbroken["olora"].checkpoints[2]
        progress = train(unbroken["olora"].spec, base, *files, tmp_path / "run", resume=checkpoint)
        next(p for p in progress if isinstance(p, Step))
        assert torch.get_num_threads() == 1
        progress.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
