"""What every method promises of a run: on `nn.Linear` and on Conv1D, in bf16 and in fp32.

    python -m bench.gpu.promises --device cpu --tiny

A run starts at the base bit for bit, learns, leaves the base as it was and exports what it trained. Resumed
from a checkpoint it ends with the same bits, where torch is asked for kernels that allow it. Its losses are
those of PEFT's adapters in a plain loop, and DPO's first one is ln 2. The models are small and random.
"""

import math
import os
import shutil
import time
from collections.abc import Iterable
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, get_linear_schedule_with_warmup

from olora_core.bases.loading import Base, load_base
from olora_core.bases.passes import evaluating
from olora_core.bases.sites import target_sites
from olora_core.data.batches import epoch_order
from olora_core.layers.adapter import adapters_off, attached, full_precision
from olora_core.layers.quantisation import stored_tensors
from olora_core.methods import METHODS
from olora_core.progress import Finished, Resolved, Saved, Step
from olora_core.specs import TrainSpec
from olora_core.training.train import train

from .report import Report, Task, main
from .runs import RANK, SEED, Parts, chat_rows, each, make_base, spec_for, write_rows

FEW = ("olora", "lora")
"""The methods that stand for all where time is short."""
NEVER = 86_400.0
JUDGED, LEARNS_BY = 8, 0.02
"""Training rows that a run is judged by, and the nats per token that it must have learned."""
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-4, 1e-3
"""Relative, between two loops in fp32: sums of a few hundred terms differ by some 1e-6, each step hands that
on, and AdamW makes whole steps of gradients that are no larger."""
LN_2 = math.log(2)
ULP = float(np.spacing(np.float32(LN_2)))


# --- a run from end to end -----------------------------------------------------------------------------


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all that a model without adapters holds, quantised weights in their parts."""
    return {
        f"{path}.{name}": tensor.detach().clone()
        for path, module in model.named_modules()
        for name, tensor in (*stored_tensors(module).items(), *module.named_buffers(recurse=False))
    }


def equal(ones: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return ones.keys() == others.keys() and all(torch.equal(ones[name], others[name]) for name in ones)


def tokens_of(base: Base) -> Tensor:
    """(3, 24) token ids, always the same."""
    tokens = torch.randint(3, len(base.tokenizer), (3, 24), generator=torch.Generator().manual_seed(1))
    return tokens.to(base.device)


@torch.no_grad()
def logits_of(base: Base) -> Tensor:
    """(3, 24, vocabulary)"""
    with evaluating(base.model):
        return base.model(tokens_of(base), use_cache=False).logits


@torch.no_grad()
def loss_of(base: Base) -> float:
    """Nats per trained token of the first training rows, by transformers' own loss."""
    batch = padded(base, [row["messages"] for row in chat_rows(JUDGED)])
    with evaluating(base.model):
        return float(base.model(**batch, use_cache=False).loss)


def promises(report: Report, name: str, spec: TrainSpec, base: Base, training: Path, **figures: Any) -> None:
    """A whole run, and which of its promises it kept."""
    began, losses, folder = time.monotonic(), [], training.parent / "run"
    bare, before, loss_before = logits_of(base), tensors_of(base.model), loss_of(base)
    for update in train(spec, base, training, None, folder, cache=training.parent / "cache"):
        if isinstance(update, Resolved):
            starts = torch.equal(logits_of(base), bare)
        elif isinstance(update, Step):
            losses.append(update.loss)
        elif isinstance(update, Finished):
            certificate, loss_after = update.certificate, loss_of(base)
            with adapters_off(base.model):
                turns_off = torch.equal(logits_of(base), bare)
    kept = {
        "starts_as_base": starts,
        "learns": loss_after < loss_before - LEARNS_BY,
        "turns_off": turns_off,
        "base_unchanged": equal(tensors_of(base.model), before),
        "certified": certificate["passed"] is True,
    }
    broken = {promise: False for promise, value in kept.items() if not value}
    figures |= {"loss_before": loss_before, "loss_after": loss_after, "losses": losses}
    figures["share_of_certificate_bound"] = certificate["max_abs_logit_diff"] / certificate["bound"]
    report.check(name, not broken, **broken, **figures, seconds=time.monotonic() - began)
    shutil.rmtree(folder)


# --- interrupted and resumed ---------------------------------------------------------------------------


