"""The rest of an exported folder, besides the weights: manifest, the method's own tensors, tokenizer."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter
from safetensors.torch import save_file
from torch import Tensor

from ..bases.loading import Base
from ..layers.adapter import Adapter, adapter_tensors
from ..progress import Samples
from ..specs import AdapterSpec, TrainSpec
from ..specs.adapters import AnyAdapterSpec

MANIFEST = "manifest.json"
CARD = "README.md"
NATIVE = "native/adapter.safetensors"
TOKENIZER_PARTS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *("spiece.model", "chat_template*"),
)
"""Copied from the base unchanged: saved again by a newer library, an older server might not read them."""
PACKAGES = ("olora", "torch", "transformers", "safetensors")


@dataclass(frozen=True)
class Link:
    """One of the adapters that an exported one is the sum of: what its tensors in `native/` belong to."""

    spec: AdapterSpec
    seed: int
    total_steps: int

    def as_json(self) -> dict[str, Any]:
        return {
            "adapter": self.spec.model_dump(mode="json"),
            "seed": self.seed,
            "total_steps": self.total_steps,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Link":
        spec: AdapterSpec = TypeAdapter(AnyAdapterSpec).validate_python(values["adapter"])
        return cls(spec, int(values["seed"]), int(values["total_steps"]))


@dataclass(frozen=True)
class RunRecord:
    """What the manifest and the model card say about the run."""

    asked: TrainSpec
    resolved: TrainSpec
    data: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 of each data file, by role: `training`, `validation`."""
    metrics: Mapping[str, Any] = field(default_factory=dict)
    losses: Sequence[tuple[int, float]] = ()
    """(step, training loss), for the curve."""
    samples: Samples | None = None
    day: date | None = None
    """Today's date as the chat template wrote it; None if it writes none."""
    held_out: Mapping[str, Any] | None = None
    """JSON-able: the share of the training file that was the validation data, if there was one."""
    links: Sequence[Link] = ()
    """The adapters that the exported one is the sum of; those before the last are of earlier runs."""
    former: str | None = None
    """SHA-256 of the model that was trained on, if it was not a base."""

    def as_json(self) -> dict[str, Any]:
        """For a checkpoint, from which an adapter can be exported later."""
        return {
            "asked": self.asked.model_dump(mode="json"),
            "resolved": self.resolved.model_dump(mode="json"),
            "data": dict(self.data),
            "day": self.day and self.day.isoformat(),
            "held_out": self.held_out and dict(self.held_out),
            "links": [link.as_json() for link in self.links],
            "former": self.former,
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any], **measured: Any) -> "RunRecord":
        """The inverse; `measured` are the fields that `as_json` leaves out."""
        return cls(
            asked=TrainSpec.model_validate(values["asked"]),
            resolved=TrainSpec.model_validate(values["resolved"]),
            data=values["data"],
            day=date.fromisoformat(values["day"]) if values["day"] else None,
            held_out=values["held_out"],
            links=[Link.from_json(link) for link in values["links"]],
            former=values["former"],
            **measured,
        )


@dataclass(frozen=True)
class Export:
    """An exported adapter."""

    folder: Path
    rank: int
    target_modules: list[str]
    energy_kept: float
    """Share of ‖ΔW‖² (Frobenius, over all layers) in the files; 1 unless truncated."""


def save_native(adapters: Mapping[str, Adapter], folder: Path) -> None:
    """Writes the method's own tensors; see `adapter_tensors`."""
    (folder / NATIVE).parent.mkdir()
    save_file(on_disk(adapter_tensors(adapters)), folder / NATIVE, metadata={"format": "pt"})


def copy_tokenizer(base: Path, folder: Path) -> None:
    """Copies the base's tokenizer files."""
    for pattern in TOKENIZER_PARTS:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors needs them: on the CPU, contiguous, same shapes."""
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def manifest(base: Base, record: RunRecord, export: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest, JSON-able: where the files come from, and what they are (`export`)."""
    return {
        "base_model": {
            "name": base.name,
            "fingerprint": base.fingerprint,
            "quantization": _quantization(base),
            "provenance": _provenance(base),
        },
        "spec": {
            "asked": record.asked.model_dump(mode="json"),
            "resolved": record.resolved.model_dump(mode="json"),
        },
        "links": [link.as_json() for link in record.links],
        "trained_on_from": record.former,
        "data": _data(record),
        "chat_template_day": record.day and record.day.isoformat(),
        "export": dict(export),
        "metrics": dict(record.metrics),
        "samples": None if record.samples is None else asdict(record.samples),
        "versions": versions(),
    }


def _data(record: RunRecord) -> dict[str, Any]:
    """The data by role: a file's digest, or which share of the training file was held out."""
    described: dict[str, Any] = {role: {"sha256": digest} for role, digest in record.data.items()}
    if record.held_out is not None:
        described["validation"] = {"held_out": dict(record.held_out)}
    return described


def _quantization(base: Base) -> dict[str, Any] | None:
    """How the base was quantised during training; `config` is transformers' own."""
    if (quantised := base.quantised) is None:
        return None
    return {
        "kind": quantised.kind,
        "package": quantised.package,
        "in_files": quantised.from_files,
        "config": quantised.settings,
    }


def _provenance(base: Base) -> dict[str, Any] | None:
    """Where the base's folder comes from, without a path of this machine."""
    if (provenance := base.provenance) is None:
        return None
    private = {"source"} if provenance.kind != "hub" else set()
    return provenance.model_dump(mode="json", exclude=private, exclude_none=True)


def versions() -> dict[str, str]:
    """Versions of the installed PACKAGES."""
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
    """Writes a temporary file, then renames it, so that no reader sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
