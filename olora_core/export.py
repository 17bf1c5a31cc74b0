"""A trained adapter as a folder that everything can load: plain LoRA against the untouched base."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .adapter import (
    Adapter,
    LowRank,
    adapter_tensors,
    bare_modules,
    is_linear,
    is_stored_transposed,
    site_shape,
)
from .errors import SpecError
from .model import Base, ends_in, left_out, shortened
from .progress import Samples
from .specs import TrainSpec

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MANIFEST = "manifest.json"
CARD = "README.md"
NATIVE = "native/adapter.safetensors"
KEY_PREFIX = "base_model.model."
SERVER_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's `--max-lora-rank` takes."""
SERVED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers fuse into one: a partner without an adapter is written as zeros."""
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


def export_adapter(base: Base, adapters: Mapping[str, Adapter], folder: Path, story: Story) -> Export:
    """Writes the adapter's folder: exact, or truncated when the spec asks for an `export_rank`.

    `folder` must not exist; it appears complete or not at all. `base.model` may bear the adapters.
    """
    pairs, energy_kept = exported_pairs(adapters, story.resolved.adapter.export_rank)
    layers = _linear_layers(base.model)
    endings = _target_modules(base.model, layers, pairs)
    rank = max(1, *(pair.rank for pair in pairs.values()))
    filled = {name: pairs.get(name) or _zero_pair(layer) for name, layer in _covered(layers, endings)}
    padded = {name: _padded(pair, rank) for name, pair in filled.items()}
    transposed = any(is_stored_transposed(layers[name]) for name in filled)
    export = Export(folder, rank, endings, energy_kept)

    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    save_file(_named(padded), aside / TENSORS, metadata={"format": "pt"})
    save_native(adapters, aside)
    write_json(aside / CONFIG, adapter_config(base.name, rank, endings, transposed))
    copy_tokenizer(base.folder, aside)
    facts = {
        "kind": "adapter",
        "rank": export.rank,
        "target_modules": export.target_modules,
        "left_out": left_out(base.model),
        "energy_kept": export.energy_kept,
        "max_lora_rank": server_rank(export.rank),
    }
    write_json(aside / MANIFEST, manifest(base, story, facts))
    (aside / CARD).write_text(model_card(base, export, story), encoding="utf-8")
    aside.rename(folder)
    return export


def record_certificate(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Adds the certificate to the manifest and the model card of an exported folder."""
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_json(folder / MANIFEST, recorded | {"certificate": dict(certificate)})
    card = (folder / CARD).read_text(encoding="utf-8")
    _write(folder / CARD, card.rstrip("\n") + "\n\n" + _certificate_section(certificate))


def save_native(adapters: Mapping[str, Adapter], folder: Path) -> None:
    """The method's own tensors."""
    (folder / NATIVE).parent.mkdir()
    save_file(_on_disk(adapter_tensors(adapters)), folder / NATIVE, metadata={"format": "pt"})


def copy_tokenizer(base: Path, folder: Path) -> None:
    for pattern in TOKENIZER_PARTS:
        for path in sorted(base.glob(pattern)):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


# --- the pairs ---------------------------------------------------------------------------------------------


def exact_pairs(adapters: Mapping[str, Adapter]) -> dict[str, LowRank]:
    """`pair()` of every adapter, fp32 on the CPU. Raises SpecError for a method that has none."""
    pairs = {}
    for name, adapter in adapters.items():
        with torch.no_grad():
            pair = adapter.pair()
        if pair is None:
            raise SpecError(
                "This method has no low-rank form; export merged weights.", param="adapter.method"
            )
        pairs[name] = LowRank(pair.B.float().cpu(), pair.A.float().cpu())
    return pairs


def exported_pairs(
    adapters: Mapping[str, Adapter], export_rank: int | None
) -> tuple[dict[str, LowRank], float]:
    """The pairs as the files will hold them, and the share of ΔW's energy they keep."""
    pairs = exact_pairs(adapters)
    if export_rank is None:
        return pairs, 1.0
    results = {name: truncated(pair, export_rank) for name, pair in pairs.items()}
    kept = sum(kept for _, kept, _ in results.values())
    total = sum(total for _, _, total in results.values())
    return {name: pair for name, (pair, _, _) in results.items()}, kept / total if total else 1.0


