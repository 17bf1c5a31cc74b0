"""The model card (README.md) of an exported adapter, and its parts that merged models share."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..bases.loading import Base
from ..bases.sites import unadapted
from ..errors import shortened
from ..progress import Samples
from ..specs.serving import server_rank
from .manifest import Export, RunRecord


def model_card(base: Base, export: Export, record: RunRecord) -> str:
    """README.md of an adapter: what it is, how to load it, how it was trained."""
    adapter = record.resolved.adapter
    truncated_to = (
        f"\nTruncated to rank {export.rank}: {export.energy_kept:.2%} of the update's energy is kept.\n"
        if export.energy_kept < 1
        else ""
    )
    return f"""\
---
base_model: {json.dumps(base.reference)}
library_name: peft
pipeline_tag: text-generation
tags:
- lora
- {adapter.method}
---

# Adapter for {base.name}

Trained with {adapter.method} ({adapter.paper}): {adapter.summary}

This is a plain LoRA of rank {export.rank} for the unchanged base model, with all scale in B.
{truncated_to}{dequantised_sentence(base)}{_quantised_sentence(base)}
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

{how_it_was_trained(base, record, export.target_modules)}"""


def how_it_was_trained(base: Base, record: RunRecord, adapted: Sequence[str]) -> str:
    """The part of the card that adapters and merged models share."""
    adapter, training = record.resolved.adapter, record.resolved.hyperparameters
    return f"""\
## How it was trained

| | |
|---|---|
| method | {adapter.method}, rank {adapter.rank}, alpha {adapter.alpha:g} |
| adapted layers | {", ".join(adapted)} |
| epochs | {training.n_epochs} |
| batch size | {training.batch_size} |
| learning rate | {_number(training.learning_rate)}, {training.schedule} schedule |
| seed | {record.resolved.seed} |
{_former_row(record)}{_held_out_row(record.held_out)}{_unadapted_row(base)}{_metric_rows(record.metrics)}
{_loss_curve(record.losses)}
`manifest.json` holds every setting, the hashes of data and base, and the certificate. `native/` holds the
method's own tensors.
{_samples_section(record.samples)}"""


def _samples_section(samples: Samples | None) -> str:
    """Sample answers of both models, indented as code, which no text can break out of."""
    if samples is None:
        return ""
    rows = "held-out rows" if samples.held_out else "rows"
    parts = [f"\n## What it answers\n\nGreedy decoding, on {rows} of the {samples.file} file.\n"]
    for row in samples.rows:
        parts.append(f"\n### Line {row['line']}\n")
        given = {"prompt": row["prompt"], "in the file": row["reference"]}
        for name, text in (given | {"the base": row["base"], "tuned": row["tuned"]}).items():
            lines = "\n".join(f"    {line}" for line in text.splitlines())
            parts.append(f"\n{name}:\n\n{lines or '    (nothing)'}\n")
    return "".join(parts)


def _former_row(record: RunRecord) -> str:
    """The model that was trained on, whose adapters are part of this one."""
    if record.former is None:
        return ""
    earlier = [f"{link.spec.method}, rank {link.spec.rank}" for link in record.links[:-1]]
    beside = f"; beside it, frozen: {'; '.join(earlier)}" if earlier else ""
    return f"| trained on from | an adapter, SHA-256 `{record.former}`{beside} |\n"


def _held_out_row(held_out: Mapping[str, Any] | None) -> str:
    if held_out is None:
        return ""
    by = "" if held_out["group_by"] is None else f", grouped by {json.dumps(held_out['group_by'])}"
    return (
        f"| validation | {held_out['examples']} of {held_out['of']} examples of the training file, held out: "
        f"share {held_out['share']:g}, seed {held_out['seed']}{by} |\n"
    )


def dequantised_sentence(base: Base) -> str:
    """Which GGUF file the base was dequantised from, and how to make it again; nothing for other bases."""
    if (provenance := base.provenance) is None or provenance.kind != "gguf":
        return ""
    package = f" of the package {provenance.package}" if provenance.package else ""
    return (
        f"\nThe base is the model in `{provenance.file}`{package} (SHA-256 `{provenance.sha256}`), "
        f"dequantised from\n{provenance.quantisation} by `olora models add`. Its weights differ from the "
        "model that the file was made from.\n"
    )


def _quantised_sentence(base: Base) -> str:
    if (quantised := base.quantised) is None:
        return ""
    where = (
        "its own checkpoint is quantised"
        if quantised.from_files
        else "load it with the `quantization_config` in `manifest.json` for the same results"
    )
    how = f"{quantised.kind}, {quantised.package}"
    return f"\nThe base was quantised during training ({how}): {where}.\n"


def _difference(value: float) -> str:
    return f"{value:.1e}" if value else "exactly 0"


def _number(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _unadapted_row(base: Base) -> str:
    """The matrices without an adapter, so that nobody believes a base with experts is fully adapted."""
    kinds = unadapted(base.model)
    named = [f"{len(names)} {kind} ({shortened(names)})" for kind, names in kinds.items()]
    return f"| not adapted | {'; '.join(named)} |\n" if named else ""


def _metric_rows(metrics: Mapping[str, Any]) -> str:
    rows = [f"| {name} | {_number(value)} |" for name, value in metrics.items() if value is not None]
    return "".join(f"{row}\n" for row in rows)


def _loss_curve(losses: Sequence[tuple[int, float]], points: int = 10) -> str:
    """A sparkline of the training loss, and a table of up to `points` means."""
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
    """Values as block characters; a series longer than `width` is averaged to at most that length."""
    size = -(-len(values) // width)
    means = [sum(values[i : i + size]) / len(values[i : i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    blocks = "▁▂▃▄▅▆▇█"
    return "".join(blocks[round((v - low) / (high - low) * 7) if high > low else 0] for v in means)


def certificate_section(certificate: Mapping[str, Any]) -> str:
    """The card's section on the certificate."""
    exported = "Merged weights" if "as_written" in certificate else "Adapter"
    largest, bound = certificate["max_abs_logit_diff"], certificate["bound"]
    section = (
        "## Certificate\n\n"
        f"{exported} verified: largest logit difference {_difference(largest)} (allowed {bound:.1e}), over\n"
        f"{certificate['rows']} rows and {certificate['tokens']} tokens, in fp32.\n"
    )
    if (rounded := certificate.get("as_written")) is not None:
        section += (
            f"\nAs stored, in {rounded['dtype']}: largest logit difference "
            f"{_number(rounded['max_abs_logit_diff'])}, "
            f"top-1 agreement {_number(rounded['top1_agreement'])}.\n"
        )
    if (whole := certificate.get("on_full_precision")) is not None:
        section += (
            "\nOn the base before quantisation: largest logit difference "
            f"{_number(whole['max_abs_logit_diff'])}, top-1 agreement {_number(whole['top1_agreement'])},\n"
            f"loss per token {_number(whole['loss'])} (trained model: {_number(whole['trained_loss'])}).\n"
        )
    return section
