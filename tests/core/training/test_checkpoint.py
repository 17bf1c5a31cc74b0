"""Checkpoints: complete or absent, verified to the last byte, and bound to one run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_core.errors import CheckpointError
from olora_core.progress import Saved, Step
from olora_core.training.checkpoint import Snapshot, load, load_optimizer_state, optimizer_state, save
from olora_core.training.train import train

from ..runs import chat_rows, spec_for, write_rows

IDENTITY = {"spec": "s", "training data": "t"}


def snapshot() -> Snapshot:
    state = {"step": 3, "rate": 0.1 + 0.2, "history": [[1, 2.5]]}
    tensors = {
        "adapter": {"a.B": torch.arange(6.0).view(2, 3).T, "a.A": torch.tensor([1e-40])},
        "optimizer": {"0.step": torch.tensor(3.0)},
    }
    return Snapshot(dict(IDENTITY), state, tensors)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoints" / "step-00000003", snapshot())


def test_a_checkpoint_comes_back_as_it_was(saved: Path) -> None:
    back = load(saved, IDENTITY)
    assert back.state == snapshot().state
    assert back.tensors.keys() == {"adapter", "optimizer"}
    for file, tensors in snapshot().tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(back.tensors[file][name], tensor)


def test_it_is_safetensors_and_json_and_nothing_is_left_beside_it(saved: Path) -> None:
    assert {path.suffix for path in saved.iterdir()} == {".safetensors", ".json"}
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_saving_again_replaces_it(saved: Path) -> None:
    other = snapshot()
    other.state["step"] = 4
    save(saved, other)
    assert load(saved, IDENTITY).state["step"] == 4


def test_what_an_interrupted_save_left_is_no_hindrance(saved: Path) -> None:
    part = saved.with_name(f".{saved.name}.part")
    part.mkdir()
    (part / "state.json").write_text("{")
    save(saved, snapshot())
    assert not part.exists()


@pytest.mark.parametrize("name", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
def test_one_changed_byte_is_found(saved: Path, name: str) -> None:
    data = bytearray((saved / name).read_bytes())
    data[-1] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(CheckpointError, match=f"damaged: {name}"):
        load(saved, IDENTITY)


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json", "manifest.json"])
def test_a_missing_file_is_found(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        load(saved, IDENTITY)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}'])
def test_a_manifest_that_says_nothing_is_refused(saved: Path, text: str) -> None:
    (saved / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError):
        load(saved, IDENTITY)


def test_a_folder_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="missing"):
        load(tmp_path / "step-00000009", IDENTITY)


@pytest.mark.parametrize("key", [*IDENTITY, "base model"])
def test_a_checkpoint_of_another_run_is_refused_and_says_why(saved: Path, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"its {key} is"):
        load(saved, {**IDENTITY, key: "other"})


def test_a_number_that_is_no_json_is_never_written(tmp_path: Path) -> None:
    bad = snapshot()
    bad.state["loss"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path / "step", bad)
    assert not (tmp_path / "step").exists()


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"amsgrad": True}])
def test_an_optimizer_goes_on_where_it_stopped(options: dict[str, Any]) -> None:
    def make() -> tuple[torch.nn.Parameter, torch.optim.Optimizer]:
        torch.manual_seed(0)
        parameter = torch.nn.Parameter(torch.randn(4))
        group = {"params": [parameter], "lr_factor": 0.25, "lr_by": "job"}
        return parameter, torch.optim.AdamW([group], lr=0.1, **options)

    def step(parameter: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
        parameter.grad = parameter.detach().sin()
        optimizer.step()

    unbroken, its_optimizer = make()
    for _ in range(3):
        step(unbroken, its_optimizer)
    tensors, rest = optimizer_state(its_optimizer)
    written = {name: tensor.clone() for name, tensor in tensors.items()}
    resumed, fresh = make()
    resumed.data.copy_(unbroken.data)
    load_optimizer_state(fresh, written, json.loads(json.dumps(rest)))
    assert fresh.param_groups[0]["lr_factor"] == 0.25
    assert fresh.param_groups[0]["betas"] == its_optimizer.param_groups[0]["betas"]
    step(unbroken, its_optimizer)
    step(resumed, fresh)
    assert torch.equal(unbroken, resumed)


def test_an_optimizer_that_forgot_a_tensor_still_comes_back() -> None:
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones(2)
    optimizer.step()
    del optimizer.state[parameters[0]]  # as a restart does
    tensors, rest = optimizer_state(optimizer)
    fresh = torch.optim.AdamW(parameters)
    load_optimizer_state(fresh, tensors, rest)
    assert parameters[0] not in fresh.state
    assert torch.equal(fresh.state[parameters[1]]["exp_avg"], optimizer.state[parameters[1]]["exp_avg"])


def checkpoint_of(base: Any, training: Path, folder: Path, spec: Any) -> Path:
    for progress in train(spec, base, training, None, folder, checkpoint_seconds=0.0):
        if isinstance(progress, Saved):
            return progress.folder
    raise AssertionError


def test_other_data_another_spec_and_another_base_are_refused(llama, tied_llama, tmp_path) -> None:
    rows = chat_rows()
    training = write_rows(tmp_path / "rows.jsonl", rows)
    folder = checkpoint_of(llama, training, tmp_path / "run", spec_for())
    other_rows = write_rows(tmp_path / "other.jsonl", [*rows[1:], rows[0]])
    for why, spec, base, data in (
        ("training data", spec_for(), llama, other_rows),
        ("spec", spec_for(seed=6), llama, training),
        ("spec", spec_for(learning_rate=1e-4), llama, training),
        ("base model", spec_for(), tied_llama, training),
    ):
        resumed = train(spec, base, data, None, tmp_path / "again", resume=folder)
        with pytest.raises(CheckpointError, match=f"its {why} is"):
            list(resumed)


def test_a_damaged_checkpoint_stops_the_run_before_a_step(llama, tmp_path) -> None:
    training = write_rows(tmp_path / "rows.jsonl", chat_rows())
    folder = checkpoint_of(llama, training, tmp_path / "run", spec_for())
    (folder / "optimizer.safetensors").write_bytes(b"")
    updates = []
    with pytest.raises(CheckpointError, match="optimizer"):
        updates.extend(train(spec_for(), llama, training, None, tmp_path / "again", resume=folder))
    assert not [p for p in updates if isinstance(p, Step)]
