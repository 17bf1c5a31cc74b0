"""What is answered before and after: which rows, by whom, and that it disturbs nothing."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from olora_core.bases.loading import Base
from olora_core.errors import SpecError
from olora_core.progress import Finished, Note, Phase, Samples, Saved
from olora_core.specs import read_spec
from olora_core.training import samples as samples_module
from olora_core.training.samples import answer, generate

from ..runs import chat_rows, one, preference_rows, spec_for, train, write_rows

QUESTION = {"role": "user", "content": "Say it."}
TAUGHT = [{"messages": [QUESTION, {"role": "assistant", "content": "Quite."}]}] * 4
WELL = {"n_epochs": 40, "learning_rate": 2e-2, "adapter": {"rank": 16, "alpha": 16}}


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows())


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "validation.jsonl", chat_rows(16)[11:])


def by_hand(base: Base, prompt: str, most: int) -> str:
    """Argmax after argmax, without a cache."""
    ids, tokens = base.tokenizer(prompt, add_special_tokens=False).input_ids, []
    while len(tokens) < most:
        with torch.no_grad():
            tokens.append(int(base.model(torch.tensor([ids + tokens])).logits[0, -1].argmax()))
        if tokens[-1] == base.tokenizer.eos_token_id:
            break
    return base.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_the_base_and_the_tuned_model_answer_the_same_prompt(llama: Base, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", TAUGHT)
    base_says = generate(llama, [QUESTION], 64)
    updates = list(train(spec_for(samples=2, **WELL), llama, training, None, tmp_path / "run"))
    reported = one(Samples, updates)
    assert reported.file == "training"
    assert [row["line"] for row in reported.rows] == [1, 2]
    prompt = "<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n"
    assert [row["prompt"] for row in reported.rows] == [prompt] * 2
    assert [row["reference"] for row in reported.rows] == ["Quite."] * 2
    assert [row["base"] for row in reported.rows] == [base_says] * 2
    assert [row["tuned"] for row in reported.rows] == ["Quite."] * 2
    assert base_says == by_hand(llama, prompt, 64) != "Quite."


def test_they_stand_in_the_manifest_and_on_the_model_card(
    llama: Base, training: Path, validation: Path, tmp_path: Path
) -> None:
    updates = list(train(spec_for(samples=3), llama, training, validation, tmp_path / "run"))
    reported, folder = one(Samples, updates), one(Finished, updates).folder
    assert reported.file == "validation"
    assert [row["line"] for row in reported.rows] == [1, 2, 3]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["samples"] == {"file": "validation", "rows": reported.rows, "held_out": False}
    card = (folder / "README.md").read_text()
    assert "## What it answers" in card
    assert card.index("### Line 3") < card.index("## Certificate")
    for row in reported.rows:
        for line in (*row["prompt"].splitlines(), *row["tuned"].splitlines()):
            assert f"    {line}\n" in card
    phases = [p.done for p in updates if isinstance(p, Phase) and p.name == "sampling"]
    assert phases == [0, 1, 2]


def test_none_are_generated_where_none_are_asked_for(llama: Base, training: Path, tmp_path: Path) -> None:
    updates = list(train(spec_for(samples=0), llama, training, None, tmp_path / "run"))
    assert not [
        p for p in updates if isinstance(p, Samples) or (isinstance(p, Phase) and p.name == "sampling")
    ]
    folder = one(Finished, updates).folder
    assert json.loads((folder / "manifest.json").read_text())["samples"] is None
    assert "What it answers" not in (folder / "README.md").read_text()


def test_a_pair_is_asked_its_question_and_shows_the_better_answer(llama: Base, tmp_path: Path) -> None:
    rows = preference_rows()
    training = write_rows(tmp_path / "pairs.jsonl", rows)
    spec = spec_for(type="dpo", samples=2, max_steps=1)
    reported = one(Samples, train(spec, llama, training, None, tmp_path / "run"))
    assert [row["reference"] for row in reported.rows] == [
        row["preferred_output"][0]["content"] for row in rows[:2]
    ]
    assert rows[1]["input"]["messages"][0]["content"] in reported.rows[1]["prompt"]


def test_a_conversation_is_asked_for_its_last_answer(llama: Base, tmp_path: Path) -> None:
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    training = write_rows(tmp_path / "turns.jsonl", [{"messages": turns}])
    spec = spec_for(samples=1, max_steps=1)
    (row,) = one(Samples, train(spec, llama, training, None, tmp_path / "run")).rows
    assert row["reference"] == "four"
    assert row["prompt"].endswith("two<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n<|im_start|>assistant\n")


def test_a_text_without_a_prompt_is_passed_over(llama: Base, tmp_path: Path) -> None:
    rows = [{"prompt": "", "completion": " all of it is trained"}, {"prompt": "ab", "completion": " c"}]
    training = write_rows(tmp_path / "completions.jsonl", rows)
    spec = spec_for(samples=4, max_steps=1)
    reported = one(Samples, train(spec, llama, training, None, tmp_path / "run"))
    assert [(row["line"], row["prompt"], row["reference"]) for row in reported.rows] == [(2, "ab", "c")]


def test_an_answer_ends_with_the_models_context(gpt2: Base, tmp_path: Path) -> None:
    """GPT-2 has no position for a token beyond it."""
    rows = [{"prompt": "a" * 120, "completion": "b" * 4}]
    training = write_rows(tmp_path / "long.jsonl", rows)
    spec = spec_for(samples=1, max_steps=1)
    (row,) = one(Samples, train(spec, gpt2, training, None, tmp_path / "run")).rows
    assert row["base"] == by_hand(gpt2, "a" * 120, 128 - 120)


def test_long_texts_are_cut(llama: Base) -> None:
    assert samples_module._head("x" * 2000) == "x" * 1000 + "…"
    assert samples_module._tail("y" + "x" * 1000) == "…" + "x" * 1000
    assert samples_module._head("short") == samples_module._tail("short") == "short"


def test_generation_draws_no_number_and_leaves_the_bases_habits_alone(llama: Base) -> None:
    llama.model.generation_config.update(do_sample=True, repetition_penalty=3.0, temperature=5.0, top_k=3)
    habits = llama.model.generation_config.to_dict()
    before = torch.get_rng_state()
    prompt = "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    answered = answer(llama, llama.tokenizer(prompt).input_ids, 12)
    assert answered == by_hand(llama, prompt, 12)
    assert torch.equal(torch.get_rng_state(), before)
    assert llama.model.generation_config.to_dict() == habits


def test_no_answer_goes_on_when_the_time_is_up(llama: Base, training: Path, tmp_path: Path, monkeypatch):
    prompt = llama.tokenizer("abc").input_ids
    assert len(llama.tokenizer(answer(llama, prompt, 64, until=time.monotonic())).input_ids) <= 1
    monkeypatch.setattr(samples_module, "SECONDS", -1.0)
    updates = list(train(spec_for(samples=3), llama, training, None, tmp_path / "run"))
    assert not [p for p in updates if isinstance(p, Samples)]
    assert [p.message for p in updates if isinstance(p, Note)][-1].endswith("0 of 3 were generated.")
    assert isinstance(updates[-1], Finished)


def test_a_base_that_cannot_generate_still_finishes(llama: Base, training: Path, tmp_path: Path, monkeypatch):
    def refuses(*arguments: Any, **options: Any) -> Any:
        raise NotImplementedError

    monkeypatch.setattr(type(llama.model), "generate", refuses)
    updates = list(train(spec_for(samples=2), llama, training, None, tmp_path / "run"))
    assert (
        "No sample answer could be generated for line 1"
        in [p for p in updates if isinstance(p, Note)][-1].message
    )
    assert isinstance(updates[-1], Finished)


def test_a_resumed_run_answers_the_same(
    llama: Base, training: Path, validation: Path, tmp_path: Path
) -> None:
    spec = spec_for(samples=2, adapter={"dropout": 0.2})
    whole = list(train(spec, llama, training, validation, tmp_path / "whole"))
    begun = train(spec, llama, training, validation, tmp_path / "begun")
    saved = next(p for p in begun if isinstance(p, Saved))
    begun.close()
    rest = list(train(spec, llama, training, validation, tmp_path / "rest", resume=saved.folder))
    assert one(Samples, rest) == one(Samples, whole)


@pytest.mark.parametrize("samples", [-1, 17, 1.5])
def test_a_number_of_rows_that_makes_no_sense_is_refused(samples) -> None:
    with pytest.raises(SpecError, match="samples"):
        read_spec(model="m", hyperparameters={"samples": samples})
