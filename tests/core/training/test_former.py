"""A run that trains on begins at the former model, bit for bit, whichever method trained that."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from olora_core.bases.loading import Base
from olora_core.errors import CheckpointError, ModelError
from olora_core.layers.adapter import adapters_off
from olora_core.methods import METHODS
from olora_core.progress import Finished, Note, Progress, Resolved, Saved, Step
from olora_core.specs import TrainSpec
from olora_core.training.export_checkpoint import export_checkpoint
from olora_core.training.peft_files import read_peft
from olora_core.training.train import train
from tests.core.loaded_bases import fresh_base
from tests.core.runs import chat_rows, one, preference_rows, spec_for
from tests.rows import write_rows

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
GOING_ON = {"lora", "olora", "pissa", "ba_lora", "sora", "melora", "rm_lora", "tt_lora"}
TOKENS = torch.arange(4, 44).view(2, 20)
LN2 = math.log(2)


@dataclass
class Trained:
    """A run to its end, and the model's logits (2, 20, vocabulary) before its first step and at its end."""

    updates: list[Progress]
    before: Tensor
    reference: Tensor
    """Before the first step, with the adapters off."""
    after: Tensor

    @property
    def folder(self) -> Path:
        return Path(one(Finished, self.updates).folder)

    @property
    def rank(self) -> int:
        return int(json.loads((self.folder / "adapter_config.json").read_text())["r"])

    @property
    def note(self) -> Note:
        (note,) = [u for u in self.updates if isinstance(u, Note) and "former model" in u.message]
        return note


Run = Callable[..., Trained]


def logits(base: Base) -> Tensor:
    training = base.model.training
    with torch.no_grad():
        made = base.model.eval()(TOKENS).logits.clone()
    base.model.train(training)
    return made


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "training.jsonl", chat_rows())


@pytest.fixture
def trained(tmp_path: Path, training: Path, llama: Base) -> Run:
    def run(spec: TrainSpec, former: Path | None = None, base: Base = llama, **options: Any) -> Trained:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        updates: list[Progress] = []
        seen: dict[str, Tensor] = {}
        arguments = {"training": training, "validation": None} | options
        for update in train(spec, base, folder=folder, former=former, **arguments):
            updates.append(update)
            if isinstance(update, Resolved):
                seen["before"] = logits(base)
                with adapters_off(base.model):
                    seen["reference"] = logits(base)
            if isinstance(update, Finished):
                seen["after"] = logits(base)
        return Trained(updates, **seen)

    return run


