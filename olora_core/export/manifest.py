"""What an exported folder holds beside its weights: manifest, the method's own tensors, tokenizer."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..bases.loading import Base
from ..layers.adapter import Adapter, adapter_tensors
from ..progress import Samples
from ..specs import TrainSpec

MANIFEST = "manifest.json"
CARD = "README.md"
NATIVE = "native/adapter.safetensors"
TOKENIZER_PARTS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("spiece.model", "chat_template*"),
)
"""The base's own files go along as they are: a newer library writes what an older server cannot read."""
PACKAGES = ("olora", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Story:
    """What the manifest and the model card tell beside the tensors."""

    asked: TrainSpec
    resolved: TrainSpec
    data: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each data file by its role: `training`, `validation`."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()
    """(step, training loss), for the curve."""
    samples: Samples | None = None


@dataclass(frozen=True)
class Export:
    """What was written."""

    folder: Path
    rank: int
    target_modules: list[str]
    energy_kept: float
    """Share of the squared Frobenius norm of all ΔW that the files hold; 1 unless truncated."""


def save_native(adapters: Mapping[str, Adapter], folder: Path) -> None:
    """The method's own tensors."""
    (folder / NATIVE).parent.mkdir()
    save_file(on_disk(adapter_tensors(adapters)), folder / NATIVE, metadata={"format": "pt"})


def copy_tokenizer(base: Path, folder: Path) -> None:
    for pattern in TOKENIZER_PARTS:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def manifest(base: Base, story: Story, export: Mapping[str, Any]) -> dict[str, Any]:
    """Where the files come from; `export` says what they are."""
    return {
        "base_model": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "quantization": _quantization(base),
        },
        "spec": {
            "asked": story.asked.model_dump(mode="json"),
            "resolved": story.resolved.model_dump(mode="json"),
        },
        "data": {role: {"sha256": digest} for role, digest in story.data.items()},
        "export": dict(export),
        "metrics": dict(story.metrics),
        "samples": None if story.samples is None else asdict(story.samples),
        "versions": versions(),
    }


def _quantization(base: Base) -> dict[str, Any] | None:
    """How the base held its weights while it was trained on; `config` is transformers' own."""
    if (quantised := base.quantised) is None:
        return None
    return {
        "kind": quantised.kind,
        "package": quantised.package,
        "in_files": quantised.from_files,
        "config": quantised.settings,
    }


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a checkout that was not installed
            continue
    # With its build ("+cu130"), which the package's metadata leaves out.
    return found | {"torch": torch.__version__}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Written aside first, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
