"""The arms of `bench/train.py`, each in a process of its own that trains and prints one line of JSON.

    python -m bench.arms prepare FOLDER --steps 12 --batch-size 8
    python -m bench.arms ours FOLDER --steps 12 --batch-size 8

FOLDER was made by `bench.materials`. `prepare` tokenises its rows once, puts them in the order of our run
and draws the LoRA factors, so that all arms train on the same tokens from the same start.
"""

import argparse
import dataclasses
import functools
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

RANK, ALPHA, LEARNING_RATE, SEED = 16, 32, 5e-4, 0
ROWS, START = "rows.npz", "start.safetensors"
IGNORED = -100


@dataclass(frozen=True)
class Arm:
    """One way to train. `options` are hyperparameters of ours, or arguments of the peer's trainer."""

    kind: str
    description: str
    options: dict[str, Any] = field(default_factory=dict)
    grouped: bool = False
    """Whether a peer groups batches by length; ours keeps its own order."""
    dtype: str = "faster"
    """The dtype in which a peer loads the base: a name, the peer's own "default", or what is "faster" on this
    machine by the measurement that ours uses. Where that is fp32, autocast is off."""
    method: str = "lora"
    switch: str | None = None
    """The technique of ours that is turned off, a key of SWITCHES."""

    @property
    def same_batches(self) -> bool:
        """Whether each step has the same examples as ours, from the same start."""
        packs_rows = self.kind == "trl" and "packing" in self.options
        return not self.grouped and not packs_rows and self.method == "lora"


TUNED = {"bf16": True, "logging_nan_inf_filter": False, "gradient_checkpointing": False}
AT_A_TIME = "gradient_accumulation_steps"
BEST = TUNED | {AT_A_TIME: 4}
"""Two rows at a time: of 1, 2, 4 and 8 rows the fastest on a CPU, in its faster dtype."""
ARMS = {
    "ours": Arm("ours", "`olora_core.training.train` as a user calls it, LoRA, every setting auto"),
    "trainer": Arm(
        "trainer",
        "PEFT + HF Trainer tuned: the faster dtype, no checkpointing, length-grouped",
        BEST,
        grouped=True,
    ),
    "trl": Arm("trl", "PEFT + TRL SFTTrainer, its defaults", dtype="default"),
    "trl-packed": Arm("trl", "PEFT + TRL SFTTrainer, packing=True", {"packing": True}, dtype="default"),
    "trl-tuned": Arm("trl", "PEFT + TRL SFTTrainer tuned in the same way", BEST, grouped=True),
    # The peers with other settings.
    "trainer-random": Arm("trainer", "tuned, batches not grouped", BEST),
    "trainer-1-row": Arm("trainer", "tuned, 1 row at a time", TUNED | {AT_A_TIME: 8}, grouped=True),
    "trainer-4-rows": Arm("trainer", "tuned, 4 rows at a time", TUNED | {AT_A_TIME: 2}, grouped=True),
    "trainer-8-rows": Arm("trainer", "tuned, 8 rows at a time", TUNED, grouped=True),
    "trainer-fp32": Arm("trainer", "tuned, in fp32", BEST | {"bf16": False}, True, "float32"),
    "trainer-bf16": Arm("trainer", "tuned, in bf16", BEST, True, "bfloat16"),
    "trainer-no-autocast": Arm(
        "trainer", "tuned, bf16 base, fp32 LoRA", BEST | {"bf16": False}, True, "bfloat16"
    ),
    "trainer-recast": Arm("trainer", "tuned, fp32 base cast to bf16 in every product", BEST, True, "float32"),
    # Ours, with one change each.
    "ours-olora": Arm("ours", "OLoRA instead of LoRA", method="olora"),
    "ours-fp32": Arm("ours", "fp32", {"dtype": "float32"}),
    "ours-padded": Arm("ours", "padded instead of packed", {"packing": False}),
    "ours-512-tokens": Arm("ours", "512 tokens a pass", {"micro_batch_tokens": 512}),
    "ours-1024-tokens": Arm("ours", "1024 tokens a pass", {"micro_batch_tokens": 1024}),
    "ours-2048-tokens": Arm("ours", "2048 tokens a pass", {"micro_batch_tokens": 2048}),
    "ours-checkpointing": Arm("ours", "gradient checkpointing", {"gradient_checkpointing": True}),
    "ours-masked": Arm("ours", "packed rows attended through one mask", switch="segments"),
    "ours-every-logit": Arm("ours", "the head on every token", switch="label-only head"),
    "ours-head-twice": Arm("ours", "the head's gradient by autograd", switch="head's gradient"),
    "ours-plain-product": Arm("ours", "W x and B A x apart, by autograd", switch="fused product"),
}


