"""Bases in 8 and 4 bits: loaded as transformers does, started from exactly, left alone, and smaller.

    python -m bench.gpu.quantised --device cpu --tiny

The kinds are NF4 and LLM.int8 (bitsandbytes), torchao's int8 and its fp8. One whose package is missing is
left out. The base's numbers are bf16 where they are not quantised.
"""

import gc
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from olora_core.bases.loading import load_base
from olora_core.layers.quantisation import PACKAGES, loading_config, quantised_layers, stored_tensors

from .memory import allocated
from .promises import FEW, logits_of, promises, tokens_of
from .report import Report, Task, main
from .runs import Parts, chat_rows, each, make_base, spec_for, write_rows

DTYPE = torch.bfloat16
KINDS = {"llama": list(PACKAGES), "gpt2": [kind for kind in PACKAGES if PACKAGES[kind] == "bitsandbytes"]}
"""By family; torchao quantises nn.Linear alone."""
MOST = {"nf4": 0.3, "int8": 0.55, "torchao-int8": 0.55, "torchao-fp8": 0.55}
"""A quantised layer's bytes over those in bf16: 4 or 8 bits of 16, and a little for scales and tables."""


def missing(package: str) -> str | None:
    """Why a package cannot be used here, as a sentence."""
    if find_spec(package) is None:
        return f"The package {package} is not installed."
    try:
        import_module(package)
    except Exception as error:  # whatever a native library meets
        return f"The package {package} cannot be imported ({type(error).__name__}: {error})."
    return None


def keeps_its_promises(report: Report, name: str, kind: str, folder: Path, task: Task, rows: Path) -> None:
    """What a base holds that is quantised while it is loaded, what it says, and whole runs on it."""
    device = task.device
    before = allocated(torch.device(device))
    base = load_base(folder, name="bench", device=device, dtype=DTYPE, quantization=kind)
    figures = {"gpu_bytes": allocated(base.device) - before, "numbers": base.model.num_parameters()}
    layers = [layer for _, layer in quantised_layers(base.model)]
    parts = (tensor for layer in layers for part, tensor in stored_tensors(layer).items() if part != "bias")
    share = sum(part.nbytes for part in parts) / sum(
        DTYPE.itemsize * layer.out_features * layer.in_features for layer in layers
    )
    report.check(f"{name}, weights", share <= MOST[kind], share_of_bf16=share, layers=len(layers), **figures)

    how = {"quantization_config": loading_config(kind, DTYPE), "device_map": {"": device}}
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPE, **how)
    theirs.train(kind == "nf4")  # in eval mode, bitsandbytes rewrites such weights on some CPUs
    with torch.no_grad():
        expected = theirs(tokens_of(base), use_cache=False).logits
    del theirs
    report.check(f"{name}, as transformers loads it", torch.equal(logits_of(base), expected))

    for method in FEW[:1] if task.tiny else FEW:
        spec = spec_for(method, base, batch_size=8, quantization=kind)
        promises(report, f"{method} on {name}", spec, base, rows)
    del base
    gc.collect()


def run(task: Task, report: Report) -> None:
    sizes = {"width": 256, "layers": 2} if task.tiny else {"width": 1024, "layers": 4, "heads": 8}
    rows = write_rows(task.scratch / "rows.jsonl", chat_rows(24 if task.tiny else 64))

    def parts() -> Parts:
        reasons = {package: missing(package) for package in dict.fromkeys(PACKAGES.values())}
        for family, kinds in KINDS.items():
            folder = make_base(task.scratch / family, family, DTYPE, task.device, **sizes)
            for kind in kinds:
                name = f"{kind} of {family}"
                if reason := reasons[PACKAGES[kind]]:
                    report.skip(name, reason)
                else:
                    yield name, keeps_its_promises, kind, folder, task, rows

    each(report, parts())


if __name__ == "__main__":
    main(run)
