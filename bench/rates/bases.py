"""The study's bases: the shipped one (192 wide), SmolLM2-135M (576), and a smaller one (96) trained here."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from examples import make_base, smollm2
from store.settings import get_settings

BASES = ("small", "shipped", "smollm2")
SYSTEM = {"smollm2": "Answer."}
"""A system message for bases whose template would write a longer one."""
RECIPE = make_base.Recipe(batch=8, learning_rates=((0, 0.0), (50, 4e-3), (800, 0.0)))


def folder(name: str, work: Path) -> Path:
    """The base's folder; the small one is trained into `work` if it is not there."""
    if name == "shipped":
        return make_base.BASE
    if name == "smollm2":
        return smollm2.folder(get_settings())
    place = work / "small"
    if not (place / "config.json").exists():
        train_small(place)
    return place


def train_small(place: Path) -> None:
    """A Llama of 4 layers, 96 wide, with the shipped tokenizer, trained on what the shipped one was."""
    tokenizer = AutoTokenizer.from_pretrained(make_base.BASE)
    documents = make_base.encode(tokenizer, held_out=False)
    held_out = make_base.windows(make_base.encode(tokenizer, held_out=True))[:64]
    torch.manual_seed(0)
    shipped = LlamaConfig.from_pretrained(make_base.BASE)
    sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4}
    config = LlamaConfig(**(shipped.to_dict() | sizes | {"head_dim": 24, "dtype": "float32"}))
    model = LlamaForCausalLM(config)
    optimizer = make_base.make_optimizer(model, RECIPE)
    for step, ids in enumerate(make_base.batches(documents, RECIPE, 0)):
        loss = make_base.loss_of(model, ids, autocast=False)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), RECIPE.clip)
        for group in optimizer.param_groups:
            group["lr"] = RECIPE.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            print(f"small base: step {step} of {RECIPE.steps}, loss {loss.item():.3f}", flush=True)
    print(f"small base: validation loss {make_base.measure(model, held_out)}", flush=True)
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
