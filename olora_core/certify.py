"""The exported files, applied to a pristine base as a server does it, against the trained model.

Both sides run in fp32 on a copy of the base that is loaded anew from its folder: 4 bytes a parameter for the
time of the certificate, beside whatever is resident. Where the device lacks that memory, the CPU does it.
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
from transformers.pytorch_utils import Conv1D

from .adapter import Adapter, LowRank, attach, bare_modules, detach, full_precision, site_weight
from .errors import CertificateError
from .export import CONFIG, KEY_PREFIX, TENSORS, energy, exact_pairs, exported_pairs
from .model import Base, ends_in, load_base

BOUND = 1e-4
"""The largest logit difference allowed, as a share of the largest |logit|."""


def certify(
    base: Base, adapters: Mapping[str, Adapter], folder: Path, rows: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """Compares logits on `rows` (token ids, unpadded, at least one) and returns the certificate.

    The files are the gate. When they were truncated on request, the exact pair is, taken from memory, and the
    files' own figures stand under "truncated".

    Raises CertificateError, with both figures, when the trained model's logits are not given.
    """
    if not any(rows):
        raise CertificateError("There is no row to compare logits on.")
    pristine = load_base(base.folder, name=base.name, device=_device(base), dtype=torch.float32)
    model, device = pristine.model, pristine.device
    _check_resident(base, model)
    trained = {name: copy.deepcopy(adapter).eval().to(device) for name, adapter in adapters.items()}
    files = read_pairs(folder, model)
    if forgotten := sorted(adapters.keys() - files.keys()):
        raise CertificateError(f"The exported files lack the trained layer {forgotten[0]}.")
    exact = exact_pairs(adapters)
    is_truncated = max(pair.rank for pair in files.values()) < max(pair.rank for pair in exact.values())
    candidates = {"gate": _on(device, files), "bf16": _on(device, _rounded(files))}
    if is_truncated:
        _check_truncated(adapters, files)
        candidates |= {"gate": _on(device, exact), "truncated": _on(device, files)}
    comparisons = {name: Comparison() for name in candidates}
    with full_precision(), torch.no_grad():
        for row in filter(None, rows):
            tokens = torch.tensor([list(row)], device=device)
            attach(model, trained)
            expected = model(tokens, use_cache=False).logits[0].float()
            detach(model)
            for name, pairs in candidates.items():
                with served(model, pairs):
                    comparisons[name].add(expected, model(tokens, use_cache=False).logits[0].float())
    return _certificate(comparisons)


class Comparison:
    """Running comparison of logits, (tokens, vocabulary) at a time."""

    def __init__(self) -> None:
        self.largest = 0.0
        self.largest_logit = 0.0
        self.total = 0.0
        self.numbers = 0
        self.same_top1 = 0
        self.tokens = 0
        self.rows = 0

    def add(self, expected: Tensor, got: Tensor) -> None:
        difference = (expected - got).abs()
        largest = float(difference.max())
        if largest > self.largest or not math.isfinite(largest):  # a NaN is never the larger one
            self.largest = largest
        self.largest_logit = max(self.largest_logit, float(expected.abs().max()))
        self.total += float(difference.double().sum())
        self.numbers += difference.numel()
        self.same_top1 += int((expected.argmax(-1) == got.argmax(-1)).sum())
        self.tokens += expected.shape[0]
        self.rows += 1

    def figures(self) -> dict[str, Any]:
        """JSON knows no NaN and no infinity: they become None."""
        figures = {
            "max_abs_logit_diff": self.largest,
            "mean_abs_logit_diff": self.total / self.numbers,
            "top1_agreement": self.same_top1 / self.tokens,
        }
        return {name: value if math.isfinite(value) else None for name, value in figures.items()}


def _certificate(comparisons: Mapping[str, Comparison]) -> dict[str, Any]:
    gate = comparisons["gate"]
    bound = BOUND * gate.largest_logit
    if not gate.largest <= bound:  # a NaN fails too
        raise CertificateError(
            f"The exported adapter does not give the trained model's logits: they differ by up to "
            f"{gate.largest:.3g}, and at most {bound:.3g} is allowed ({BOUND:g} of the largest logit, "
            f"{gate.largest_logit:.3g}). The adapter was not published; this is a fault of the service."
        )
    beside = {name: d.figures() for name, d in comparisons.items() if name != "gate"}
    return {
        **gate.figures(),
        "max_abs_logit": gate.largest_logit,
        "bound": bound,
        "rows": gate.rows,
        "tokens": gate.tokens,
        **beside,
        "passed": True,
    }


def read_pairs(folder: Path, model: nn.Module) -> dict[str, LowRank]:
    """The pairs as a loader takes them from the files: alpha / r folded into B, layers chosen by the config.

    Raises CertificateError when the files would not load, or load something else than what is in them.
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
    if transposed != any(isinstance(layer, Conv1D) for layer in layers.values()):
        raise CertificateError(f"{CONFIG} says fan_in_fan_out = {transposed}, the base says otherwise.")
    pairs = {}
    for name, layer in layers.items():
        A, B = (tensors[f"{KEY_PREFIX}{name}.lora_{AB}.weight"] for AB in "AB")
        out_features, in_features = site_weight(layer).shape
        if A.shape != (config["r"], in_features) or B.shape != (out_features, config["r"]):
            raise CertificateError(f"The exported factors of {name} have the wrong shape.")
        pairs[name] = LowRank(scale * B.float(), A.float())
    return pairs


