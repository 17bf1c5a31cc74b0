"""The training generator: what it says, in which order, and what it leaves behind."""

import itertools
import json
import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from olora_core import methods
from olora_core.bases.loading import Base, load_base
from olora_core.bases.precision import bf16_is_faster, compute_dtype
from olora_core.errors import DataError, SpecError, TrainingError
from olora_core.layers.adapter import AdaptedLinear
from olora_core.methods import METHODS
from olora_core.methods.lora import LoRA
from olora_core.progress import Evaluated, Finished, Note, Phase, Resolved, Saved, Step
from olora_core.specs import Hyperparameters
from olora_core.training.schedule import schedule_of
from olora_core.training.train import train

from ..runs import chat_rows, losses, one, spec_for, write_rows


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "training.jsonl", chat_rows())


@pytest.fixture
def validation(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "validation.jsonl", chat_rows(20)[11:])


@pytest.fixture
def few_validation_rows(tmp_path: Path) -> Path:
    """So few that every step affords a quick evaluation."""
    return write_rows(tmp_path / "few.jsonl", chat_rows(13)[11:])


# --- updates -------------------------------------------------------------------------------------------


def test_a_run_ends_with_a_certified_adapter_and_learns(run, validation) -> None:
    updates = run(spec_for(n_epochs=8, learning_rate=1e-2), validation=validation)
    finished = updates[-1]
    assert isinstance(finished, Finished)
    assert finished.certificate["passed"]
    assert finished.metrics["valid_loss_after"] < 0.8 * finished.metrics["valid_loss_before"]
    assert finished.certificate["valid_loss_after"] == finished.metrics["valid_loss_after"]
    assert (finished.folder / "adapter_model.safetensors").is_file()
    manifest = json.loads((finished.folder / "manifest.json").read_text())
    assert manifest["certificate"]["passed"]


def test_the_parts_of_a_run_come_in_order(run, validation) -> None:
    updates = run(spec_for(n_epochs=1), validation=validation)
    kinds = [p.name if isinstance(p, Phase) else type(p).__name__ for p in updates]
    assert [kind for kind, _ in itertools.groupby(kinds)] == [
        "tokenising",
        "starting",
        "Resolved",
        "Note",
        "evaluating",
        "Evaluated",
        "Step",
        "evaluating",
        "Evaluated",
        "Saved",
        "exporting",
        "certifying",
        "Finished",
    ]


def test_slow_beginnings_show_signs_of_life(run) -> None:
    updates = run(spec_for(max_steps=1))
    assert [p.done for p in updates if isinstance(p, Phase) and p.name == "starting"] == list(range(1, 15))


def test_every_auto_becomes_a_number(run) -> None:
    hyperparameters = {"n_epochs": "auto", "batch_size": "auto", "micro_batch_size": "auto", "max_steps": 1}
    resolved = one(Resolved, run(spec_for(**hyperparameters)))
    assert resolved.examples == 11
    assert resolved.spec.hyperparameters.n_epochs == 9  # 100 // 11
    assert "auto" not in resolved.spec.hyperparameters.model_dump().values()
    assert len(resolved.targets) == 14  # seven linear layers in each of two blocks
    assert "model.layers.0.self_attn.q_proj" in resolved.targets
    # r (in + out) a layer: q, o 32→32; k, v 32→16; gate, up 32→48; down 48→32
    assert resolved.trained_parameters == 2 * 4 * (2 * 64 + 2 * 48 + 3 * 80)


def test_a_resolved_spec_is_taken_as_it_is(run) -> None:
    first = one(Resolved, run(spec_for(learning_rate="auto", learning_rate_multiplier=0.7, max_steps=1)))
    second = one(Resolved, run(first.spec))
    assert second.spec == first.spec
    assert second.why == []


