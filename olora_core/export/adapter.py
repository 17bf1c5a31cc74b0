"""A trained adapter as a folder that any LoRA loader can load: plain LoRA for the unchanged base."""

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..bases.loading import Base
from ..bases.sites import ends_in, unadapted
from ..errors import SpecError
from ..layers.adapter import Adapter, LowRank, bare_modules, is_linear, is_stored_transposed, site_shape
from ..specs.serving import server_rank
from .card import certificate_section, model_card
from .manifest import (
    CARD,
    MANIFEST,
    Export,
    RunRecord,
    copy_tokenizer,
    manifest,
    on_disk,
    save_native,
    write_json,
    write_text,
)

TENSORS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
KEY_PREFIX = "base_model.model."
SERVED_TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers that servers fuse into one; if one of them is adapted, the others are written as zeros."""


def export_adapter(base: Base, adapters: Mapping[str, Adapter], folder: Path, record: RunRecord) -> Export:
    """Writes the adapter's folder: exact, or truncated to the spec's `export_rank`.

    `folder` must not exist; it appears complete or not at all. `base.model` may have the adapters attached.
    """
    pairs, energy_kept = exported_pairs(adapters, record.resolved.adapter.export_rank)
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
    write_json(aside / CONFIG, adapter_config(base.reference, rank, endings, transposed))
    copy_tokenizer(base.folder, aside)
    facts = {
        "kind": "adapter",
        "rank": export.rank,
        "target_modules": export.target_modules,
        "left_out": unadapted(base.model),
        "energy_kept": export.energy_kept,
        "max_lora_rank": server_rank(export.rank),
    }
    write_json(aside / MANIFEST, manifest(base, record, facts))
    (aside / CARD).write_text(model_card(base, export, record), encoding="utf-8")
    aside.rename(folder)
    return export


def record_certificate(folder: Path, certificate: Mapping[str, Any]) -> None:
    """Adds the certificate to an exported folder's manifest and model card."""
    recorded = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    write_json(folder / MANIFEST, recorded | {"certificate": dict(certificate)})
    card = (folder / CARD).read_text(encoding="utf-8")
    write_text(folder / CARD, card.rstrip("\n") + "\n\n" + certificate_section(certificate))


# --- the pairs ---------------------------------------------------------------------------------------------


def exact_pairs(adapters: Mapping[str, Adapter]) -> dict[str, LowRank]:
    """`pair()` of every adapter, out×k and k×in, fp32 on the CPU. Raises SpecError for methods without."""
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
    """The pairs as they are written, and the share of ‖ΔW‖² (Frobenius, over all layers) that they keep."""
    pairs = exact_pairs(adapters)
    if export_rank is None:
        return pairs, 1.0
    results = {name: truncated(pair, export_rank) for name, pair in pairs.items()}
    kept = sum(kept for _, kept, _ in results.values())
    total = sum(total for _, _, total in results.values())
    return {name: pair for name, (pair, _, _) in results.items()}, kept / total if total else 1.0


def truncated(pair: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """The pair of at most that rank nearest to ΔW = B A, its squared Frobenius norm, and ‖ΔW‖².

    By Eckart and Young, the truncated SVD of ΔW. With B = Q_B R_B and Aᵀ = Q_A R_A it follows from the SVD of
    the k×k core R_B R_Aᵀ in fp64, so that no out×in matrix is formed. Both factors get √S, to be of similar
    size.
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
    """‖B A‖² (Frobenius) = ⟨BᵀB, A Aᵀ⟩, which takes k×k matrices only."""
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
    """Every linear layer of the base by its path, whether adapters are attached or not."""
    return {name: module for name, module in bare_modules(model) if is_linear(module)}


def _target_modules(model: nn.Module, layers: Mapping[str, nn.Module], names: Iterable[str]) -> list[str]:
    """The shortest path endings that select the adapted layers, those fused with them, and no others.

    Another layer would need a pair of zeros, which servers refuse where they cannot adapt it, as in a vision
    tower. Only a layer whose path ends in an adapted layer's path cannot be told from it.
    """
    wanted = list(names)
    for name in list(wanted):
        parent, _, last = name.rpartition(".")
        for group in SERVED_TOGETHER:
            if last in group:
                wanted += [p for p in (f"{parent}.{other}" for other in group) if p in layers]
    modules = {name for name, _ in bare_modules(model)}
    unwanted, not_linear = modules - set(wanted), modules - layers.keys()
    endings: dict[str, None] = {}
    for name in wanted:
        parts = name.split(".")
        tails = [".".join(parts[i:]) for i in range(len(parts) - 1, -1, -1)]
        exact = (t for t in tails if not any(ends_in(other, t) for other in unwanted))
        possible = (t for t in tails if not any(ends_in(other, t) for other in not_linear))
        endings[next(exact, None) or next(possible)] = None
    return list(endings)


def _covered(layers: Mapping[str, nn.Module], endings: Sequence[str]) -> Iterable[tuple[str, nn.Module]]:
    """The layers that a loader selects by these endings; each needs a pair in the file."""
    for name, layer in layers.items():
        if any(ends_in(name, ending) for ending in endings):
            yield name, layer


# --- the files ---------------------------------------------------------------------------------------------


def _named(pairs: Mapping[str, LowRank]) -> dict[str, Tensor]:
    tensors = {}
    for name, pair in pairs.items():
        tensors[f"{KEY_PREFIX}{name}.lora_A.weight"] = pair.A
        tensors[f"{KEY_PREFIX}{name}.lora_B.weight"] = pair.B
    return on_disk(tensors)


def adapter_config(base_name: str, rank: int, target_modules: list[str], transposed: bool) -> dict[str, Any]:
    """adapter_config.json with only the keys that every loader accepts. All scale is in B, so alpha = r."""
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
