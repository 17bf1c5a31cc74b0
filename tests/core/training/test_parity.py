"""The claim: our runs are PEFT's, step by step, with the base left alone.

The reference is a plain torch loop around PEFT's model, which shares nothing with the core but the order of
the examples: its own tokenisation, transformers' own loss, AdamW, schedule and clipping.
"""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from olora_core.bases.loading import load_base
from olora_core.bases.sites import target_sites
from olora_core.data.batches import epoch_order
from olora_core.methods import METHODS
from olora_core.progress import Step
from olora_core.specs import TrainSpec, read_spec
from olora_core.training.train import train

from ..runs import chat_rows, write_rows

# PEFT reads a property that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS, BATCH, EXAMPLES = 50, 4, 26
SHIPPED = Path(__file__).parents[3] / "examples" / "base"
SETTINGS = {
    "tiny llama": {"rank": 8, "alpha": 16, "rate": 2e-3},
    "shipped base": {"rank": 16, "alpha": 16, "rate": 1e-3},
}


@pytest.fixture(params=SETTINGS)
def case(request, base_folders) -> tuple[Path, dict[str, Any]]:
    folder = SHIPPED if request.param == "shipped base" else base_folders["llama"]
    return folder, SETTINGS[request.param]


def spec_of(method: str, settings: dict[str, Any]) -> TrainSpec:
    return read_spec(
        model="base",
        hyperparameters={
            "n_epochs": 10,
            "max_steps": STEPS,
            "batch_size": BATCH,
            "micro_batch_size": 3,  # cuts the batch, as the reference does not
            "learning_rate": settings["rate"],
            "dtype": "float32",
        },
        adapter={"method": method, "rank": settings["rank"], "alpha": settings["alpha"]},
        seed=11,
    )


def our_steps(spec: TrainSpec, base_folder: Path, folder: Path) -> list[Step]:
    training = write_rows(folder / "training.jsonl", chat_rows(EXAMPLES))
    base = load_base(base_folder, name="base", dtype=torch.float32)
    progress = train(spec, base, training, None, folder / "run", checkpoint_seconds=3600)
    steps = []
    while len(steps) < STEPS:  # the export is not this file's business
        update = next(progress)
        steps += [update] if isinstance(update, Step) else []
    progress.close()
    return steps


def reference_losses(model: PeftModel, folder: Path, rate: float) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step of a plain loop over the same examples in the same order."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [masked(tokenizer, row["messages"]) for row in chat_rows(EXAMPLES)]
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(0.03 * STEPS), STEPS)
    model.train()
    results = []
    for epoch in range(10):
        order = epoch_order(EXAMPLES, seed=11, epoch=epoch).tolist()
        for start in range(0, EXAMPLES, BATCH):
            if len(results) == STEPS:
                return results
            loss = model(**padded([rows[i] for i in order[start : start + BATCH]])).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            results.append((loss.item(), norm.item()))
    return results


def masked(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Token ids and labels of one question and its answer, written out by hand."""
    question, answer = (message["content"] for message in messages)
    parts = [
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n",
        f"{answer}<|im_end|>",
        "\n",
    ]
    head, trained, tail = (tokenizer(part).input_ids for part in parts)
    return head + trained + tail, [-100] * len(head) + trained + [-100] * len(tail)


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in rows]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids, _ in rows]),
        "labels": torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in rows]),
    }


def peft_model(folder: Path, spec: TrainSpec, init: bool | str) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = LoraConfig(
        r=spec.adapter.rank,
        lora_alpha=spec.adapter.alpha,
        init_lora_weights=init,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def start_from_our_factors(model: PeftModel, folder: Path, spec: TrainSpec) -> None:
    """Gives PEFT's LoRA the factors that our method draws."""
    base = load_base(folder, name="base", dtype=torch.float32)
    method = METHODS["lora"](spec.adapter, seed=spec.seed, total_steps=STEPS, schedule=lambda i, n: 1.0)
    for site in target_sites(base.model, "auto"):
        adapter = method.adapter(base.model.get_submodule(site.name).weight, site)
        layer = model.base_model.model.get_submodule(site.name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.A)
            layer.lora_B["default"].weight.copy_(adapter.B)


def compare(ours: list[Step], theirs: list[tuple[float, float]]) -> None:
    assert len(ours) == len(theirs) == STEPS
    relative = [abs(o.loss - loss) / loss for o, (loss, _) in zip(ours, theirs, strict=True)]
    norms = [abs(o.grad_norm - norm) / norm for o, (_, norm) in zip(ours, theirs, strict=True)]
    assert max(relative) < 1e-4
    assert max(norms) < 1e-3
    assert theirs[-1][0] < 0.7 * theirs[0][0], "the comparison needs a run that learns"


def test_olora_trains_as_pefts_olora_does(case, tmp_path) -> None:
    folder, settings = case
    spec = spec_of("olora", settings)
    theirs = reference_losses(peft_model(folder, spec, "olora"), folder, settings["rate"])
    compare(our_steps(spec, folder, tmp_path), theirs)


def test_lora_trains_as_pefts_lora_does_from_the_same_factors(case, tmp_path) -> None:
    folder, settings = case
    spec = spec_of("lora", settings)
    model = peft_model(folder, spec, True)
    start_from_our_factors(model, folder, spec)
    theirs = reference_losses(model, folder, settings["rate"])
    compare(our_steps(spec, folder, tmp_path), theirs)


def test_the_reference_masks_as_the_template_marks(case) -> None:
    """The hand-written masks of this file are the template's own."""
    tokenizer = AutoTokenizer.from_pretrained(case[0])
    for row in json.loads(json.dumps(chat_rows(3))):
        ids, labels = masked(tokenizer, row["messages"])
        marked = tokenizer.apply_chat_template(row["messages"], return_assistant_tokens_mask=True)
        assert marked["input_ids"] == ids
        assert [label != -100 for label in labels] == [bool(mark) for mark in marked["assistant_masks"]]