def truncated(pair: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The best pair of at most that rank, ‖its ΔW‖² and ‖ΔW‖² (Frobenius).

    From two thin QRs and the SVD of a k×k core in fp64; no out×in matrix is formed. The singular values are
    shared evenly between both factors.
    """
    if pair.rank <= rank:
        whole = energy(pair)
        return pair, whole, whole
    QB, RB = torch.linalg.qr(pair.B.double())
    QA, RA = torch.linalg.qr(pair.A.double().T)
    U, S, Vt = torch.linalg.svd(RB @ RA.T)
    root = S[:rank].sqrt()
    best = LowRank((QB @ U[:, :rank] * root).float(), (root[:, None] * Vt[:rank] @ QA.T).float())
    return best, float((S[:rank] ** 2).sum()), float((S**2).sum())


def energy(pair: LowRank) -> float:
    """‖B A‖² = ⟨BᵀB, A Aᵀ⟩."""
    B, A = pair.B.double(), pair.A.double()
    return float(((B.T @ B) * (A @ A.T)).sum())


def _padded(pair: LowRank, rank: int) -> LowRank:
    missing = rank - pair.rank
    return LowRank(nn.functional.pad(pair.B, (0, missing)), nn.functional.pad(pair.A, (0, 0, 0, missing)))


def _zero_pair(layer: nn.Module) -> LowRank:
    out_features, in_features = site_shape(layer)
    return LowRank(torch.zeros(out_features, 0), torch.zeros(0, in_features))


# --- which layers are written ------------------------------------------------------------------------------


def _linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by its path in the bare model, whether adapters stand beside them or not."""
    return {name: module for name, module in bare_modules(model) if is_linear(module)}


def _target_modules(model: nn.Module, layers: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    """The shortest endings that select the adapted layers and their partners, and linear layers only."""
    wanted = list(names)
    for name in list(wanted):
        parent, _, last = name.rpartition(".")
        for group in SERVED_TOGETHER:
            if last in group:
                wanted += [p for p in (f"{parent}.{other}" for other in group) if p in layers]
    others = {name for name, _ in bare_modules(model)} - layers.keys()
    endings: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        tails = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        endings[next(t for t in tails if not any(ends_in(other, t) for other in others))] = None
    return list(endings)


def _covered(layers: Mapping[str, nn.Module], endings: Sequence[str]) -> Iterable[tuple[str, nn.Module]]:
    """Every layer that a loader will select: each needs a pair in the file."""
    for name, layer in layers.items():
        if any(ends_in(name, ending) for ending in endings):
            yield name, layer


# --- the files ---------------------------------------------------------------------------------------------


def _named(pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = pair.B
    return _on_disk(tensors)


def _on_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}


def adapter_config(base_name: str, rank: int, target_modules: list[str], transposed: bool) -> dict[str, Any]:
    """The keys that every loader accepts, and no more. All scale is in B, so alpha = r."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "r": rank,
        "lora_alpha": rank,
        "target_modules": target_modules,
        "bias": "none",
        "lora_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "use_rslora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


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


def server_rank(rank: int) -> int:
    """The smallest `--max-lora-rank` of vLLM that takes this adapter."""
    return next(allowed for allowed in SERVER_RANKS if allowed >= rank)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    _write(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    """Written aside first, so that a reader never sees half a file."""
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


# --- the model card ----------------------------------------------------------------------------------------


def model_card(base: Base, export: Export, story: Story) -> str:
    """README.md: what this is, how to load it, how it was trained."""
    adapter = story.resolved.adapter
    truncated_to = (
        f"\nTruncated to rank {export.rank}: {export.energy_kept:.2%} of the update's energy is kept.\n"
        if export.energy_kept < 1
        else ""
    )
    return f"""\
---
base_model: {json.dumps(base.name)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- {adapter.method}
---

# Adapter for {base.name}

Trained with {adapter.method} ({adapter.paper}): {adapter.summary}

What is stored here is a plain LoRA of rank {export.rank} for the untouched base model, with all scale in B.
{truncated_to}{_quantised_sentence(base)}
## How to load it

`BASE` is the base model ({base.name}), `ADAPTER` this folder.

PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), ADAPTER)
tokenizer = AutoTokenizer.from_pretrained(ADAPTER)
```

transformers, with peft installed:

```python
model = AutoModelForCausalLM.from_pretrained(BASE)
model.load_adapter(ADAPTER)
```

vLLM (its default accepts ranks up to 16; this adapter has {export.rank}):

```
vllm serve BASE --enable-lora --max-lora-rank {server_rank(export.rank)} --lora-modules adapter=ADAPTER
```

llama.cpp:

```
python convert_lora_to_gguf.py --base BASE ADAPTER
```

{how_it_was_trained(base, story, export.target_modules)}"""


def how_it_was_trained(base: Base, story: Story, adapted: Sequence[str]) -> str:
    """The part of the card that is the same for everything a run may leave."""
    adapter, training = story.resolved.adapter, story.resolved.hyperparameters
    return f"""\
## How it was trained

| | |
|---|---|
| method | {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g} |
| adapted layers | {", ".join(adapted)} |
| epochs | {training.n_epochs} |
| batch size | {training.batch_size} |
| learning rate | {_number(training.learning_rate)}, {training.schedule} schedule |
| seed | {story.resolved.seed} |
{_left_out_row(base)}{_metric_rows(story.metrics)}
{_loss_curve(story.losses)}
`manifest.json` holds every setting, the hashes of data and base, and the certificate. `native/` holds the
method's own tensors.
{_samples_section(story.samples)}"""


def _samples_section(samples: Samples | None) -> str:
    """What both models answer. Indented as code, which no text can break out of."""
    if samples is None:
        return ""
    parts = [f"\n## What it answers\n\nThe likeliest tokens, to rows of the {samples.file} file.\n"]
    for row in samples.rows:
        parts.append(f"\n### Line {row['line']}\n")
        said = {"prompt": row["prompt"], "in the file": row["reference"]}
        for name, text in (said | {"the base": row["base"], "tuned": row["tuned"]}).items():
            lines = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"\n{name}:\n\n{lines or '    (nothing)'}\n")
    return "".join(parts)


def _quantised_sentence(base: Base) -> str:
    if (quantised := base.quantised) is None:
        return ""
    where = (
        "as its own files are"
        if quantised.from_files
        else "load it with the `quantization_config` of `manifest.json` to get what was trained"
    )
    how = f"{quantised.kind}, {quantised.package}"
    return f"\nThe base was quantised while it was trained on ({how}): {where}.\n"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _left_out_row(base: Base) -> str:
    """What no adapter can change, so that nobody takes a base with experts for wholly adapted."""
    kinds = left_out(base.model)
    named = [f"{len(names)} {kind} ({shortened(names)})" for kind, names in kinds.items()]
    return f"| left out | {'; '.join(named)} |\n" if named else ""


def _metric_rows(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_number(value)} |" for name, value in metrics.items() if value is not None]
    return "".join(f"{row}\n" for row in rows)


def _loss_curve(losses: Sequence[tuple[int, float]], points: int = 10) -> str:
    """A line of blocks over the whole run, and a table of up to ten means."""
    if not losses:
        return ""
    size = -(-len(losses) // points)
    groups = [losses[i : i + size] for i in range(0, len(losses), size)]
    rows = [f"| {group[-1][0]} | {sum(loss for _, loss in group) / len(group):.4f} |\n" for group in groups]
    return (
        f"Training loss: `{sparkline([loss for _, loss in losses])}`\n\n"
        f"| up to step | mean loss |\n|---|---|\n{''.join(rows)}"
    )


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Values as blocks, low to high; a long series is averaged down to `width` of them."""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((v - low) / (high - low) * 7) if high > low else 0] for v in means)


def _certificate_section(certificate: Mapping[str, Any]) -> str:
    files = "merged weights in fp32" if "as_written" in certificate else "files on a pristine base"
    section = (
        "## Certificate\n\n"
        f"These {files} give the trained model's logits within {certificate['max_abs_logit_diff']:.2e}\n"
        f"(allowed: {certificate['bound']:.2e}; {certificate['rows']} rows, {certificate['tokens']} tokens, "
        "all in fp32).\n"
    )
    if (rounded := certificate.get("as_written")) is not None:
        section += (
            f"\nAs they are written, in {rounded['dtype']}, they give others, by up to "
            f"{_number(rounded['max_abs_logit_diff'])}; the likeliest token agrees for\n"
            f"{_number(rounded['top1_agreement'])} of all tokens.\n"
        )
    if (whole := certificate.get("on_full_precision")) is not None:
        section += (
            "\nOn the base as it was before it was quantised they give other logits, by up to "
            f"{_number(whole['max_abs_logit_diff'])}; the likeliest\ntoken agrees for "
            f"{_number(whole['top1_agreement'])} of all tokens, and the loss per token of the same rows is "
            f"{_number(whole['loss'])}\n(trained model: {_number(whole['trained_loss'])}).\n"
        )
    return section
