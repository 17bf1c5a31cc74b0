"""DPO: pairs as they are tokenised, the loss against a plain loop's, and runs from end to end.

The reference of the losses is a loop around PEFT's model and a second, frozen copy of the base. It shares
nothing with the core but the order of the examples.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    get_linear_schedule_with_warmup,
)

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites
from olora_core.data.batches import epoch_order
from olora_core.data.examples import Examples
from olora_core.data.tokenising import overlap_note
from olora_core.data.turns import end_of_turn_tokens
from olora_core.errors import DataError
from olora_core.methods import METHODS
from olora_core.progress import Evaluated, Finished, Note, Resolved, Saved, Step
from olora_core.specs import TrainSpec
from olora_core.training.train import train

from ..runs import chat_rows, one, preference_rows, spec_for, tokenised, write_rows
from .test_parity import masked, padded, peft_model

LN_2 = math.log(2)
ULP = float(np.spacing(np.float32(LN_2)))
BETA, STEPS, BATCH, EXAMPLES = 0.5, 20, 4, 14


def dpo_spec(method: str = "olora", **changes: Any) -> TrainSpec:
    return spec_for(method, type="dpo", **{"beta": BETA, **changes})


def steps_of(base: Base, spec: TrainSpec, folder: Path, count: int | None = None) -> list[Step]:
    """The first steps of a run on the pairs above; without a count, all of them."""
    training = write_rows(folder / "training.jsonl", preference_rows(EXAMPLES))
    progress = train(spec, base, training, None, folder / "run", checkpoint_seconds=3600)
    steps: list[Step] = []
    while count is None or len(steps) < count:
        update = next(progress, None)
        if update is None:
            break
        steps += [update] if isinstance(update, Step) else []
    progress.close()
    return steps


# --- the start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("name", "dtype"), [("llama", "float32"), ("bf16_llama", "bfloat16"), ("gpt2", "float32")]
)
def test_the_first_loss_is_the_logarithm_of_2(
    request, tmp_path, name, dtype, method, packing, dropout
) -> None:
    base = request.getfixturevalue(name)
    spec = dpo_spec(method, dtype=dtype, packing=packing, adapter={"dropout": dropout})
    (first,) = steps_of(base, spec, tmp_path, 1)
    assert abs(first.loss - LN_2) <= ULP
    assert first.accuracy == 0
    assert first.reward_margin == 0
    assert first.grad_norm > 0


def test_the_bases_own_dropout_does_not_move_the_start(gpt2: Base, tmp_path) -> None:
    for module in gpt2.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.3
    (first,) = steps_of(gpt2, dpo_spec(), tmp_path, 1)
    assert abs(first.loss - LN_2) <= ULP


# --- the loop ------------------------------------------------------------------------------------------


def reference_losses(policy: PeftModel, frozen: PreTrainedModel, folder: Path, rate: float) -> list[Any]:
    """(loss, reward accuracy, margin, gradient norm) of each step of a plain DPO loop."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sides = ("preferred_output", "non_preferred_output")
    pairs = [
        [masked(tokenizer, row["input"]["messages"] + row[side]) for side in sides]
        for row in preference_rows(EXAMPLES)
    ]
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    scheduler = get_linear_schedule_with_warmup(optimizer, math.ceil(0.03 * STEPS), STEPS)
    results: list[Any] = []
    for epoch in range(STEPS):
        order = epoch_order(EXAMPLES, seed=5, epoch=epoch).tolist()
        for start in range(0, EXAMPLES, BATCH):
            if len(results) == STEPS:
                return results
            part = [pairs[i] for i in order[start : start + BATCH]]
            better, worse = (padded([pair[side] for pair in part]) for side in (0, 1))
            with torch.no_grad():
                known = log_probs(frozen, better) - log_probs(frozen, worse)
            margins = BETA * (log_probs(policy, better) - log_probs(policy, worse) - known)
            loss = -F.logsigmoid(margins).mean()
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            results.append((loss.item(), (margins > 0).float().mean().item(), margins.mean().item(), norm))
    return results


def log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    of_tokens = logits[:, :-1].log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (of_tokens * (labels != -100)).sum(-1)