@dataclass(frozen=True)
class Task:
    """The input of an arm."""

    folder: Path
    steps: int
    warm_up: int
    batch_size: int
    device: str

    @property
    def base(self) -> Path:
        return self.folder / "base"


# --- shared by all arms --------------------------------------------------------------------------------


def prepare(task: Task) -> dict[str, Any]:
    """Writes ROWS and START. Returns the facts about the data for the table's heading."""
    from olora_core.bases.loading import load_base
    from olora_core.bases.sites import target_sites
    from olora_core.data.batches import epoch_order
    from olora_core.methods import METHODS
    from olora_core.progress import result_of
    from olora_core.training.data import read_data

    base = load_base(task.base, name="bench", device=task.device)
    spec = our_spec(task, {})
    data = result_of(read_data(spec, base, task.folder / "train.jsonl", task.folder / "valid.jsonl"))
    if len(data.training) != task.steps * task.batch_size:
        raise SystemExit(f"{len(data.training)} usable rows are not {task.steps} × {task.batch_size}.")
    order = epoch_order(len(data.training), seed=SEED, epoch=0)
    write_rows(
        task.folder / ROWS,
        {
            "training": [data.training.row(int(i)) for i in order],
            "held_out": [data.validation.row(i) for i in range(len(data.validation))],
        },
    )
    method = METHODS["lora"](spec.adapter, seed=SEED, total_steps=task.steps, schedule=lambda i, n: 1.0)
    sites = target_sites(base.model, "auto")
    start = {site.name: method.adapter(base.model.get_submodule(site.name).weight, site).A for site in sites}
    save_file({name: A.detach().contiguous() for name, A in start.items()}, task.folder / START)
    lengths = data.training.lengths
    return {
        "parameters": base.model.num_parameters(),
        "lengths": [int(lengths.min()), float(np.median(lengths)), float(lengths.mean()), int(lengths.max())],
        "trained": float(data.training.trained.mean()),
    }


def write_rows(path: Path, parts: dict[str, list[tuple[np.ndarray, np.ndarray]]]) -> None:
    arrays = {}
    for name, rows in parts.items():
        arrays[f"{name}_tokens"] = np.concatenate([tokens for tokens, _ in rows]).astype(np.int64)
        arrays[f"{name}_trained"] = np.concatenate([trained for _, trained in rows])
        arrays[f"{name}_ends"] = np.cumsum([len(tokens) for tokens, _ in rows])
    np.savez(path, **arrays)


def read_rows(folder: Path, name: str) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each row, in the format of a peer's data set."""
    with np.load(folder / ROWS) as file:
        tokens, trained = file[f"{name}_tokens"], file[f"{name}_trained"]
        ends = file[f"{name}_ends"][:-1]
    labels = np.where(trained, tokens, IGNORED)
    return [
        {"input_ids": ids.tolist(), "labels": targets.tolist()}
        for ids, targets in zip(np.split(tokens, ends), np.split(labels, ends), strict=True)
    ]


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, folder: Path) -> float:
    """Nats per trained token of the held-out rows, computed one row at a time for every arm."""
    model.eval()
    total, count = 0.0, 0
    for row in read_rows(folder, "held_out"):
        ids, labels = (torch.tensor(row[name], device=model.device) for name in ("input_ids", "labels"))
        positions = (labels != IGNORED).nonzero()[:, 0]
        hidden = model.get_decoder()(input_ids=ids[None], use_cache=False).last_hidden_state[0, positions - 1]
        logits = model.get_output_embeddings()(hidden.to(model.get_output_embeddings().weight.dtype))
        total += float(F.cross_entropy(logits.float(), labels[positions], reduction="sum"))
        count += len(positions)
    return total / count


@dataclass
class Clock:
    """Records the time of each step's end, and the peak memory after the last step."""

    task: Task
    steps: int = 0
    ends: list[tuple[float, float]] = field(default_factory=list)
    """(wall clock, CPU time of this process) in seconds at the end of each step."""
    peak_bytes: int = 0

    def step_ended(self) -> None:
        self.steps += 1
        if self.task.device == "cuda" and self.steps in (self.task.warm_up, self.task.steps):
            torch.cuda.synchronize()
        self.ends.append((time.perf_counter(), time.process_time()))
        if self.steps == self.task.steps:
            self.peak_bytes = peak_memory(self.task.device)

    @property
    def seconds(self) -> float:
        return self.ends[-1][0] - self.ends[self.task.warm_up - 1][0]

    @property
    def cpu_seconds(self) -> float:
        return self.ends[-1][1] - self.ends[self.task.warm_up - 1][1]