def trained(
    spec: TrainSpec, base: Base, training: Path, *, count: int | None = None, resume: Path | None = None
) -> tuple[list[Step], dict[str, Tensor], Path | None]:
    """The steps of a run that is left after the last, or `count` of them, before any export; its adapters
    then, and the checkpoint it made in the middle.
    """
    steps: list[Step] = []
    folder, checkpoint, stop_request = training.parent / "left", None, None
    cache = training.parent / "cache"
    if resume is None:
        shutil.rmtree(folder, ignore_errors=True)  # a run keeps its newest two checkpoints, by their steps
    run = train(spec, base, training, None, folder, resume=resume, checkpoint_seconds=NEVER, cache=cache)
    while not steps or steps[-1].step < (count or steps[-1].total_steps):
        update, stop_request = run.send(stop_request), None
        if isinstance(update, Step):
            steps.append(update)
            stop_request = "save" if update.step == update.total_steps // 2 else None
        elif isinstance(update, Saved):
            checkpoint = update.folder
    adapters = enumerate(layer.adapter.state_dict() for layer in attached(base.model))
    tensors = {f"{i}.{name}": tensor.clone() for i, held in adapters for name, tensor in held.items()}
    run.close()
    return steps, tensors, checkpoint


def resumes(report: Report, name: str, spec: TrainSpec, base: Base, training: Path, exactly: bool) -> None:
    """A run, and the same resumed from its middle: the same bits, or how far apart they are."""
    torch.use_deterministic_algorithms(exactly)
    try:
        whole, expected, checkpoint = trained(spec, base, training)
        rest, got, _ = trained(spec, base, training, resume=checkpoint)
    finally:
        torch.use_deterministic_algorithms(False)
    pairs = list(zip(whole[-len(rest) :], rest, strict=True))
    apart = ((expected[key] - got[key]).abs() for key in expected if expected[key].numel())
    figures = {"loss_difference": max(abs(a.loss - b.loss) for a, b in pairs)}
    figures["norm_difference"] = max(abs(a.grad_norm - b.grad_norm) for a, b in pairs)
    figures["tensor_difference"] = max(float(difference.max()) for difference in apart)
    if not exactly:
        report.figures(f"{name}, any kernels", **figures)
        return
    report.check(name, equal(expected, got) and not any(figures.values()), steps=len(rest), **figures)


# --- against PEFT, and DPO's start ---------------------------------------------------------------------


def matches_peft(report: Report, name: str, method: str, base: Base, folder: Path, steps: int) -> None:
    """Our losses and gradient norms in fp32 against those of a plain loop over the same examples.

    The two share nothing but the order of the examples, and for LoRA the random factors.
    """
    settings = {"n_epochs": 10, "max_steps": steps, "batch_size": 4, "learning_rate": 2e-3}
    spec, rows = spec_for(method, base, **settings), chat_rows(26)
    training = write_rows(folder / "parity.jsonl", rows)
    with full_precision():
        theirs = plain_loop(peft_model(base, spec), base, rows, spec)
        ours, _, _ = trained(spec, base, training)
    pairs = list(zip(ours, theirs, strict=True))
    losses = [abs(step.loss - loss) / loss for step, (loss, _) in pairs]
    norms = [abs(step.grad_norm - norm) / norm for step, (_, norm) in pairs]
    passed = max(losses) < LOSS_TOLERANCE and max(norms) < NORM_TOLERANCE
    figures = {"largest": max(losses), "largest_of_norm": max(norms), "differences": losses}
    report.check(name, passed, losses=[loss for loss, _ in theirs], **figures)


def peft_model(base: Base, spec: TrainSpec) -> PeftModel:
    """PEFT's OLoRA, or its LoRA with the factors that our method draws; made on the CPU."""
    method = METHODS[spec.adapter.method](spec.adapter, seed=SEED, total_steps=1, schedule=lambda i, n: 1.0)
    sites = target_sites(base.model, "auto")
    start, names = "olora" if spec.adapter.method == "olora" else True, [site.name for site in sites]
    config = LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights=start, target_modules=names)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32), config)
    for site in sites if spec.adapter.method == "lora" else ():
        layer = model.base_model.model.get_submodule(site.name)
        layer.lora_A["default"].weight.data.copy_(method.adapter(torch.empty(0), site).A.detach())
    return model.to(base.device)