@pytest.mark.parametrize(
    ("hyperparameters", "expected"),
    [
        ({"n_epochs": 2, "batch_size": 4}, 6),
        ({"n_epochs": 3, "batch_size": 11}, 3),
        ({"n_epochs": 2, "batch_size": 4, "max_steps": 4}, 4),
        ({"n_epochs": 1, "batch_size": 4, "max_steps": 400}, 3),
    ],
)
def test_the_number_of_steps(run, hyperparameters, expected) -> None:
    updates = run(spec_for(**hyperparameters))
    steps = [p for p in updates if isinstance(p, Step)]
    assert [s.step for s in steps] == list(range(1, expected + 1))
    assert all(s.total_steps == expected for s in steps)
    assert one(Finished, updates).steps == expected


def test_a_step_counts_its_tokens(run, llama, training) -> None:
    updates = run(spec_for(n_epochs=1))
    steps = [p for p in updates if isinstance(p, Step)]
    rows = [json.loads(line)["messages"] for line in training.read_text().splitlines()]
    texts = [llama.tokenizer.apply_chat_template(row, tokenize=False) for row in rows]
    assert sum(s.tokens for s in steps) == sum(
        len(llama.tokenizer(text, add_special_tokens=False).input_ids) for text in texts
    )
    # one token a byte, and the end of turn
    assert sum(s.trained_tokens for s in steps) == sum(len(row[1]["content"]) + 1 for row in rows)
    assert one(Finished, updates).trained_tokens == sum(s.trained_tokens for s in steps)
    assert [s.epoch for s in steps] == pytest.approx([1 / 3, 2 / 3, 1])


def test_validation_at_the_start_at_epoch_ends_and_in_quick_evaluations(run, validation) -> None:
    updates = run(spec_for(n_epochs=2, eval_steps=4), validation=validation)
    whole = {p.step: p.loss for p in updates if isinstance(p, Evaluated)}
    assert list(whole) == [0, 3, 4, 6]
    quick = {p.step: p.valid_loss for p in updates if isinstance(p, Step) if p.valid_loss is not None}
    # 9 rows forward cost as much as 3 rows of a step of 4, of which a fifth is spent: every fourth step.
    assert list(quick) == [4]
    assert quick[4] == pytest.approx(whole[4])  # the file is no larger than a quick evaluation


def test_without_a_validation_file_nothing_is_evaluated(run) -> None:
    updates = run(spec_for(n_epochs=1))
    assert not [p for p in updates if isinstance(p, Evaluated)]
    assert all(p.valid_loss is None for p in updates if isinstance(p, Step))
    assert one(Finished, updates).metrics["valid_loss_after"] is None


def test_the_first_evaluation_is_the_bases_own_loss(run, llama, validation) -> None:
    before = next(p for p in run(spec_for(n_epochs=1), validation=validation) if isinstance(p, Evaluated))
    total, count = 0.0, 0
    for line in validation.read_text().splitlines():
        question, answer = (m["content"] for m in json.loads(line)["messages"])
        head = f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        ids, answer_ids = (llama.tokenizer(text).input_ids for text in (head, f"{answer}<|im_end|>"))
        with torch.no_grad():
            logits = llama.model(torch.tensor([ids + answer_ids])).logits[0]
        log_p = logits.log_softmax(-1)[len(ids) - 1 : -1]
        total -= log_p[range(len(answer_ids)), answer_ids].sum().item()
        count += len(answer_ids)
    assert before.loss == pytest.approx(total / count, rel=1e-5)


def test_a_tiny_multiplier_is_remarked(run) -> None:
    spec = spec_for(learning_rate="auto", learning_rate_multiplier=2e-5, max_steps=1)
    assert any("learning_rate" in p.message for p in run(spec) if isinstance(p, Note) and p.level == "warn")


# --- the same run in other words -----------------------------------------------------------------------


