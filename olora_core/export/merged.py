"""The whole trained model in a folder that any library can load: the base with the update merged in.

The base in memory is not changed: its files are read again, into main memory, in their own dtype.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ..bases.loading import Base, load_base, no_progress_bar
from ..bases.sites import unadapted
from ..errors import SpecError
from ..layers import quantisation
from ..layers.adapter import Adapter, Site, bare_modules, full_precision, site_weight
from ..specs import TrainSpec
from .card import dequantised_sentence, how_it_was_trained
from .manifest import CARD, MANIFEST, RunRecord, copy_tokenizer, manifest, save_native, write_json


@dataclass(frozen=True)
class Merged:
    """An exported model."""

    folder: Path
    dtype: str
    rounding_loss: float
    """‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖ over all adapted layers (Frobenius); 0 in fp32, or if ΔW is 0."""


def check_mergeable(spec: TrainSpec, base: Base, sites: Sequence[Site]) -> None:
    """Raises SpecError, before training, if merged weights are asked for and cannot be written."""
    if spec.adapter.export != "merged":
        return
    if base.quantised is not None and base.quantised.from_files:
        raise SpecError(
            f"adapter.export = 'merged': base model '{base.name}' is quantised in its files, so there are "
            "no full-precision weights to merge into; use adapter.export = 'adapter', or train on the "
            "checkpoint before quantisation and set hyperparameters.quantization.",
            param="adapter.export",
        )
    weights = [(name, module._parameters.get("weight")) for name, module in base.model.named_modules()]
    for site in sites:
        mine = base.model.get_submodule(site.name).weight
        if shared := [name for name, weight in weights if weight is mine and name != site.name]:
            raise SpecError(
                f"adapter.export = 'merged': layer '{site.name}' shares its weight with '{shared[0]}', which "
                "the merged update would change as well; leave it out of adapter.target_modules, or use "
                "adapter.export = 'adapter'.",
                param="adapter.export",
            )


def export_merged(base: Base, adapters: Mapping[str, Adapter], folder: Path, record: RunRecord) -> Merged:
    """Writes the whole model. The adapters must be in eval mode.

    `folder` must not exist; it appears complete or not at all.
    """
    model = load_base(base.folder, name=base.name).model
    merged = Merged(folder, str(model.dtype).removeprefix("torch."), merge(base, adapters, model))

    aside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    with no_progress_bar():
        model.save_pretrained(aside)
    save_native(adapters, aside)
    copy_tokenizer(base.folder, aside)
    facts = {
        "kind": "merged",
        "dtype": merged.dtype,
        "rounding_loss": merged.rounding_loss,
        "dequantized": base.quantised is not None,
        "adapted_layers": list(adapters),
        "left_out": unadapted(base.model),
    }
    write_json(aside / MANIFEST, manifest(base, record, facts))
    (aside / CARD).write_text(model_card(base, adapters, merged, record), encoding="utf-8")
    aside.rename(folder)
    return merged


@torch.no_grad()
def merge(base: Base, adapters: Mapping[str, Adapter], model: PreTrainedModel) -> float:
    """Merges the adapters into `model`, freshly loaded from the base's files. Returns `rounding_loss`.

    W + ΔW (out×in) is computed in fp32 and rounded once, to the dtype of the files. A layer that is quantised
    in the base gets the dequantised W, because that is the W it was trained with.
    """
    quantised = {
        name: layer
        for name, layer in bare_modules(base.model)
        if quantisation.kind_of(layer) in quantisation.PACKAGES
    }
    changed = lost = 0.0
    for name in {**quantised, **adapters}:
        stored = site_weight(model.get_submodule(name))
        whole = (site_weight(quantised[name]) if name in quantised else stored).float().cpu()
        if name in adapters:
            with full_precision():
                change = adapters[name].delta_weight().cpu()
            whole = whole + change
            changed += float(change.double().square().sum())
            lost += float((whole.to(stored.dtype).double() - whole.double()).square().sum())
        stored.copy_(whole)
    return (lost / changed) ** 0.5 if changed else 0.0


def model_card(base: Base, adapters: Mapping[str, Adapter], merged: Merged, record: RunRecord) -> str:
    """README.md: what this is, how to load it, how it was trained."""
    adapter = record.resolved.adapter
    endings = list(dict.fromkeys(path.rpartition(".")[2] for path in adapters))
    return f"""\
---
base_model: {json.dumps(base.reference)}
library_name: transformers
pipeline_tag: text-generation
tags:
- {adapter.method}
---

# {base.name}, fine-tuned

Trained with {adapter.method} ({adapter.paper}): {adapter.summary}

This is the whole model: the update is merged into the weights of {base.name}.

The weights are stored in {merged.dtype}. W + ΔW was computed in fp32 and rounded once. Rounding lost
{merged.rounding_loss:.2%} of the update (‖round(W + ΔW) − (W + ΔW)‖ / ‖ΔW‖).
{dequantised_sentence(base)}{_quantised_sentence(base)}
## How to load it

`MODEL` is this folder.

transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(MODEL)
```

vLLM:

```
vllm serve MODEL
```

llama.cpp:

```
python convert_hf_to_gguf.py MODEL
```

{how_it_was_trained(base, record, endings)}"""


def _quantised_sentence(base: Base) -> str:
    if (quantised := base.quantised) is None:
        return ""
    how = f"{quantised.kind}, {quantised.package}"
    return (
        f"\nThe base was quantised during training ({how}). Its quantised layers are stored here\n"
        "dequantised, not as in the base's files.\n"
    )