def spec(method: str, steps: int = 4, **settings: Any) -> TrainSpec:
    options = {"xgblora": {"steps_per_round": 1}}.get(method, {})
    return spec_for(method, adapter=options | settings.pop("adapter", {}), max_steps=steps, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_be_trained_on_by_another(trained: Run, method: str, llama: Base) -> None:
    pristine = logits(llama)
    first = trained(spec(method))
    assert not torch.equal(first.after, pristine)
    second = trained(spec("lora", adapter={"rank": 3}), former=first.folder)
    assert torch.equal(second.before, first.after)
    assert torch.equal(second.reference, first.after)
    assert not torch.equal(second.after, first.after)
    assert one(Finished, second.updates).certificate["passed"]
    assert second.rank == first.rank + 3
    assert second.note.data == {"exported_rank": second.rank, "goes_on": False}
    assert torch.equal(logits(llama), pristine)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_train_its_own_model_on(trained: Run, method: str) -> None:
    first = trained(spec(method))
    second = trained(spec(method), former=first.folder)
    assert torch.equal(second.before, first.after)
    assert torch.equal(second.reference, first.after)
    assert not torch.equal(second.after, first.after)
    assert one(Finished, second.updates).certificate["passed"]
    assert second.note.data is not None
    assert second.note.data["goes_on"] is (method in GOING_ON)
    assert (second.rank == first.rank) is (method in GOING_ON)


@pytest.mark.parametrize("folder", ["llama", "gpt2", "llama-bf16"])
def test_three_methods_in_a_row_add_up_to_one_lora(
    trained: Run, base_folders: dict[str, Path], folder: str
) -> None:
    dtype = torch.bfloat16 if folder.endswith("bf16") else torch.float32
    name = "bfloat16" if folder.endswith("bf16") else "float32"
    base = fresh_base(base_folders[folder], dtype=dtype)
    pristine = logits(base)
    first = trained(spec("olora", dtype=name), base=base)
    second = trained(spec("adalora", dtype=name, learning_rate=0.05), former=first.folder, base=base)
    third = trained(spec("pissa", dtype=name), former=second.folder, base=base)
    assert torch.equal(second.before, first.after)
    assert torch.equal(third.before, second.after)
    assert third.rank == first.rank + (second.rank - first.rank) + 8
    assert torch.equal(logits(base), pristine)
    plain = AutoModelForCausalLM.from_pretrained(base_folders[folder], dtype=torch.float32)
    served = PeftModel.from_pretrained(plain, third.folder)
    with torch.no_grad():
        found = served(TOKENS).logits
    moved = (third.after.float() - pristine.float()).norm()
    assert (found - third.after.float()).norm() < (0.3 if name == "bfloat16" else 1e-3) * moved


def test_after_two_methods_the_last_one_goes_on_in_its_own_tensors(trained: Run) -> None:
    first = trained(spec("olora"))
    second = trained(spec("lora"), former=first.folder)
    third = trained(spec("lora", adapter={"dropout": 0.1}), former=second.folder)
    assert torch.equal(third.before, second.after)
    assert torch.equal(third.reference, second.after)
    assert third.rank == second.rank == first.rank + 4
    manifest = json.loads((third.folder / "manifest.json").read_text())
    assert [link["adapter"]["method"] for link in manifest["links"]] == ["olora", "lora"]


def test_another_rank_of_the_same_method_is_another_adapter(trained: Run) -> None:
    first = trained(spec("lora"))
    second = trained(spec("lora", adapter={"rank": 2}), former=first.folder)
    assert torch.equal(second.before, first.after)
    assert second.rank == 6


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_the_reference_of_dpo_is_the_former_model(trained: Run, tmp_path: Path, method: str) -> None:
    first = trained(spec("olora"))
    pairs = write_rows(tmp_path / "pairs.jsonl", preference_rows())
    second = trained(spec(method, type="dpo"), former=first.folder, training=pairs)
    losses = [update.loss for update in second.updates if isinstance(update, Step)]
    assert losses[0] == pytest.approx(LN2, abs=1e-8)
    assert losses[-1] < losses[0] - 1e-6
    assert torch.equal(second.reference, first.after)


def test_a_truncated_export_has_a_certificate_of_its_own(trained: Run) -> None:
    first = trained(spec("olora"))
    second = trained(spec("lora", adapter={"export_rank": 4}), former=first.folder)
    assert second.rank == 4
    certificate = one(Finished, second.updates).certificate
    assert certificate["passed"]
    assert certificate["truncated"]["max_abs_logit_diff"] > certificate["max_abs_logit_diff"]


def test_merged_weights_hold_all_links(trained: Run) -> None:
    first = trained(spec("olora"))
    second = trained(spec("lora", adapter={"export": "merged"}), former=first.folder)
    assert one(Finished, second.updates).certificate["passed"]
    merged = AutoModelForCausalLM.from_pretrained(second.folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, second.after, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("before", "after"), [("all-linear", ["q_proj"]), (["q_proj"], ["q_proj", "up_proj"])]
)
def test_other_layers_may_be_adapted_than_before(trained: Run, before: Any, after: Any) -> None:
    first = trained(spec("olora", adapter={"target_modules": before}))
    second = trained(spec("olora", adapter={"target_modules": after}), former=first.folder)
    assert torch.equal(second.before, first.after)
    assert not torch.equal(second.after, first.after)
    assert one(Finished, second.updates).certificate["passed"]
    third = trained(spec("lora"), former=second.folder)
    assert torch.equal(third.before, second.after)


@pytest.mark.parametrize("method", ["olora", "lora"])
def test_an_interrupted_run_ends_with_the_same_bytes(
    trained: Run, training: Path, tmp_path: Path, llama: Base, method: str
) -> None:
    former = trained(spec("olora")).folder
    whole = trained(spec(method, steps=4), former=former)
    half = train(spec(method, steps=4), llama, training, None, tmp_path / "half", former=former)
    answer = None
    while True:
        update = half.send(answer)
        answer = "save" if isinstance(update, Step) and update.step == 2 else None
        if isinstance(update, Saved):
            checkpoint = update.folder
            break
    half.close()
    resumed = trained(spec(method, steps=4), former=former, resume=checkpoint)
    name = "adapter_model.safetensors"
    assert (resumed.folder / name).read_bytes() == (whole.folder / name).read_bytes()
    other = trained(spec("olora", steps=3)).folder
    with pytest.raises(CheckpointError, match="model to train on from"):
        trained(spec(method, steps=4), former=other, resume=checkpoint)
    with pytest.raises(CheckpointError, match="model to train on from"):
        trained(spec(method, steps=4), resume=checkpoint)


def test_a_manifest_of_an_earlier_version_tells_of_its_one_link(trained: Run) -> None:
    first = trained(spec("cola", steps=6))
    manifest = json.loads((first.folder / "manifest.json").read_text())
    del manifest["links"], manifest["trained_on_from"]
    (first.folder / "manifest.json").write_text(json.dumps(manifest))
    assert torch.equal(trained(spec("lora"), former=first.folder).before, first.after)


def test_a_model_of_another_base_is_refused(trained: Run, base_folders: dict[str, Path]) -> None:
    first = trained(spec("olora"))
    other = fresh_base(base_folders["gpt2"])
    with pytest.raises(ModelError, match="was trained on another base"):
        trained(spec("olora"), former=first.folder, base=other)


@pytest.mark.parametrize("damage", ["native/adapter.safetensors", "manifest.json"])
def test_a_damaged_folder_is_refused_with_a_sentence(trained: Run, damage: str) -> None:
    first = trained(spec("olora"))
    (first.folder / damage).write_bytes(b"{")
    with pytest.raises(ModelError, match="cannot be read"):
        trained(spec("olora"), former=first.folder)


def test_the_card_says_what_it_was_trained_on_from(trained: Run) -> None:
    first = trained(spec("olora"))
    second = trained(spec("lora"), former=first.folder)
    digest = json.loads((second.folder / "manifest.json").read_text())["trained_on_from"]
    card = (second.folder / "README.md").read_text()
    assert f"| trained on from | an adapter, SHA-256 `{digest}`; beside it, frozen: olora, rank 4 |" in card
    assert "trained on from" not in (first.folder / "README.md").read_text()


# --- checkpoints ---------------------------------------------------------------------------------------


@dataclass
class AtEpochEnd:
    checkpoint: Path
    logits: Tensor


@pytest.fixture
def first_epoch(tmp_path: Path, training: Path, llama: Base) -> Callable[..., AtEpochEnd]:
    """Trains two epochs; the checkpoint of the first one's end, and the logits there."""

    def run(method: str, **options: Any) -> AtEpochEnd:
        found = []
        asked = spec_for(method, adapter=options.pop("adapter", None), n_epochs=2)
        folder = tmp_path / f"two-epochs-{method}"
        for update in train(asked, llama, training, None, folder, **options):
            if isinstance(update, Saved) and update.epoch == 1:
                shutil.copytree(update.folder, tmp_path / f"kept-{method}")
                found.append(AtEpochEnd(tmp_path / f"kept-{method}", logits(llama)))
        (kept,) = found
        return kept

    return run


@pytest.mark.parametrize("method", METHODS)
def test_a_checkpoint_is_exported_without_data_and_optimizer(
    trained: Run, first_epoch: Callable[..., AtEpochEnd], tmp_path: Path, llama: Base, method: str
) -> None:
    kept = first_epoch(method)
    pristine = logits(llama)
    (kept.checkpoint / "optimizer.safetensors").unlink()
    finished = one(Finished, export_checkpoint(llama, kept.checkpoint, tmp_path / "exported"))
    assert finished.certificate["passed"]
    assert finished.certificate["exported_step"] == finished.steps == 3
    assert torch.equal(logits(llama), pristine)
    assert torch.equal(trained(spec("lora"), former=finished.folder).before, kept.logits)
    assert torch.equal(trained(spec("lora"), former=kept.checkpoint).before, kept.logits)
    card = (finished.folder / "README.md").read_text()
    assert "| exported_step | 3 |" in card


def test_a_checkpoint_of_a_run_that_trained_on_holds_all_links(
    trained: Run, first_epoch: Callable[..., AtEpochEnd], tmp_path: Path, llama: Base
) -> None:
    former = trained(spec("olora")).folder
    kept = first_epoch("lora", former=former)
    finished = one(Finished, export_checkpoint(llama, kept.checkpoint, tmp_path / "exported"))
    assert finished.certificate["passed"]
    assert torch.equal(trained(spec("lora"), former=finished.folder).before, kept.logits)
    assert torch.equal(trained(spec("lora"), former=kept.checkpoint).before, kept.logits)


def test_a_checkpoint_of_a_merged_run_becomes_a_model(
    first_epoch: Callable[..., AtEpochEnd], tmp_path: Path, llama: Base
) -> None:
    kept = first_epoch("olora", adapter={"export": "merged"})
    finished = one(Finished, export_checkpoint(llama, kept.checkpoint, tmp_path / "exported"))
    assert finished.folder.name == "model"
    assert finished.certificate["passed"]
    merged = AutoModelForCausalLM.from_pretrained(finished.folder, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(merged(TOKENS).logits, kept.logits, atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_an_earlier_version_says_that_it_cannot_be_exported(
    first_epoch: Callable[..., AtEpochEnd], tmp_path: Path, llama: Base
) -> None:
    kept = first_epoch("olora")
    state = json.loads((kept.checkpoint / "state.json").read_text())
    del state["record"]
    (kept.checkpoint / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="earlier version"):
        list(export_checkpoint(llama, kept.checkpoint, tmp_path / "exported"))


# --- adapters of PEFT's --------------------------------------------------------------------------------


def peft_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **changes}
    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    pair = {f"{name}.lora_A.weight": torch.ones(2, 32), f"{name}.lora_B.weight": torch.ones(32, 2)}
    save_file(pair | (tensors or {}), folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4 / math.sqrt(2)), ({"alpha_pattern": {"self_attn.q_proj": 7}}, 3.5)],
)
def test_the_scale_of_a_pair_is_pefts(tmp_path: Path, changes: Any, scale: float) -> None:
    link, tensors = read_peft(peft_folder(tmp_path / "peft", **changes))
    assert link.spec.scale == pytest.approx(scale)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "model.layers.0.self_attn.q_proj.A": (2, 32),
        "model.layers.0.self_attn.q_proj.B": (32, 2),
    }


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"peft_type": "LOHA"}, "its peft_type is 'LOHA'"),
        ({"bias": "all"}, "trains biases"),
        ({"use_dora": True}, "uses use_dora"),
        ({"modules_to_save": ["lm_head"]}, "uses modules_to_save"),
        ({"lora_alpha": 0}, "alpha for layer"),
        ({"lora_alpha": "much"}, "cannot be used"),
        ({"alpha_pattern": {"(a+)+$": 1}}, "not a plain name"),
        (
            {"tensors": {"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 9)}},
            "not a factor",
        ),
        ({"tensors": {"base_model.model.lm_head.lora_A.weight": torch.ones(2, 32)}}, "do not make a pair"),
        ({"tensors": {"base_model.model.lm_head.lora_A.weight": torch.full((2, 32), math.nan)}}, "finite"),
    ],
)
def test_what_is_more_or_less_than_plain_lora_is_refused(tmp_path: Path, changes: Any, problem: str) -> None:
    with pytest.raises(ModelError, match=re.escape(problem)) as caught:
        read_peft(peft_folder(tmp_path / "peft", **changes))
    assert caught.value.param == "model"


def test_layers_that_the_base_lacks_or_has_in_another_shape_are_refused(trained: Run, tmp_path: Path) -> None:
    elsewhere = {"base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 32)}
    elsewhere |= {"base_model.model.model.layers.9.self_attn.q_proj.lora_B.weight": torch.ones(32, 2)}
    with pytest.raises(ModelError, match="no such layer"):
        trained(spec("lora"), former=peft_folder(tmp_path / "one", elsewhere))
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    larger = {f"{name}.lora_A.weight": torch.ones(2, 48), f"{name}.lora_B.weight": torch.ones(48, 2)}
    with pytest.raises(ModelError, match="does not fit base model"):
        trained(spec("lora"), former=peft_folder(tmp_path / "two", larger))