def test_a_batch_trains_the_same_however_it_is_cut(run) -> None:
    whole = losses(run(spec_for(micro_batch_size=4, packing=False)))
    cuts = [{"micro_batch_size": size} for size in (1, 2, 3)] + [{"micro_batch_tokens": n} for n in (16, 40)]
    for cut in cuts:
        assert losses(run(spec_for(**{"micro_batch_size": 4} | cut))) == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_packing_trains_the_same(run, request, name) -> None:
    base = request.getfixturevalue(name)
    plain = losses(run(spec_for(packing=False), base=base))
    assert losses(run(spec_for(packing=True), base=base)) == pytest.approx(plain, rel=1e-5)


def test_the_same_seed_gives_the_same_losses_and_another_seed_others(run) -> None:
    spec = spec_for("lora", adapter={"dropout": 0.2})
    first = losses(run(spec))
    assert losses(run(spec)) == first
    assert losses(run(spec_for("lora", adapter={"dropout": 0.2}, seed=6))) != first


def test_what_a_driver_draws_changes_nothing_and_its_numbers_are_left_alone(
    llama, training, tmp_path, run
) -> None:
    spec = spec_for(adapter={"dropout": 0.2})
    undisturbed = losses(run(spec))
    torch.manual_seed(1)
    expected = torch.rand(4).tolist()
    torch.manual_seed(1)
    drawn, disturbed = [], []
    for progress in train(spec, llama, training, None, tmp_path / "disturbed"):
        if isinstance(progress, Step):
            disturbed.append(progress.loss)
            drawn += torch.rand(1).tolist() if len(drawn) < 4 else []
    assert disturbed == undisturbed
    assert drawn == expected


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize(("ratio", "total"), [(0.0, 7), (0.03, 50), (0.3, 11)])
def test_the_schedule_is_transformers(kind, ratio, total) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    theirs = get_scheduler(name, optimizer, math.ceil(ratio * total), total)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = schedule_of(Hyperparameters(schedule=kind, warmup_ratio=ratio))
    assert [ours(i, total) for i in range(1, total + 1)] == pytest.approx(expected, abs=1e-12)


def test_a_run_of_one_step_learns() -> None:
    assert schedule_of(Hyperparameters())(1, 1) == 1.0


def test_the_reported_rate_is_peak_times_schedule(run) -> None:
    updates = run(spec_for(warmup_ratio=0.5, learning_rate=0.01))
    rates = [p.learning_rate for p in updates if isinstance(p, Step)]
    assert rates == pytest.approx([0, 0.01 / 3, 0.02 / 3, 0.01, 0.02 / 3, 0.01 / 3])


# --- the base ------------------------------------------------------------------------------------------


def weights(base: Base) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in base.model.state_dict().items()}


def unchanged(base: Base, before: dict[str, torch.Tensor]) -> bool:
    after = base.model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_the_base_is_given_back_as_it_was(run, llama) -> None:
    before = weights(llama)
    run(spec_for())
    assert unchanged(llama, before)
    assert not llama.model.training


def test_leaving_the_loop_stops_the_run_and_gives_the_base_back(llama, training, tmp_path) -> None:
    before = weights(llama)
    progress = train(spec_for(), llama, training, None, tmp_path / "run")
    next(p for p in progress if isinstance(p, Step))
    assert any(isinstance(module, AdaptedLinear) for module in llama.model.modules())
    progress.close()
    assert unchanged(llama, before)
    assert not llama.model.training


def test_a_resident_base_serves_one_run_after_another(run, training, base_folders) -> None:
    resident = load_base(base_folders["llama"], name="tiny")
    run(spec_for("lora"), base=resident)
    fresh = load_base(base_folders["llama"], name="tiny")
    assert losses(run(spec_for(), base=resident)) == losses(run(spec_for(), base=fresh))


