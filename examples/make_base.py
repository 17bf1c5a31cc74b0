"""Makes `examples/base`: a tiny Llama and its tokenizer, pretrained on the standard library's source.

    python -m examples.make_base            # from the root of the repository; resumes a stopped run
    python -m examples.make_base --fresh    # discard an earlier run

The training state is kept in `examples/.build`. Every export is written there and then moved into place, so
that the base can be loaded at any time during the run.
"""

import argparse
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from examples.corpus import digest, documents, modules

BASE = Path(__file__).parent / "base"
BUILD = Path(__file__).parent / ".build"

PAD, START, END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 4096
CONTEXT = 256
# Training uses the tokens between `generation` and `endgeneration`: the answer and its end of turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True)
class Recipe:
    batch: int = 8  # windows of CONTEXT tokens
    # The learning rate is linear between these points of (steps done, rate).
    learning_rates: tuple[tuple[int, float], ...] = ((0, 0.0), (200, 3e-3), (3750, 1.164e-3), (4500, 0.0))
    weight_decay: float = 0.1  # matrices only
    clip: float = 1.0
    seed: int = 0

    @property
    def steps(self) -> int:
        return self.learning_rates[-1][0]

    def learning_rate(self, done: int) -> float:
        """For the step that follows `done` steps."""
        for (start, first), (stop, last) in pairwise(self.learning_rates):
            if done < stop:
                return first + (last - first) * (done - start) / (stop - start)
        return 0.0


# The tokenizer


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it can encode any text, and decoding gives the same text back."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (text for module in modules() if not module.held_out for text in documents(module))
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[START],
        model_max_length=CONTEXT,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


# The data


def encode(tokenizer: PreTrainedTokenizerFast, held_out: bool) -> list[Tensor]:
    """The token ids, (tokens,) each, of one side's documents, wrapped like chat turns."""
    texts = [text for module in modules() if module.held_out == held_out for text in documents(module)]
    framed = [f"{START}source\n{text}{END}\n" for text in texts]
    encoded = tokenizer(framed, add_special_tokens=False, verbose=False)["input_ids"]
    return [torch.tensor(ids) for ids in encoded]


def windows(docs: list[Tensor], generator: torch.Generator | None = None) -> Tensor:
    """Documents end to end, split into (n, CONTEXT); shuffled if a generator is given."""
    if generator is None:
        stream = torch.cat(docs)
        return stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    stream = torch.cat([docs[i] for i in torch.randperm(len(docs), generator=generator).tolist()])
    cut = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    return cut[torch.randperm(len(cut), generator=generator)]


def batches(docs: list[Tensor], recipe: Recipe, first_step: int) -> Iterator[Tensor]:
    """(batch, CONTEXT) for each step from `first_step` on. A batch depends only on its step."""

    @cache
    def epoch(number: int) -> Tensor:
        return windows(docs, torch.Generator().manual_seed(recipe.seed + number))

    steps_per_epoch = len(epoch(0)) // recipe.batch  # all epochs have the same number of windows
    for step in range(first_step, recipe.steps):
        place = step % steps_per_epoch * recipe.batch
        yield epoch(step // steps_per_epoch)[place : place + recipe.batch]


# The model


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=512,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def make_optimizer(model: LlamaForCausalLM, recipe: Recipe) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def loss_of(model: LlamaForCausalLM, ids: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        return model(input_ids=ids, labels=ids, use_cache=False).loss


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, held_out: Tensor, batch: int = 16) -> float:
    """Mean loss per token over (n, CONTEXT), in the model's own precision."""
    model.eval()
    total = sum(loss_of(model, ids, autocast=False).item() * len(ids) for ids in held_out.split(batch))
    model.train()
    return total / len(held_out)


# The run


def train(recipe: Recipe, autocast: bool, export_every: int) -> None:
    tokenizer = make_tokenizer()
    docs, held_out = encode(tokenizer, held_out=False), windows(encode(tokenizer, held_out=True))
    sample = held_out[:: max(1, len(held_out) // 64)]
    torch.manual_seed(recipe.seed)
    model = make_model(tokenizer)
    optimizer = make_optimizer(model, recipe)
    first_step = load_state(model, optimizer, recipe)
    print(f"corpus {digest()}")
    print(f"{sum(map(len, docs)):,} tokens to train on, {held_out.numel():,} held out")
    print(f"{model.num_parameters():,} parameters, validation loss {measure(model, sample)}", flush=True)

    started = time.monotonic()
    for step, ids in enumerate(batches(docs, recipe, first_step), first_step + 1):
        loss = loss_of(model, ids, autocast)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate(step - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            seconds = (time.monotonic() - started) / (step - first_step)
            print(f"step {step}/{recipe.steps}  loss {loss.item():.3f}  {seconds:.3f} s a step", flush=True)
        if step % export_every == 0:
            print(f"step {step}  validation loss {measure(model, sample)}", flush=True)
            save_state(model, optimizer, recipe, step)
            export(model, tokenizer)
    export(model, tokenizer)
    print(f"whole held-out set: fp32 {measure(model, held_out)}", flush=True)
    shipped = LlamaForCausalLM.from_pretrained(BASE)
    print(f"whole held-out set: as shipped ({shipped.dtype}) {measure(shipped, held_out)}")


def measure(model: LlamaForCausalLM, held_out: Tensor) -> str:
    return f"{validation_loss(model, held_out):.4f}"


def save_state(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe, step: int) -> None:
    BUILD.mkdir(exist_ok=True)
    state = {
        "step": step,
        "recipe": vars(recipe),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    torch.save(state, BUILD / "state.pt.part")
    os.replace(BUILD / "state.pt.part", BUILD / "state.pt")


def load_state(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, recipe: Recipe) -> int:
    """The last step of an earlier run of the same recipe; 0 without one."""
    if not (BUILD / "state.pt").exists():
        return 0
    state = torch.load(BUILD / "state.pt", weights_only=True)
    if state["recipe"] != vars(recipe):
        raise SystemExit("examples/.build holds a run of another recipe; add --fresh to discard it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def export(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """The model in bf16 with its tokenizer, as `examples/base`."""
    aside = BUILD / "base"
    shutil.rmtree(aside, ignore_errors=True)
    shipped = LlamaForCausalLM(model.config)
    shipped.load_state_dict(model.state_dict())
    shipped.generation_config = model.generation_config
    shipped.to(torch.bfloat16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    use_older_names(aside / "tokenizer_config.json")
    BASE.mkdir(exist_ok=True)
    for file in aside.iterdir():
        file.chmod(0o644)
        os.replace(file, BASE / file.name)


def use_older_names(path: Path) -> None:
    """The names in transformers 4; transformers 5 writes new ones and reads both."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.pop("backend")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Makes examples/base.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--export-every", type=int, default=250, help="steps between checkpoints")
    parser.add_argument("--fp32", action="store_true", help="compute in fp32, not in bf16")
    parser.add_argument("--fresh", action="store_true", help="discard an earlier run")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.fresh:
        shutil.rmtree(BUILD, ignore_errors=True)
    train(Recipe(), autocast=not args.fp32, export_every=args.export_every)


if __name__ == "__main__":
    main()