def peft_policy(folder: Path, spec: TrainSpec) -> PeftModel:
    """PEFT's OLoRA, or its LoRA with the factors that our method draws."""
    if spec.adapter.method == "olora":
        return peft_model(folder, spec, "olora")
    policy = peft_model(folder, spec, True)
    base = load_base(folder, name="base", dtype=torch.float32)
    method = METHODS["lora"](spec.adapter, seed=spec.seed, total_steps=STEPS, schedule=lambda i, n: 1.0)
    for site in target_sites(base.model, "auto"):
        adapter = method.adapter(base.model.get_submodule(site.name).weight, site)
        layer = policy.base_model.model.get_submodule(site.name)
        with torch.no_grad():
            layer.lora_A["default"].weight.copy_(adapter.A)
            layer.lora_B["default"].weight.copy_(adapter.B)
    return policy


# PEFT reads a property that transformers deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize("method", ["olora", "lora"])
def test_twenty_steps_equal_a_plain_loop_with_a_second_model(base_folders, tmp_path, method) -> None:
    folder, rate = base_folders["llama"], 2e-3
    spec = dpo_spec(method, n_epochs=10, max_steps=STEPS, micro_batch_size=3, learning_rate=rate)
    frozen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    theirs = reference_losses(peft_policy(folder, spec), frozen, folder, rate)
    ours = steps_of(load_base(folder, name="base", dtype=torch.float32), spec, tmp_path, STEPS)
    assert len(ours) == len(theirs) == STEPS
    for step, (loss, accuracy, margin, norm) in zip(ours, theirs, strict=True):
        assert step.loss == pytest.approx(loss, rel=1e-4)
        assert step.grad_norm == pytest.approx(norm.item(), rel=1e-3)
        if step.step > 2:  # until the warm-up's rate leaves 0, the plain loop's margins are rounding
            assert step.accuracy == pytest.approx(accuracy)
            assert step.reward_margin == pytest.approx(margin, rel=1e-3, abs=1e-4)
    assert theirs[-1][0] < 0.7 * LN_2, "the comparison needs a run that learns"


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_size": 3}, {"packing": True}])
def test_a_batch_of_pairs_gives_the_same_losses_however_it_is_cut(llama: Base, tmp_path, changes) -> None:
    whole = steps_of(llama, dpo_spec(micro_batch_size=4), tmp_path)
    cut = steps_of(llama, dpo_spec(**{"micro_batch_size": 4, **changes}), tmp_path)
    assert [step.loss for step in cut] == pytest.approx([step.loss for step in whole], rel=1e-5)
    assert whole[-1].loss < whole[0].loss


def test_a_run_learns_to_prefer_and_its_adapter_is_certified(llama: Base, tmp_path) -> None:
    training = write_rows(tmp_path / "training.jsonl", preference_rows(11))
    validation = write_rows(tmp_path / "validation.jsonl", preference_rows(20)[11:])
    spec = dpo_spec(n_epochs=8, learning_rate=1e-2)
    updates = list(train(spec, llama, training, validation, tmp_path / "run"))
    before, *_, after = [p for p in updates if isinstance(p, Evaluated)]
    assert abs(before.loss - LN_2) <= ULP
    assert (before.accuracy, after.accuracy) == (0, 1)
    assert after.loss < 0.3
    last = [p for p in updates if isinstance(p, Step)][-1]
    assert last.accuracy == 1
    assert last.reward_margin is not None
    assert last.reward_margin > 1
    finished = one(Finished, updates)
    assert finished.certificate["passed"]
    assert finished.metrics["train_accuracy"] == 1
    assert finished.metrics["valid_loss_after"] == after.loss
    assert one(Resolved, updates).examples == 11


def test_each_type_trains_on_its_own_format(llama: Base, tmp_path) -> None:
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows())
    for spec, file in ((spec_for(), pairs), (dpo_spec(), rows)):
        with pytest.raises(DataError) as caught:
            list(train(spec, llama, file, None, tmp_path / "run"))
        assert caught.value.code == "unexpected_file_format"


