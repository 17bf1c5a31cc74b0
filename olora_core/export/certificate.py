"""The certificate: the exported files on a freshly loaded base give the logits of the trained model.

Both are computed in fp32 on a copy of the base loaded again from its folder: 4 bytes per parameter while the
certificate is made, in addition to the base in memory; on the CPU if the device lacks that memory. fp32 and a
fresh copy, because bf16 rounding would hide a faulty export, and a changed base in memory would go unnoticed.

A quantised base is quantised again and must equal the one in memory. The logits are then compared with its
weights dequantised to fp32: a layer that also rounds its inputs, as LLM.int8 does, turns a difference in the
last bit into a whole quantisation step, and would hide small errors of the export.
"""

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..bases.loading import Base, load_base
from ..bases.sharding import own_part
from ..bases.sites import ends_in
from ..errors import CertificateError, ModelError
from ..layers import quantisation
from ..layers.adapter import (
    Adapter,
    LowRank,
    attach,
    bare_modules,
    detach,
    full_precision,
    is_linear,
    is_stored_transposed,
    site_shape,
    site_weight,
)
from .adapter import CONFIG, KEY_PREFIX, TENSORS, energy, exact_pairs, exported_pairs

BOUND = 1e-4
"""Largest logit difference allowed, relative to the largest |logit|: above the rounding of fp32, far below
the effect of a wrong factor."""


