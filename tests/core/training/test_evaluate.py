"""Losses on held-out examples, and what a model says."""

from pathlib import Path

import pytest
import torch

from olora_core.bases.loading import Base
from olora_core.bases.sites import target_sites
from olora_core.data.examples import Examples
from olora_core.errors import ModelError
from olora_core.layers.adapter import adapters_off
from olora_core.methods import METHODS, build_adapters
from olora_core.progress import Finished, Phase, Step
from olora_core.training.evaluate import evaluate
from olora_core.training.samples import generate
from olora_core.training.train import train

from ..runs import spec_for, write_rows
from .test_losses import EXAMPLES, loss_by_transformers


def result_of(base: Base, examples: Examples, size: int, packing: bool) -> tuple[float, float, list[Phase]]:
    going, phases = evaluate(base, examples, size=size, tokens=4096, packing=packing), []
    while True:
        try:
            phases.append(next(going))
        except StopIteration as end:
            return *end.value, phases


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_the_loss_is_transformers_own_however_it_is_cut(llama, size, packing) -> None:
    loss, accuracy, _ = result_of(llama, EXAMPLES, size, packing)
    with torch.no_grad():
        expected = loss_by_transformers(llama.model) / EXAMPLES.trained_lengths.sum()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert 0 <= accuracy <= 1


def test_it_tells_how_far_it_is(llama) -> None:
    *_, phases = result_of(llama, EXAMPLES, 3, False)
    assert [(p.name, p.done, p.total) for p in phases] == [("evaluating", done, 8) for done in (3, 6, 8)]


def test_dropout_is_off_and_the_mode_comes_back(llama) -> None:
    expected = result_of(llama, EXAMPLES, 8, False)
    spec = spec_for("lora", adapter={"dropout": 0.9}).adapter
    method = METHODS["lora"](spec, seed=0, total_steps=1, schedule=lambda i, n: 1.0)
    adapters = build_adapters(method, llama.model, target_sites(llama.model, "auto"))
    for adapter in adapters.values():
        torch.nn.init.normal_(adapter.B)
    llama.model.train()
    before = torch.get_rng_state()
    first = result_of(llama, EXAMPLES, 8, False)
    assert first == result_of(llama, EXAMPLES, 8, False) != expected
    assert torch.equal(torch.get_rng_state(), before)
    assert llama.model.training
    with adapters_off(llama.model):
        assert result_of(llama, EXAMPLES, 8, False) == expected


QUESTION = [{"role": "user", "content": "Say it."}]


def test_an_answer_is_the_likeliest_tokens_one_by_one(llama: Base) -> None:
    ids = llama.tokenizer("<|im_start|>user\nSay it.<|im_end|>\n<|im_start|>assistant\n").input_ids
    answer: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            chosen = int(llama.model(torch.tensor([ids + answer])).logits[0, -1].argmax())
        if chosen == llama.tokenizer.eos_token_id:
            break
        answer.append(chosen)
    assert generate(llama, QUESTION, 12) == llama.tokenizer.decode(answer, skip_special_tokens=True).strip()


def test_a_trained_model_says_what_it_was_taught_and_stops(llama: Base, tmp_path: Path) -> None:
    rows = [{"messages": [*QUESTION, {"role": "assistant", "content": "Quite."}]}] * 4
    training = write_rows(tmp_path / "rows.jsonl", rows)
    before = generate(llama, QUESTION, 20)
    spec = spec_for(n_epochs=40, learning_rate=2e-2, adapter={"rank": 16, "alpha": 16})
    reported = []
    for progress in train(spec, llama, training, None, tmp_path / "run", checkpoint_seconds=3600):
        if isinstance(progress, Finished) or (isinstance(progress, Step) and progress.step == 40):
            reported.append(generate(llama, QUESTION, 20))
    assert reported == ["Quite.", "Quite."]
    assert before != "Quite."
    assert generate(llama, QUESTION, 20) == before  # the base was given back


def test_a_base_without_a_template_cannot_answer(llama: Base) -> None:
    llama.tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no chat template"):
        generate(llama, QUESTION, 4)