def test_a_resumed_run_equals_an_unbroken_one(base_folders, tmp_path) -> None:
    files = [write_rows(tmp_path / f"{i}.jsonl", preference_rows(11 + i)[i:]) for i in (0, 5)]
    spec = dpo_spec(adapter={"dropout": 0.2})

    def run(folder: str, **options: Any) -> tuple[list[Any], Finished, Path | None]:
        base = load_base(base_folders["llama"], name="tiny", dtype=torch.float32)
        progress, reported, kept = train(spec, base, *files, tmp_path / folder, **options), [], None
        update = next(progress)
        while not isinstance(update, Finished):
            stop_request = None
            if isinstance(update, Step):
                reported.append(
                    (update.step, update.loss, update.accuracy, update.reward_margin, update.valid_loss)
                )
                stop_request = "save" if update.step == 2 else None
            elif isinstance(update, Evaluated):
                reported.append(("whole", update.step, update.loss, update.accuracy))
            elif isinstance(update, Saved) and update.step == 2:
                kept = update.folder.rename(tmp_path / f"kept-{folder}")
            update = progress.send(stop_request)
        progress.close()
        return reported, update, kept

    reported, finished, kept = run("unbroken")
    again, resumed, _ = run("resumed", resume=kept)
    assert again == reported[reported.index(next(t for t in reported if t[0] == 3)) :]
    for file in ("adapter_model.safetensors", "native/adapter.safetensors"):
        assert (resumed.folder / file).read_bytes() == (finished.folder / file).read_bytes()
    assert resumed.metrics["train_loss"] == finished.metrics["train_loss"]


# --- pairs as they are tokenised -----------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "Why?"}]


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def pairs_of(
    folder: Path, base: Base, rows: list[dict[str, Any]], context: int = 4096
) -> tuple[Examples, list[Note]]:
    path = write_rows(folder / "pairs.jsonl", rows)
    ends = end_of_turn_tokens(base.tokenizer)
    return tokenised(path, base.tokenizer, context_length=context, end_tokens=ends)


PAIRS = {
    "openai": {
        "input": {"messages": QUESTION},
        "preferred_output": answer("Because."),
        "non_preferred_output": answer("No"),
    },
    "older openai": {
        "input": {"messages": QUESTION},
        "preferred_completion": answer("Because."),
        "non_preferred_completion": answer("No"),
    },
    "trl messages": {"prompt": QUESTION, "chosen": answer("Because."), "rejected": answer("No")},
    "trl strings": {"prompt": "Why?", "chosen": "Because.", "rejected": "No"},
}


@pytest.mark.parametrize("spelling", PAIRS)
def test_a_pair_is_one_prompt_with_two_trained_answers(llama: Base, tmp_path, spelling) -> None:
    examples, _ = pairs_of(tmp_path, llama, [PAIRS[spelling]])
    assert (len(examples), examples.rows_per_example) == (1, 2)
    prompts, answers = [], []
    for tokens, trained in examples.example(0):
        first = int(trained.argmax())
        prompts.append(tokens[:first].tolist())
        answers.append(llama.tokenizer.decode(tokens[trained].tolist()))
    assert prompts[0] == prompts[1]
    assert answers == ["Because.<|im_end|>", "No<|im_end|>"]
    assert examples.weights.tolist() == [1]
    assert examples.trained_lengths.tolist() == [len("Because.") + 1 + len("No") + 1]


def test_pairs_that_say_nothing_are_named_and_left_out(llama: Base, tmp_path) -> None:
    good, context = PAIRS["trl strings"], 20
    rows = [
        good,
        good | {"rejected": "  "},
        PAIRS["trl messages"] | {"chosen": answer("")},
        good | {"prompt": "?" * context},
        good | {"chosen": "Because of this and that", "rejected": "Because of this and this"},
        good | {"chosen": "Because of that"},
    ]
    examples, notes = pairs_of(tmp_path, llama, rows, context)
    assert examples.lines.tolist() == [1, 6]
    named = {note.data["code"]: note.data["lines"] for note in notes if note.data and "code" in note.data}
    assert named == {"no_trained_token": [2, 3, 4], "n_too_long": [3, 4, 5], "equal_preference": [5]}


def test_equal_pairs_of_two_files_are_told(llama: Base, tmp_path) -> None:
    rows = preference_rows(6)
    training, _ = pairs_of(tmp_path, llama, rows[:4])
    validation, _ = pairs_of(tmp_path, llama, rows[3:])
    note = overlap_note(training, validation)
    assert note is not None
    assert note.data == {"code": "overlap", "lines": [1], "count": 1}
    assert training.first(2).lengths.tolist() == training.lengths[:2].tolist()