@contextmanager
def served(model: nn.Module, pairs: Mapping[str, LowRank]) -> Iterator[None]:
    """Inside, each layer gives `W x + B (A x)`: plain arithmetic, nothing shared with the adapters' own."""

    def add(B: Tensor, A: Tensor) -> Any:
        return lambda layer, inputs, output: output + (inputs[0] @ A.T) @ B.T

    hooks = [model.get_submodule(name).register_forward_hook(add(*pair)) for name, pair in pairs.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _check_truncated(adapters: Mapping[str, Adapter], files: Mapping[str, LowRank]) -> None:
    """A truncated file is not the trained model, but it must be the truncation of it."""
    rank = max(pair.rank for pair in files.values())
    expected, _ = exported_pairs(adapters, rank)
    for name, pair in files.items():
        want = expected.get(name, LowRank(pair.B[:, :0], pair.A[:0]))
        gap = LowRank(torch.cat([pair.B, -want.B], dim=1), torch.cat([pair.A, want.A]))
        if not energy(gap) <= 1e-8 * max(energy(want), 1e-30):
            raise CertificateError(f"The exported factors of {name} are not those that were trained.")


def _check_resident(base: Base, pristine: nn.Module) -> None:
    """The base in memory serves job after job; it must still be what its files say."""
    for name, module in bare_modules(base.model):
        fresh = pristine.get_submodule(name)
        for kind, parameter in module.named_parameters(recurse=False):
            original = getattr(fresh, kind).to(parameter.device, parameter.dtype)
            if not torch.equal(parameter, original):
                raise CertificateError(
                    f"{name}.{kind} of base model '{base.name}' in memory is not what its files hold: "
                    "one of the two was changed. Start the job again."
                )


def _device(base: Base) -> str:
    """The base's own device where an fp32 copy fits, else the CPU."""
    if base.device.type != "cuda":
        return "cpu"
    free, _ = torch.cuda.mem_get_info(base.device)
    return str(base.device) if free > 5 * base.model.num_parameters() else "cpu"


def _on(device: torch.device, pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    return {name: LowRank(pair.B.to(device), pair.A.to(device)) for name, pair in pairs.items()}


def _rounded(pairs: Mapping[str, LowRank]) -> dict[str, LowRank]:
    """The factors as a server in bf16 holds them."""
    return {name: LowRank(*(factor.bfloat16().float() for factor in pair)) for name, pair in pairs.items()}
