"""One family's trial: what holds for its tiny model, from loading to the adapter in PEFT.

A trial runs in a process of its own (see `trials`), since a family may crash or never end.
"""

import json
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import unadapted
from olora_core.errors import OloraError
from olora_core.export.adapter import CONFIG, KEY_PREFIX, TENSORS, adapter_config
from olora_core.export.certificate import served
from olora_core.layers.adapter import LowRank, site_shape
from olora_core.progress import Finished, Resolved, Step
from olora_core.training.train import train
from tests.core.runs import spec_for
from tests.families.configs import tiny_config
from tests.rows import chat, write_rows
from tests.tiny_base import save_base

RANK, STEPS = 2, 2
ROWS = [chat("ab" * (1 + i), "xyz" * (1 + i % 3)) for i in range(4)]
LOSS_TOLERANCE = 1e-5
LOGIT_TOLERANCE = 2e-5
"""Of the largest logit: fp32's rounding in two orders of the same sums."""


class Broken(Exception):
    """A promise that the family does not keep; the argument says which, and by how much."""


def tried(kind: str, folder: Path) -> dict[str, Any]:
    """The facts about a family: {"outcome": "trained", …}, or "refused", with the reason.

    Raises Broken for a promise that does not hold; any other error is one of the builder's or of ours.
    """
    torch.manual_seed(0)
    config = tiny_config(kind)
    model = AutoModelForCausalLM.from_config(config).eval()
    save_base(folder / "base", model)
    config.save_pretrained(folder / "base")  # the whole config, of which some families take the text's
    try:
        base = load_base(folder / "base", name=kind, dtype=torch.float32)
        return {"outcome": "trained", **_trained(base, folder)}
    except OloraError as refused:
        return {"outcome": "refused", "reason": refused.message}


def _trained(base: Base, folder: Path) -> dict[str, Any]:
    data, rows = write_rows(folder / "rows.jsonl", ROWS), masked_rows(base.tokenizer)
    expected = first_loss(base, rows)
    spec = spec_for("olora", adapter={"rank": RANK, "alpha": RANK}, n_epochs=STEPS, learning_rate=1e-2)
    facts: dict[str, Any] = {}
    tokens = [ids for ids, _ in rows]
    for said in train(spec, base, data, None, folder / "run"):
        if isinstance(said, Resolved):
            facts["packing"] = base.passes.packing if said.spec.hyperparameters.packing else None
            facts["adapted"] = endings(said.targets)
        elif isinstance(said, Step) and said.step == 1:
            _check_close("the first loss", said.loss, expected, LOSS_TOLERANCE)
        elif isinstance(said, Finished):
            trained = logits(base.model, tokens)
            _check_peft(base, said.folder, tokens, trained)
            _check_left_out(base, folder, tokens)
    facts["left_out"] = {why: endings(paths) for why, paths in unadapted(base.model).items()}
    return facts


def endings(paths: Iterable[str]) -> list[str]:
    """The distinct last components of paths; of a tensor, with its layer's."""
    return list(dict.fromkeys(path.removesuffix(".weight").rpartition(".")[2] for path in paths))


# --- the independent numbers -------------------------------------------------------------------------------


def masked_rows(tokenizer: PreTrainedTokenizerBase) -> list[tuple[Tensor, Tensor]]:
    """(1, length) ids of each row, and which of them are trained, (length,): by transformers' own marks."""
    rows = []
    for row in ROWS:
        marked = tokenizer.apply_chat_template(
            row["messages"], return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = marked["input_ids"], marked["assistant_masks"]
        rows.append((torch.tensor([ids]), torch.tensor(mask, dtype=torch.bool)))
    return rows


@torch.no_grad()
def first_loss(base: Base, rows: list[tuple[Tensor, Tensor]]) -> float:
    """Cross-entropy of the trained tokens by a fresh, unadapted model, each row alone, in float64."""
    model = fresh(base)
    total, count = 0.0, 0
    for ids, trained in rows:
        log_p = F.log_softmax(model(ids, use_cache=False).logits[0, :-1].double(), dim=-1)
        wanted = ids[0, 1:]
        total -= float(log_p[torch.arange(len(wanted)), wanted][trained[1:]].sum())
        count += int(trained[1:].sum())
    return total / count


def fresh(base: Base) -> nn.Module:
    """The base as transformers loads it, in fp32."""
    # By itself, older transformers leaves out the caps of attention that only eager attention has.
    own = base.model.config._attn_implementation
    how = {"attn_implementation": own} if own == "eager" else {}
    return AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32, **how).eval()


@torch.no_grad()
def logits(model: nn.Module, rows: list[Tensor]) -> list[Tensor]:
    return [model(ids, use_cache=False).logits for ids in rows]


# --- PEFT --------------------------------------------------------------------------------------------------


def _check_peft(base: Base, adapter: Path, rows: list[Tensor], trained: list[Tensor]) -> None:
    model = fresh(base)
    untrained = logits(model, rows)
    try:
        theirs = logits(PeftModel.from_pretrained(model, str(adapter)).eval(), rows)
    except Exception as error:
        raise Broken(f"PEFT does not load the adapter: {type(error).__name__}: {error}") from error
    scale = max(float(each.abs().max()) for each in trained)
    gap = max(float((a - b).abs().max()) for a, b in zip(theirs, trained, strict=True))
    moved = max(float((a - b).abs().max()) for a, b in zip(untrained, trained, strict=True))
    if not gap <= LOGIT_TOLERANCE * scale:
        raise Broken(f"in PEFT the logits differ by {gap:.3g} of {scale:.3g}")
    if not moved > 10 * LOGIT_TOLERANCE * scale:
        raise Broken(f"two steps changed the logits by {moved:.3g} of {scale:.3g} only")


def _check_left_out(base: Base, folder: Path, rows: list[Tensor]) -> None:
    """Layers that are left out because PEFT would not load them: one of each name, with random factors."""
    paths = {path.rpartition(".")[2]: path for path in unadapted(base.model).get("layers", [])}
    for path in paths.values():
        model = fresh(base)
        out_features, in_features = site_shape(model.get_submodule(path))
        A, B = torch.randn(RANK, in_features), torch.randn(out_features, RANK)
        tensors = {f"{KEY_PREFIX}{path}.lora_A.weight": A, f"{KEY_PREFIX}{path}.lora_B.weight": B}
        save_file(tensors, folder / TENSORS)
        config = adapter_config(base.name, RANK, [path], transposed=False)
        (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")
        with served(model, {path: LowRank(B, A)}):
            expected = logits(model, rows)
        try:
            theirs = logits(PeftModel.from_pretrained(model, str(folder)).eval(), rows)
        except (ValueError, RuntimeError, KeyError):
            continue
        if all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(theirs, expected, strict=True)):
            raise Broken(f"PEFT loads an adapter of {path}, which is left out")


def _check_close(what: str, got: float, expected: float, tolerance: float) -> None:
    if not abs(got - expected) <= tolerance * abs(expected):
        raise Broken(f"{what} is {got:.7g}, and should be {expected:.7g}")


def write_facts(kind: str, folder: Path, path: Path) -> None:
    """Writes the facts about a family as JSON, also if it fails."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    try:
        facts = tried(kind, folder)
    except Exception as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        facts = {"outcome": "failed", "reason": reason}
    path.write_text(json.dumps(facts), encoding="utf-8")