def peak_memory(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- ours ----------------------------------------------------------------------------------------------


def our_spec(task: Task, options: dict[str, Any], method: str = "lora") -> Any:
    from olora_core.specs import read_spec

    return read_spec(
        model="bench",
        hyperparameters={
            "n_epochs": 1,
            "batch_size": task.batch_size,
            "learning_rate": LEARNING_RATE,
            "schedule": "constant",
            "warmup_ratio": 0.0,
            **options,
        },
        adapter={"method": method, "rank": RANK, "alpha": ALPHA},
        seed=SEED,
    )


def ours(task: Task, arm: Arm) -> dict[str, Any]:
    from olora_core.bases.loading import load_base
    from olora_core.bases.precision import compute_dtype
    from olora_core.progress import Step
    from olora_core.training.train import train

    libraries = peak_memory(task.device)
    spec = our_spec(task, arm.options, arm.method)
    dtype = compute_dtype(spec, task.base, task.device)
    base = load_base(task.base, name="bench", device=task.device, dtype=dtype)
    if arm.switch:
        SWITCHES[arm.switch](base)
    clock, steps = Clock(task), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        run = train(spec, base, task.folder / "train.jsonl", None, folder, checkpoint_seconds=86_400.0)
        while len(steps) < task.steps:
            if isinstance(progress := next(run), Step):
                clock.step_ended()
                steps.append(progress)
        held_out = held_out_loss(base.model, task.folder)  # before the run removes its adapters
        run.close()
    tokens = sum(step.tokens for step in steps[task.warm_up :])
    return result([step.loss for step in steps], held_out, tokens, clock, libraries, str(dtype))


# Each turns one of our techniques off in this process, to measure its effect. There is no user option for it.


def head_on_every_token(base: Any) -> None:
    base.passes = dataclasses.replace(base.passes, plain_head=False)


def one_mask(base: Any) -> None:
    base.passes = dataclasses.replace(base.passes, packing="positions")


def head_by_autograd(base: Any) -> None:
    import olora_core.training.losses as losses

    def apply(
        hidden: Tensor, weight: Tensor, bias: Any, targets: Tensor, smoothing: float, target_weights: None
    ) -> tuple[Tensor, Tensor]:
        logits = F.linear(hidden, weight, bias)
        total = F.cross_entropy(logits.float(), targets, reduction="sum", label_smoothing=smoothing)
        return total, (logits.detach().argmax(dim=-1) == targets).sum()

    losses.FrozenHeadLoss = SimpleNamespace(apply=apply)


def products_apart(base: Any) -> None:
    from olora_core.layers.adapter import Adapter
    from olora_core.methods.lora import LoRAAdapter

    LoRAAdapter.forward, LoRAAdapter.delta = Adapter.forward, Adapter.delta


SWITCHES: dict[str, Callable[[Any], None]] = {
    "label-only head": head_on_every_token,
    "segments": one_mask,
    "head's gradient": head_by_autograd,
    "fused product": products_apart,
}


# --- the peers -----------------------------------------------------------------------------------------


def in_faster_dtype(task: Task, arm: Arm) -> Arm:
    """The arm with the dtype that is faster on this machine, unless it names another."""
    from olora_core.bases.precision import DTYPES, compute_dtype

    if arm.dtype != "faster":
        return arm
    dtype = compute_dtype(our_spec(task, {}), task.base, task.device)
    if dtype == DTYPES["bfloat16"]:
        return dataclasses.replace(arm, dtype="bfloat16")
    return dataclasses.replace(arm, dtype="float32", options=arm.options | {"bf16": False})


def peer(task: Task, arm: Arm) -> dict[str, Any]:
    import peft
    from transformers import TrainerCallback

    arm = in_faster_dtype(task, arm)

    class Ticks(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            clock.step_ended()

    rows = read_rows(task.folder, "training")
    if arm.grouped:
        rows = grouped(rows, task.batch_size)
    start = load_file(task.folder / START)
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=list(start), task_type="CAUSAL_LM", lora_dropout=0.0
    )
    make = make_trainer if arm.kind == "trainer" else make_trl
    with tempfile.TemporaryDirectory() as scratch:
        trainer, libraries = make(task, arm, rows, lora, scratch)
        take_start(trainer.model, start)
        clock, losses = Clock(task), record_losses(trainer)
        trainer.add_callback(Ticks())
        trainer.train()
    per_step = len(losses) // task.steps
    sums = torch.stack(losses).float().view(task.steps, per_step).sum(dim=1).tolist()
    held_out = held_out_loss(trainer.model.get_base_model(), task.folder)
    lengths = [len(row["input_ids"]) for row in trainer.train_dataset]
    # A packed row is a step's.
    step_rows = trainer.args.per_device_train_batch_size if arm.options.get("packing") else task.batch_size
    tokens = sum(lengths[task.warm_up * step_rows : task.steps * step_rows])
    return result(sums, held_out, tokens, clock, libraries, arm.dtype)


def arguments_of(task: Task, arm: Arm, scratch: str) -> dict[str, Any]:
    """Arguments that all arms share: the same steps and rate, nothing saved or reported."""
    return {
        "output_dir": scratch,
        "max_steps": task.steps,
        "per_device_train_batch_size": task.batch_size // arm.options.get(AT_A_TIME, 1),
        "learning_rate": LEARNING_RATE,
        "lr_scheduler_type": "constant",
        "train_sampling_strategy": "sequential",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": task.device == "cpu",
        "dataloader_pin_memory": task.device == "cuda",
        "seed": SEED,
        **arm.options,
    }


def make_trainer(task: Task, arm: Arm, rows: list, lora: Any, scratch: str) -> tuple[Any, int]:
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    libraries = peak_memory(task.device)
    model = AutoModelForCausalLM.from_pretrained(task.base, dtype=getattr(torch, arm.dtype))
    arguments = TrainingArguments(logging_strategy="no", **arguments_of(task, arm, scratch))
    model = get_peft_model(model, lora)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=functools.partial(padded, pad=model.config.pad_token_id),
    )
    return trainer, libraries