def plain_loop(
    model: PeftModel, base: Base, rows: list[dict[str, Any]], spec: TrainSpec
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step: transformers' own loss, AdamW, schedule and clipping."""
    steps, batch = spec.hyperparameters.max_steps, spec.hyperparameters.batch_size
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=spec.hyperparameters.learning_rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(0.03 * steps), steps)
    model.train()
    results: list[tuple[float, float]] = []
    orders = (epoch_order(len(rows), seed=SEED, epoch=epoch).tolist() for epoch in range(10))
    batches = (order[start : start + batch] for order in orders for start in range(0, len(rows), batch))
    while len(results) < steps:
        loss = model(**padded(base, [rows[i]["messages"] for i in next(batches)])).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        results.append((loss.item(), norm.item()))
    return results


def padded(base: Base, conversations: list[list[dict[str, str]]]) -> dict[str, Tensor]:
    """A batch as transformers' own template tokenises and marks it, padded on the right."""
    template = base.tokenizer.apply_chat_template
    told = [template(row, return_assistant_tokens_mask=True) for row in conversations]
    ids = [torch.tensor(row["input_ids"]) for row in told]
    labels = [
        torch.where(torch.tensor(row["assistant_masks"]) == 1, i, -100)
        for row, i in zip(told, ids, strict=True)
    ]
    batch = {
        "input_ids": pad_sequence(ids, batch_first=True),
        "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
    }
    return {name: tensor.to(base.device) for name, tensor in batch.items()}


def dpo_starts_at_ln_2(report: Report, name: str, methods: Iterable[str], base: Base, folder: Path) -> None:
    """DPO's first loss, in units of fp32 away from ln 2; one of them is the logarithm's own rounding."""
    pairs = (
        {"input": {"messages": row[:1]}, "preferred_output": row[1:], "non_preferred_output": other[1:]}
        for row, other in pairwise(row["messages"] for row in chat_rows(9))
    )
    training, apart = write_rows(folder / "pairs.jsonl", pairs), {}
    for method in methods:
        spec = spec_for(method, base, type="dpo", n_epochs=4, batch_size=8)
        (first,), _, _ = trained(spec, base, training, count=1)
        apart[method] = (first.loss - LN_2) / ULP
    far = {method: units for method, units in apart.items() if not abs(units) <= 1}
    report.check(name, not far, methods=len(apart), worst=max(map(abs, apart.values())), **far)


# --- the section ---------------------------------------------------------------------------------------


def run(task: Task, report: Report) -> None:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for `resumes`; read when CUDA starts
    sizes = {"width": 32, "layers": 1} if task.tiny else {"width": 256, "layers": 4}
    steps, batch = (4, 4) if task.tiny else (20, 8)
    training = write_rows(task.scratch / "training.jsonl", chat_rows(steps * batch))
    bases: dict[str, Base] = {}
    for dtype in (torch.bfloat16, torch.float32):
        for family in ("llama", "gpt2"):
            name = f"{family} in {str(dtype).removeprefix('torch.')}"
            with report.attempt(name):
                folder = make_base(task.scratch / name, family, dtype, task.device, **sizes)
                bases[name] = load_base(folder, name="bench", device=task.device, dtype=dtype)
                report.figures(name, packing=bases[name].passes.packing)
    llamas = {name: base for name, base in bases.items() if name.startswith("llama")}

    def whole_runs(on: dict[str, Base]) -> Parts:
        for name, base in on.items():
            for method in METHODS if not task.tiny or name == "llama in float32" else FEW:
                spec = spec_for(method, base, batch_size=batch)
                yield f"{method} on {name}", promises, spec, base, training

    def peft_and_dpo() -> Parts:
        for method in FEW if "llama in float32" in bases else ():
            yield f"{method} as PEFT's", matches_peft, method, bases["llama in float32"], task.scratch, steps
        for name, base in bases.items():
            methods = FEW if task.tiny or base not in llamas.values() else METHODS
            yield f"DPO starts at ln 2 on {name}", dpo_starts_at_ln_2, methods, base, task.scratch

    def resumed(exactly: bool, on: dict[str, Base]) -> Parts:
        for name, base in on.items():
            every = exactly and name == ("llama in float32" if task.tiny else "llama in bfloat16")
            for method in METHODS if every else FEW:
                spec = spec_for(method, base, batch_size=batch, max_steps=steps if task.tiny else steps // 2)
                yield f"resuming {method} on {name}", resumes, spec, base, training, exactly

    gpt2s = {name: base for name, base in bases.items() if name not in llamas}
    resuming = chain(resumed(True, llamas if task.tiny else bases), resumed(False, llamas))
    each(report, chain(whole_runs(llamas), peft_and_dpo(), resuming, whole_runs(gpt2s)))


if __name__ == "__main__":
    main(run)
