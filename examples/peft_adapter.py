"""A downloaded adapter in PEFT: compared with its certificate, measured on rows, asked their questions."""

import json
import os
import re
import warnings
from pathlib import Path
from typing import Any

from .service import QuickstartError, console

CHECKED = 8
"""Rows on whose logits PEFT is compared with the trained model."""


def load(base_folder: Path, folder: Path, rows: list[Any]) -> tuple[Any, Any]:
    """The adapter on the untouched base in fp32, and the tokenizer.

    Raises QuickstartError if its logits on the first rows differ from the trained model's.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads sleep instead of spinning
    warnings.filterwarnings("ignore", category=FutureWarning)  # from PEFT about transformers
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(base_folder, padding_side="left")
    base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
    trained = trained_logits(base, folder, tokenizer, rows[:CHECKED])
    model = PeftModel.from_pretrained(base, folder).eval()
    check(logits(model, tokenizer, rows[:CHECKED]), trained, manifest["certificate"])
    return model, tokenizer


def trained_logits(base: Any, folder: Path, tokenizer: Any, rows: list[Any]) -> Any:
    """(tokens, vocabulary) logits of `W x + s (B A x - B0 A0 x)`, from the method's own tensors."""
    from safetensors.torch import load_file

    spec = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["spec"]["resolved"]["adapter"]
    tensors = load_file(folder / "native" / "adapter.safetensors", device=str(base.device))
    sites = sorted({name.rpartition(".")[0] for name in tensors})
    scale = spec["alpha"] / spec["rank"]

    def update_hook(site: str) -> Any:
        A, B, A0, B0 = (tensors[f"{site}.{name}"] for name in ("A", "B", "A0", "B0"))

        def hook(layer: Any, inputs: tuple[Any], output: Any) -> Any:
            x = inputs[0]
            return output + scale * (x @ A.T @ B.T - x @ A0.T @ B0.T)

        return hook

    hooks = [base.get_submodule(site).register_forward_hook(update_hook(site)) for site in sites]
    try:
        return logits(base, tokenizer, rows)
    finally:
        for hook in hooks:
            hook.remove()


def logits(model: Any, tokenizer: Any, rows: list[Any]) -> Any:
    """(tokens, vocabulary) logits for the tokens of all rows, concatenated."""
    import torch

    with torch.no_grad():
        return torch.cat([model(encode(tokenizer, row)[0].to(model.device)).logits[0] for row in rows])


def check(served: Any, trained: Any, certificate: dict[str, Any]) -> None:
    """Raises QuickstartError if PEFT's logits differ from the trained ones by more than the bound."""
    difference, _, allowed = compared(served, trained, certificate)
    result = f"{difference:.1e} (allowed {allowed:.1e})"
    if not difference <= allowed:
        raise QuickstartError(f"PEFT's logits are not the trained model's: largest difference {result}.")
    console.print(
        f"[green]Adapter verified[/green] by the service: largest logit difference "
        f"{certificate['max_abs_logit_diff']:.1e}. Checked here in PEFT: {result}"
    )


def compared(served: Any, trained: Any, certificate: dict[str, Any]) -> tuple[float, float, float]:
    """The largest difference of two sets of logits, the largest logit, and the difference that is allowed."""
    difference, largest = float((served - trained).abs().max()), float(trained.abs().max())
    return difference, largest, certificate["bound"] / certificate["max_abs_logit"] * largest


def encode(tokenizer: Any, row: Any) -> tuple[Any, Any]:
    """Token ids and the mask of trained tokens, both (1, tokens): the answer and the token that ends it."""
    import torch

    template, messages = tokenizer.apply_chat_template, row["messages"]
    ids = template(messages, return_dict=True, return_tensors="pt")["input_ids"]
    asked = template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
    end = int((ids[0] == tokenizer.eos_token_id).nonzero()[-1])
    positions = torch.arange(ids.shape[1])[None]
    return ids, (len(asked) <= positions) & (positions <= end)


def mean_loss(model: Any, tokenizer: Any, rows: list[Any]) -> float:
    """Mean loss of the answers in nats per token."""
    import torch

    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids, trained = encode(tokenizer, row)
            losses = torch.nn.functional.cross_entropy(
                model(ids).logits[0, :-1], ids[0, 1:], reduction="none"
            )
            total += float(losses[trained[0, 1:]].sum())
            count += int(trained[0, 1:].sum())
    return total / count


def answers(model: Any, tokenizer: Any, rows: list[Any], longest: int) -> list[str]:
    """The model's greedy answers to the rows' questions, each of at most `longest` tokens and in one line."""
    asked = tokenizer.apply_chat_template(
        [row["messages"][:-1] for row in rows],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    tokens = model.generate(
        **asked, max_new_tokens=longest, do_sample=False, pad_token_id=tokenizer.pad_token_id
    )
    texts = tokenizer.batch_decode(tokens[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
    return [re.sub(r"\s+", " ", text).strip() for text in texts]