def test_the_next_run_on_a_base_does_not_run_it_before_the_first_step(llama, training, tmp_path) -> None:
    """What the first run found out about the model, it found out for all."""
    passes: list[torch.Size] = []
    llama.model.get_decoder().register_forward_pre_hook(
        lambda module, inputs, named: passes.append(named["input_ids"].shape), with_kwargs=True
    )
    before_the_first_step = []
    for number in range(2):
        passes.clear()
        progress = train(spec_for(), llama, training, None, tmp_path / str(number))
        while not isinstance(next(progress), Resolved):
            pass
        before_the_first_step.append(len(passes))
        progress.close()
    assert before_the_first_step[0] > 0
    assert before_the_first_step[1] == 0


# --- checkpoints ---------------------------------------------------------------------------------------


def test_a_wish_to_save_is_granted_next(llama, training, tmp_path) -> None:
    progress = train(spec_for(), llama, training, None, tmp_path / "run")
    step = next(p for p in progress if isinstance(p, Step))
    saved = progress.send("save")
    assert isinstance(saved, Saved)
    assert saved.step == step.step
    assert saved.metrics["train_loss"] == step.loss
    assert saved.folder == tmp_path / "run" / "checkpoints" / "step-00000001"
    assert (saved.folder / "manifest.json").is_file()
    progress.close()


def test_checkpoints_at_every_epochs_end_and_after_the_given_seconds(run, tmp_path) -> None:
    assert [p.step for p in run(spec_for()) if isinstance(p, Saved)] == [3, 6]
    updates = run(spec_for(n_epochs=1), checkpoint_seconds=0.0, folder=tmp_path / "often")
    assert [p.step for p in updates if isinstance(p, Saved)] == [1, 2, 3]
    kept = sorted(path.name for path in (tmp_path / "often" / "checkpoints").iterdir())
    assert kept == ["step-00000002", "step-00000003"]


def test_a_checkpoint_carries_openais_metrics(run, few_validation_rows) -> None:
    saved = [p for p in run(spec_for(n_epochs=1), validation=few_validation_rows) if isinstance(p, Saved)][-1]
    assert saved.metrics.keys() == {
        "step",
        "train_loss",
        "train_mean_token_accuracy",
        "valid_loss",
        "valid_mean_token_accuracy",
        "full_valid_loss",
        "full_valid_mean_token_accuracy",
    }


# --- methods' hooks ------------------------------------------------------------------------------------


class Recorder(LoRA):
    """LoRA that writes down what is asked of it."""

    needs_logits = True
    calls: ClassVar[list[Any]] = []
    penalties: ClassVar[list[float]] = []

    def on_attached(self, adapters: Any) -> None:
        self.calls.append(("on_attached", len(adapters)))
        self.adapters = adapters

    def penalty(self, outputs: Any, reference: Any) -> torch.Tensor:
        self.calls.append("penalty")
        assert outputs.logits.shape[:2] == outputs.labels.shape
        if not self.finished_steps:
            assert torch.equal(outputs.logits, reference())
        assert outputs.logits.requires_grad
        return self.weight * sum(p.square().sum() for a in self.adapters.values() for p in a.parameters())

    weight = 0.0

    def after_backward(self, step: int) -> None:
        self.calls.append(("after_backward", step))
        self.before = [p.detach().clone() for a in self.adapters.values() for p in a.parameters()]

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        parameters = [p for a in self.adapters.values() for p in a.parameters()]
        moved = any(not torch.equal(p, b) for p, b in zip(parameters, self.before, strict=True))
        assert all(p.grad is not None for p in parameters)
        self.calls.append(("after_step", step, moved))


@pytest.fixture
def recorder(monkeypatch) -> type[Recorder]:
    monkeypatch.setitem(methods.METHODS, "lora", Recorder)
    monkeypatch.setattr(Recorder, "calls", [])
    return Recorder