def padded(rows: list[dict[str, list[int]]], pad: int) -> dict[str, Tensor]:
    """A (rows, longest) batch padded on the right. Causal attention needs no mask, and is faster without."""
    longest = max(len(row["input_ids"]) for row in rows)

    def filled(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    return {"input_ids": filled("input_ids", pad), "labels": filled("labels", IGNORED)}


def make_trl(task: Task, arm: Arm, rows: list, lora: Any, scratch: str) -> tuple[Any, int]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    libraries = peak_memory(task.device)
    options = arguments_of(task, arm, scratch)
    if arm.dtype != "default":
        options["model_init_kwargs"] = {"dtype": arm.dtype}
    if arm.options.get("packing"):
        # One row per step, as long as the mean batch: the same number of tokens per step as the other arms.
        tokens = sum(len(row["input_ids"]) for row in rows)
        longest = max(len(row["input_ids"]) for row in rows)
        options |= {"max_length": max(longest, tokens // task.steps), "per_device_train_batch_size": 1}
    trainer = SFTTrainer(
        str(task.base),
        args=SFTConfig(**options),
        train_dataset=Dataset.from_list(rows),
        peft_config=lora,
    )
    return trainer, libraries


def grouped(rows: list, size: int) -> list:
    """The same rows in batches of similar length, in random order."""
    ordered = sorted(rows, key=lambda row: -len(row["input_ids"]))
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [row for i in np.random.default_rng(SEED).permutation(len(batches)) for row in batches[i]]


def take_start(model: Any, start: dict[str, Tensor]) -> None:
    """Copies our initial factors A into PEFT's layers; B is zero in both."""
    for name, A in start.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        layer.lora_A["default"].weight.data.copy_(A)


def record_losses(trainer: Any) -> list[Tensor]:
    """The list to which each micro-step's loss is appended, without synchronising with the device."""
    losses: list[Tensor] = []
    step = trainer.training_step

    def recorded(*arguments: Any, **named: Any) -> Tensor:
        loss = step(*arguments, **named)
        losses.append(loss.detach())
        return loss

    trainer.training_step = recorded
    return losses


# --- the process ---------------------------------------------------------------------------------------


def result(
    losses: list[float], held_out: float, tokens: int, clock: Clock, libraries: int, dtype: str
) -> dict[str, Any]:
    return {
        "losses": losses,
        "held_out": held_out,
        "tokens": tokens,
        "seconds": clock.seconds,
        "tokens_per_second": tokens / clock.seconds,
        "tokens_per_cpu_second": tokens / clock.cpu_seconds,
        "peak_bytes": clock.peak_bytes,
        "libraries_bytes": libraries,
        "dtype": dtype.removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("arm", choices=["prepare", *ARMS])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    asked = parser.parse_args(arguments)
    if not 0 < asked.warm_up < asked.steps:
        parser.error("--warm-up must be at least 1 and less than --steps")
    task = Task(asked.folder, asked.steps, asked.warm_up, asked.batch_size, asked.device)
    if asked.arm == "prepare":
        printed = prepare(task)
    else:
        arm = ARMS[asked.arm]
        printed = (ours if arm.kind == "ours" else peer)(task, arm)
        printed |= {"same_batches": arm.same_batches}
    sys.stdout.write(json.dumps(printed) + "\n")


if __name__ == "__main__":
    main()
