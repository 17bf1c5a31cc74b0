"""Checkpoints, complete enough that a resumed run gives the same bytes as one that never stopped.

A checkpoint is a folder of safetensors and JSON, never pickle. It is written under another name, flushed and
renamed. Its manifest, with the SHA-256 of every other file, is written last; without a valid one, the folder
is not a checkpoint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..errors import CheckpointError
from ..methods.base import Schedule

FORMAT = 1
MANIFEST, STATE = "manifest.json", "state.json"


@dataclass
class Snapshot:
    """Everything that resuming a run takes."""

    identity: dict[str, Any]
    """Spec, data, base and dtype of the run. Only a run with the same identity can be resumed from it."""
    state: dict[str, Any]
    """JSON: the position in the data, the numbers of method and optimizer, the measurements so far."""
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """By file name: `adapter`, `optimizer` and with early stopping `best`, the adapter to export."""


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint to `folder`, atomically, and returns the folder."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for name, tensors in snapshot.tensors.items():
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_cpu, part / f"{name}.safetensors")
    (part / STATE).write_text(_json(snapshot.state))
    files = {path.name: _digest(path) for path in sorted(part.iterdir())}
    manifest = {"format": FORMAT, "identity": snapshot.identity, "files": files}
    (part / MANIFEST).write_text(_json(manifest))
    for path in (*part.iterdir(), part):
        _flush(path)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    _flush(folder.parent)
    return folder


def load(folder: Path, identity: Mapping[str, Any]) -> Snapshot:
    """Reads a checkpoint after verifying the digest of every file.

    Raises CheckpointError when it is missing, damaged, or belongs to a run with another identity.
    """
    manifest = _read_json(folder / MANIFEST)
    if manifest.get("format") != FORMAT:
        raise CheckpointError(
            f"Checkpoint '{folder.name}' has format {manifest.get('format')!r}, and this version reads "
            f"format {FORMAT}; restart the run from the beginning."
        )
    for name, digest in manifest["files"].items():
        if not (folder / name).is_file():
            raise _damaged(folder, f"{name} is missing")
        if _digest(folder / name) != digest:
            raise _damaged(folder, f"{name} has changed since it was written")
    _check_identity(folder, manifest["identity"], identity)
    try:
        tensors = {
            Path(name).stem: load_file(folder / name)
            for name in manifest["files"]
            if name.endswith(".safetensors")
        }
    except SafetensorError as error:
        raise _damaged(folder, str(error)) from None
    return Snapshot(manifest["identity"], _read_json(folder / STATE), tensors)


def day_of(folder: Path | None) -> date | None:
    """The day that the run's chat template writes; None without a checkpoint, or if it writes none."""
    written = None if folder is None else _read_json(folder / STATE).get("day")
    return date.fromisoformat(written) if written else None


def learning_rate_of(folder: Path, schedule: Schedule, total_steps: int, factor: float) -> float | None:
    """The peak rate of the run that a checkpoint belongs to; `factor` is its learning_rate_multiplier.

    Checkpoints of earlier versions do not name it. There it is what the optimizer's rate at that step was
    scheduled from: a default of two digits, times the multiplier. None if the method has schedules of its
    own; the defaults of those methods are what they were.
    """
    state = _read_json(folder / STATE)
    if "learning_rate" in state:
        return float(state["learning_rate"])
    group = next(group for group in state["optimizer"]["param_groups"] if "lr_peak" not in group)
    if group["lr_by"] == "method" or group["lr_factor"] != 1:
        return None
    peak = group["lr"] / (schedule(state["step"], total_steps) * group["lr_multiplier"])
    return float(f"{peak / factor:.2g}") * factor


def _check_identity(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises CheckpointError, naming the first difference, unless keys and values are the same."""
    for key in wanted.keys() | found.keys():
        if found.get(key) != wanted.get(key):
            raise CheckpointError(
                f"Checkpoint '{folder.name}' belongs to another run: its {key} is {_short(found.get(key))}, "
                f"this run's is {_short(wanted.get(key))}. Resume with the same, or restart from the "
                "beginning."
            )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 24 else f"{text[:12]}…"


def _damaged(folder: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"Checkpoint '{folder.name}' is damaged: {what}. Resume from an earlier one, or restart the run from "
        "the beginning."
    )


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise _damaged(path.parent, f"{path.name} is missing") from None
    except (OSError, ValueError) as error:
        raise _damaged(path.parent, f"{path.name} cannot be read ({error})") from None
    if not isinstance(value, dict):
        raise _damaged(path.parent, f"{path.name} does not hold an object")
    return value


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the optimizer, flat -------------------------------------------------------------------------------


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state as tensors by `<parameter>.<name>`, and the rest as JSON.

    Moments have their parameter's shape, step counters are scalars.
    """
    whole = optimizer.state_dict()
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, dict[str, Any]] = {}
    for index, values in whole["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    return tensors, {"param_groups": whole["param_groups"], "numbers": numbers}


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]
) -> None:
    """The inverse of `optimizer_state`."""
    state: dict[int, dict[str, Any]] = {int(index): dict(v) for index, v in rest["numbers"].items()}
    for key, tensor in tensors.items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = tensor
    groups = [_with_tuples(group) for group in rest["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _with_tuples(group: Mapping[str, Any]) -> dict[str, Any]:
    """Turns AdamW's betas back into a tuple, which JSON made a list."""
    return {k: tuple(v) if isinstance(v, list) and k != "params" else v for k, v in group.items()}