def test_hooks_come_in_order_and_once_a_step(run, recorder) -> None:
    assert METHODS["lora"] is recorder
    run(spec_for("lora", n_epochs=1, warmup_ratio=0.0))
    assert recorder.calls == [
        ("on_attached", 14),
        *["penalty"] * 2,
        ("after_backward", 1),
        ("after_step", 1, True),
        *["penalty"] * 2,
        ("after_backward", 2),
        ("after_step", 2, True),
        *["penalty"] * 2,
        ("after_backward", 3),
        ("after_step", 3, True),
    ]


def test_a_penalty_moves_the_weights_but_is_not_in_the_loss(run, recorder, monkeypatch) -> None:
    spec = spec_for("lora", warmup_ratio=0.0)
    without = run(spec)
    monkeypatch.setattr(recorder, "weight", 100.0)
    with_penalty = run(spec)
    assert losses(with_penalty)[0] == losses(without)[0]
    assert losses(with_penalty)[2] != losses(without)[2]


class Rates(LoRA):
    """LoRA whose groups have rates of their own."""

    seen: ClassVar[list[list[float]]] = []

    def param_groups(self, adapters: Any) -> list[dict[str, Any]]:
        adapters = list(adapters.values())
        return [
            self.group([a.A for a in adapters], lr_multiplier=0.5),
            self.group([a.B for a in adapters], lr_by="method", lr_factor=3.0),
        ]

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        self.seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.param_groups[0]["lr_factor"] *= 0.1


def test_groups_have_their_own_rates_written_anew(run, monkeypatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Rates)
    monkeypatch.setattr(Rates, "seen", [])
    run(spec_for("lora", n_epochs=1, learning_rate=0.01, warmup_ratio=0.0))
    assert Rates.seen == [
        pytest.approx([0.005, 0.03]),
        pytest.approx([0.005 * 2 / 3 * 0.1, 0.03]),
        pytest.approx([0.005 * 1 / 3 * 0.01, 0.03]),
    ]


# --- errors --------------------------------------------------------------------------------------------


class Explodes(LoRA):
    """LoRA whose gradient is not finite in step 5."""

    parameters: ClassVar[list[torch.nn.Parameter]] = []
    before: ClassVar[list[torch.Tensor]] = []

    def on_attached(self, adapters: Any) -> None:
        self.parameters[:] = [p for adapter in adapters.values() for p in adapter.parameters()]

    def penalty(self, outputs: Any, reference: Any) -> torch.Tensor | None:
        if self.finished_steps < 4:
            return None
        self.before[:] = [p.detach().clone() for p in self.parameters]
        return outputs.loss * float("inf")

    def after_backward(self, step: int) -> None:
        assert step < 5, "a step that is dropped calls no hook"


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_last_checkpoint(
    llama, training, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Explodes)
    before = weights(llama)
    progress = train(spec_for("lora"), llama, training, None, tmp_path / "run", checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match="Step 5 is not finite and was not applied") as caught:
        list(progress)
    assert caught.value.code == "not_finite"
    assert "Lower the learning rate (now 0.002)" in caught.value.message
    assert "The checkpoint of step 4 is kept." in caught.value.message
    assert len(Explodes.before) == 28
    assert all(torch.equal(p, was) for p, was in zip(Explodes.parameters, Explodes.before, strict=True))
    newest = sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]
    assert newest.name == "step-00000004"
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "adapter.safetensors").values())
    assert unchanged(llama, before)


class Spoils(LoRA):
    """LoRA whose second step, itself finite, leaves a weight that is not."""

    def on_attached(self, adapters: Any) -> None:
        self.first = next(iter(adapters.values()))

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        if step == 2:
            self.first.A.data[0, 0] = float("inf")


def test_an_adapter_that_is_not_finite_is_never_saved(llama, training, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Spoils)
    progress = train(spec_for("lora"), llama, training, None, tmp_path / "run", checkpoint_seconds=0.0)
    with pytest.raises(TrainingError, match="not finite after step 2"):
        list(progress)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_validation_loss_that_is_not_finite_ends_the_run_with_a_sentence(
    llama, training, few_validation_rows, tmp_path, monkeypatch
) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Spoils)
    progress = train(
        spec_for("lora"), llama, training, few_validation_rows, tmp_path / "run", checkpoint_seconds=0.0
    )
    with pytest.raises(TrainingError, match=r"The validation loss after step 2 is nan\..*of step 1 is kept"):
        list(progress)