def certify(
    base: Base, adapters: Mapping[str, Adapter], folder: Path, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compares logits on `rows` (unpadded token ids, at least one row); returns the certificate, JSON-able.

    The certificate is about the files. If they were truncated on request, it is about the exact pairs in
    memory, and the files' figures are under "truncated".

    Raises CertificateError if the logits differ by more than the bound.
    """
    tokens = _tokens(rows)
    pristine = _pristine(base)
    _check_resident(base, pristine)
    trained = {name: copy.deepcopy(adapter).eval() for name, adapter in adapters.items()}
    files = read_pairs(folder, pristine)
    if missing := sorted(adapters.keys() - files.keys()):
        raise CertificateError(f"The exported files lack the trained layer {missing[0]}.")
    exact = exact_pairs(adapters)
    is_truncated = max(pair.rank for pair in files.values()) < max(pair.rank for pair in exact.values())
    candidates = {"gate": files, "bf16": _rounded(files)}
    if is_truncated:
        _check_truncated(adapters, files)
        candidates |= {"gate": exact, "truncated": files}
    figures = {}
    if base.quantised is not None:
        as_served = {"as_served": candidates["gate"]}
        figures |= _compared(pristine, trained, as_served, tokens)
        quantisation.dequantise(pristine, torch.device(_device(base)))
    logits: list[Tensor] = []
    keep = logits if _was_quantised_here(base) else None
    figures |= _compared(pristine, trained, candidates, tokens, keep=keep)
    certificate = _certificate(figures)
    if logits:
        del pristine
        certificate["on_full_precision"] = _on_full_precision(base, candidates["gate"], tokens, logits)
    return certificate


def certify_merged(
    base: Base, adapters: Mapping[str, Adapter], folder: Path, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """As `certify`, for a folder with the whole model.

    The certificate is about W + ΔW in fp32. The files must hold these weights, rounded once; their figures,
    computed in fp32, are under "as_written".
    """
    tokens = _tokens(rows)
    pristine = _pristine(base)
    _check_resident(base, pristine)
    if base.quantised is not None:
        quantisation.dequantise(pristine, torch.device(_device(base)))
    trained = {name: copy.deepcopy(adapter).eval() for name, adapter in adapters.items()}
    logits: list[Tensor] = []
    _compared(pristine, trained, {}, tokens, keep=logits)
    with full_precision(), torch.no_grad():
        for name, adapter in trained.items():
            site_weight(pristine.get_submodule(name)).add_(adapter.delta_weight())
    gate = _against(pristine, tokens, logits)
    try:
        files = load_base(folder, name=base.name).model
    except ModelError as error:
        raise CertificateError(f"The exported model cannot be read back: {error.message}") from None
    dtype = str(files.dtype).removeprefix("torch.")
    _check_rounded(files, pristine, max(torch.finfo(d).eps for d in (files.dtype, base.dtype)))
    del pristine
    as_written = _against(files.to(_device(base), torch.float32), tokens, logits)
    certificate = _certificate({"gate": gate, "as_written": as_written})
    certificate["as_written"]["dtype"] = dtype
    return certificate


def _tokens(rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """(1, length) int64 for each row that is not empty."""
    if not any(rows):
        raise CertificateError("There is no row to compare logits on.")
    return [torch.tensor([list(row)]) for row in rows if row]


def _pristine(base: Base) -> nn.Module:
    """The base loaded from its files: in fp32, or quantised as the one in memory, on the same device."""
    if base.quantised is None:
        device, dtype, kind = _device(base), torch.float32, "none"
    else:
        device, dtype = str(base.device), base.dtype
        kind = "none" if base.quantised.from_files else base.quantised.kind
    return load_base(base.folder, name=base.name, device=device, dtype=dtype, quantization=kind).model


def _was_quantised_here(base: Base) -> bool:
    """Whether the base's files hold the weights in full precision."""
    return base.quantised is not None and not base.quantised.from_files


def _compared(
    model: nn.Module,
    trained: Mapping[str, Adapter],
    candidates: Mapping[str, Mapping[str, LowRank]],
    tokens: Sequence[Tensor],
    keep: list[Tensor] | None = None,
) -> dict[str, "LogitComparison"]:
    """Compares each candidate's logits on `model` with those of the trained adapters, which `keep` collects.

    `tokens`: (1, length) each; `keep` gets (length, vocabulary) fp32 for each, on the CPU.
    """
    device = next(model.parameters()).device
    trained = {name: adapter.to(device) for name, adapter in trained.items()}
    candidates = {name: _on(device, pairs) for name, pairs in candidates.items()}
    comparisons = {name: LogitComparison() for name in candidates}
    with full_precision(), torch.no_grad():
        for row in tokens:
            attach(model, trained)
            expected = _logits(model, row)
            detach(model)
            for name, pairs in candidates.items():
                with served(model, pairs):
                    comparisons[name].add(expected, _logits(model, row))
            if keep is not None:
                keep.append(expected.cpu())
    return comparisons


def _against(model: nn.Module, tokens: Sequence[Tensor], expected: Sequence[Tensor]) -> "LogitComparison":
    """Compares the model's logits on `tokens`, (1, length) each, with `expected`, (length, vocabulary)."""
    comparison = LogitComparison()
    with full_precision(), torch.no_grad():
        for row, logits in zip(tokens, expected, strict=True):
            comparison.add(logits, _logits(model, row).cpu())
    return comparison


def _logits(model: nn.Module, row: Tensor) -> Tensor:
    """Logits of one row: (1, length) → (length, vocabulary), fp32."""
    return model(row.to(next(model.parameters()).device), use_cache=False).logits[0].float()


def _on_full_precision(
    base: Base, pairs: Mapping[str, LowRank], tokens: Sequence[Tensor], trained: Sequence[Tensor]
) -> dict[str, Any]:
    """The same adapter on the base before quantisation, in fp32: the logit difference from the trained model,
    and the loss of both, in nats per token over all but each row's first."""
    device = _device(base)
    whole = load_base(base.folder, name=base.name, device=device, dtype=torch.float32).model
    comparison, losses = LogitComparison(), torch.zeros(2, dtype=torch.float64)
    with full_precision(), torch.no_grad(), served(whole, _on(torch.device(device), pairs)):
        for row, expected in zip(tokens, trained, strict=True):
            got = _logits(whole, row).cpu()
            comparison.add(expected, got)
            for i, logits in enumerate((got, expected)):
                losses[i] += F.cross_entropy(logits[:-1], row[0, 1:], reduction="sum").double()
    predicted = sum(row.shape[1] - 1 for row in tokens)
    own, of_trained = (losses / predicted).tolist() if predicted else (math.nan, math.nan)
    return comparison.figures() | finite_or_none({"loss": own, "trained_loss": of_trained})


class LogitComparison:
    """Running statistics of the difference between two models' logits."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.largest_logit = 0.0
        self.total = 0.0
        self.numbers = 0
        self.same_top1 = 0
        self.tokens = 0
        self.rows = 0

    def add(self, expected: Tensor, got: Tensor) -> None:
        """Adds one row: both (tokens, vocabulary), fp32."""
        difference = (expected - got).abs()
        largest = float(difference.max())
        if largest > self.largest or not math.isfinite(largest):  # comparisons with NaN are False
            self.largest = largest
        self.largest_logit = max(self.largest_logit, float(expected.abs().max()))
        self.total += float(difference.double().sum())
        self.numbers += difference.numel()
        self.same_top1 += int((expected.argmax(-1) == got.argmax(-1)).sum())
        self.tokens += expected.shape[0]
        self.rows += 1

    def figures(self) -> dict[str, Any]:
        """JSON-able."""
        return finite_or_none(
            {
                "max_abs_logit_diff": self.largest,
                "mean_abs_logit_diff": self.total / self.numbers,
                "top1_agreement": self.same_top1 / self.tokens,
            }
        )


def finite_or_none(figures: Mapping[str, float]) -> dict[str, float | None]:
    """NaN and infinity, which JSON does not have, become None."""
    return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _certificate(comparisons: Mapping[str, LogitComparison]) -> dict[str, Any]:
    gate = comparisons["gate"]
    bound = BOUND * gate.largest_logit
    if not gate.largest <= bound:  # so that NaN fails too
        raise CertificateError(
            f"The exported adapter's logits are not those of the trained model: they differ by up to "
            f"{gate.largest:.3g}, and at most {bound:.3g} is allowed ({BOUND:g} of the largest logit, "
            f"{gate.largest_logit:.3g}). The adapter was not published; this is a bug in the service."
        )
    others = {name: each.figures() for name, each in comparisons.items() if name != "gate"}
    return {
        **gate.figures(),
        "max_abs_logit": gate.largest_logit,
        "bound": bound,
        "rows": gate.rows,
        "tokens": gate.tokens,
        **others,
        "passed": True,
    }


def read_pairs(folder: Path, model: nn.Module) -> dict[str, LowRank]:
    """The pairs as a loader reads them: layers selected by the config, B (out×r) scaled by alpha / r, A r×in.

    Raises CertificateError if the files cannot be loaded, or their config does not match their tensors.
    """
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / TENSORS)
        scale = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
        endings, transposed = config["target_modules"], config["fan_in_fan_out"]
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CertificateError(f"The exported adapter cannot be read back: {error!r}.") from None
    layers = {name: m for name, m in model.named_modules() if any(ends_in(name, e) for e in endings)}
    expected = {f"{KEY_PREFIX}{name}.lora_{AB}.weight" for name in layers for AB in "AB"}
    if difference := expected ^ tensors.keys():
        raise CertificateError(
            f"The exported files and their target_modules do not agree on {sorted(difference)[0]}."
        )
    if transposed != any(map(is_stored_transposed, layers.values())):
        raise CertificateError(f"{CONFIG} says fan_in_fan_out = {transposed}, the base says otherwise.")
    pairs = {}
    for name, layer in layers.items():
        A, B = (tensors[f"{KEY_PREFIX}{name}.lora_{AB}.weight"] for AB in "AB")
        out_features, in_features = site_shape(layer)
        if A.shape != (config["r"], in_features) or B.shape != (out_features, config["r"]):
            raise CertificateError(f"The exported factors of {name} have the wrong shape.")
        pairs[name] = LowRank(scale * B.float(), A.float())
    return pairs


@contextmanager
def served(model: nn.Module, pairs: Mapping[str, LowRank]) -> Iterator[None]:
    """Inside, each layer computes `W x + B (A x)`, the pair in fp32, by code independent of the adapters."""

    def add(B: Tensor, A: Tensor) -> Any:
        return lambda layer, inputs, output: output + ((inputs[0].float() @ A.T) @ B.T).to(output.dtype)

    hooks = [model.get_submodule(name).register_forward_hook(add(*pair)) for name, pair in pairs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_truncated(adapters: Mapping[str, Adapter], files: Mapping[str, LowRank]) -> None:
    """Raises CertificateError if a truncated file is not the truncation of the trained pairs."""
    rank = max(pair.rank for pair in files.values())
    expected, _ = exported_pairs(adapters, rank)
    for name, pair in files.items():
        want = expected.get(name, LowRank(pair.B[:, :0], pair.A[:0]))
        gap = LowRank(torch.cat([pair.B, -want.B], dim=1), torch.cat([pair.A, want.A]))
        if not energy(gap) <= 1e-8 * max(energy(want), 1e-30):
            raise CertificateError(f"The exported factors of {name} are not those that were trained.")


def _check_rounded(files: nn.Module, whole: nn.Module, eps: float) -> None:
    """Raises CertificateError unless `files` is `whole` rounded with relative error `eps`, but for the last
    bits of sums."""
    for path, module in whole.named_modules():
        for name, tensor in module.named_parameters(recurse=False):
            written = files.get_submodule(path)
            if name == "weight" and is_linear(module):
                want, got = site_weight(module), site_weight(written)
            else:
                want, got = tensor, written.get_parameter(name)
            slack = 1e-5 * float(want.abs().max())
            if not torch.allclose(got.to(want.device, want.dtype), want, rtol=eps, atol=slack):
                raise CertificateError(f"The exported {path}.{name} is not the one that was trained.")


def _check_resident(base: Base, pristine: nn.Module) -> None:
    """Raises CertificateError if the base in memory, which many jobs share, differs from its files."""
    for name, module in bare_modules(base.model):
        original = quantisation.stored_tensors(pristine.get_submodule(name))
        for kind, tensor in quantisation.stored_tensors(module).items():
            fresh, resident = own_part(original[kind], tensor)
            if not torch.equal(resident, fresh.to(resident.device, resident.dtype)):
                raise CertificateError(
                    f"{name}.{kind} of base model '{base.name}' in memory is not what its files hold: "
                    "one of the two has changed. Run the job again."
                )


def _device(base: Base) -> str:
    """The base's device if an fp32 copy fits there, otherwise the CPU."""
    if base.device.type != "cuda":
        return "cpu"
    torch.cuda.empty_cache()  # memory of an earlier copy
    free, _ = torch.cuda.mem_get_info(base.device)
    return str(base.device) if free > 5 * base.model.num_parameters() else "cpu"


def _on(device: torch.device, pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name: LowRank(pair.B.to(device), pair.A.to(device)) for name, pair in pairs.items()}


def _rounded(pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The factors as a server in bf16 stores them."""
    return {name: LowRank(*(factor.bfloat16().float() for factor in pair)) for name, pair in pairs.items()}