class Hungry(LoRA):
    """LoRA that needs more memory than there is."""

    def penalty(self, outputs: Any, reference: Any) -> torch.Tensor | None:
        raise torch.OutOfMemoryError("the device is full")


def test_too_little_memory_names_the_remedy(run, llama, monkeypatch) -> None:
    monkeypatch.setitem(methods.METHODS, "lora", Hungry)
    before = weights(llama)
    with pytest.raises(
        TrainingError, match=r"not even one example at a time .* Lower hyperparameters\.context_length"
    ) as caught:
        run(spec_for("lora"))
    assert caught.value.code == "out_of_memory"
    assert unchanged(llama, before)


def test_a_base_of_another_dtype_is_refused(run, bf16_llama) -> None:
    with pytest.raises(SpecError, match="bfloat16"):
        run(spec_for(dtype="float32"), base=bf16_llama)
    resolved = one(Resolved, run(spec_for(dtype="auto", max_steps=1), base=bf16_llama))
    assert resolved.spec.hyperparameters.dtype == "bfloat16"


def test_a_bad_file_is_refused_before_anything_is_trained(run, tmp_path) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*chat_rows(), {"messages": []}])
    with pytest.raises(DataError, match="Line 12"):
        run(spec_for(), training=bad)
    other = write_rows(tmp_path / "other.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError, match="validation file is in completion format"):
        run(spec_for(), validation=other)


def test_the_validation_files_trouble_is_named_as_its_own(run, tmp_path) -> None:
    long = write_rows(tmp_path / "long.jsonl", [{"prompt": "a" * 200, "completion": "b"}])
    fine = write_rows(tmp_path / "fine.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(DataError) as caught:
        run(spec_for(), training=fine, validation=long)
    assert (caught.value.code, caught.value.param) == ("invalid_validation_file", "validation_file")


# --- precision -----------------------------------------------------------------------------------------


def test_a_named_dtype_is_computed_in(base_folders) -> None:
    assert compute_dtype(spec_for(dtype="bfloat16"), base_folders["llama"]) is torch.bfloat16
    assert compute_dtype(spec_for(dtype="float32"), base_folders["llama-bf16"]) is torch.float32


def test_auto_keeps_an_fp32_checkpoint_and_times_a_bf16_one(base_folders) -> None:
    spec = spec_for(dtype="auto")
    assert compute_dtype(spec, base_folders["llama"]) is torch.float32
    faster = torch.bfloat16 if bf16_is_faster("cpu", 32, 48) else torch.float32
    assert compute_dtype(spec, base_folders["llama-bf16"]) is faster


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_bf16_training_follows_fp32_closely(run, bf16_llama, base_folders, method) -> None:
    wide = load_base(base_folders["llama-bf16"], name="tiny", dtype=torch.float32)
    fp32 = losses(run(spec_for(method), base=wide))
    bf16 = losses(run(spec_for(method, dtype="bfloat16"), base=bf16_llama))
    assert bf16 == pytest.approx(fp32, rel=0.02)


def test_a_checkpoint_tells_what_was_measured_at_its_own_step(run, validation) -> None:
    updates = run(spec_for(n_epochs=1), validation=validation, checkpoint_seconds=0)
    seen = {p.step: p.valid_loss for p in updates if isinstance(p, Step)}
    saved = [p for p in updates if isinstance(p, Saved)]
    assert [p.step for p in saved] == [1, 2, 3]
    assert [p.metrics.get("valid_loss") for p in saved] == [seen[p.step] for p in saved]
    assert ["full_valid_loss" in p.metrics for p in saved] == [False, False, True]
