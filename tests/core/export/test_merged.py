"""Merged weights: the whole model in a folder that plain transformers loads, and what rounding took of it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites
from olora_core.errors import CertificateError, SpecError
from olora_core.export.certificate import certify_merged
from olora_core.export.manifest import RunRecord
from olora_core.export.merged import Merged, check_mergeable, export_merged
from olora_core.layers.adapter import Adapter, adapters_off, bare_modules
from olora_core.methods import METHODS
from olora_core.progress import Finished, Note
from olora_core.specs import read_spec

from ..runs import OPTIONS, chat_rows, one, spec_for, train, write_rows
from .test_adapter import trained
from .test_certificate import ROWS

KINDS = ("none", "nf4", "int8", "torchao-int8", "torchao-fp8")


def exported(
    base: Base, folder: Path, method: str = "lora", *, size: float = 0.05, **options: object
) -> tuple[dict[str, Adapter], Merged]:
    chosen = {"method": method, "rank": 4, "alpha": 6, "export": "merged"} | OPTIONS.get(method, {})
    spec = read_spec(model="tiny", adapter=chosen | options)
    adapters = trained(base, spec, size=size)
    return adapters, export_merged(base, adapters, folder, RunRecord(spec, spec))


def loaded(folder: Path, dtype: Any = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


@pytest.fixture(params=["llama", "tied_llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


# --- what a loader gets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_plain_transformers_gives_the_trained_models_logits(
    base: Base, tmp_path: Path, method: str, token_rows: Tensor
) -> None:
    exported(base, tmp_path / "model", method)
    theirs = loaded(tmp_path / "model")
    torch.testing.assert_close(theirs(token_rows).logits, base.model(token_rows).logits, rtol=0, atol=1e-5)
    with adapters_off(base.model):
        assert (theirs(token_rows).logits - base.model(token_rows).logits).abs().max() > 0.01


def test_an_update_without_a_pair_is_merged_too(base: Base, tmp_path: Path, token_rows: Tensor) -> None:
    adapters, _ = exported(base, tmp_path / "model", "mora", type=6)
    assert any(adapter.pair() is None for adapter in adapters.values())
    theirs = loaded(tmp_path / "model")
    torch.testing.assert_close(theirs(token_rows).logits, base.model(token_rows).logits, rtol=0, atol=1e-5)


def test_an_untied_lm_head_is_merged_and_a_tied_one_refused_by_name(
    llama: Base, tied_llama: Base, tmp_path: Path, token_rows: Tensor
) -> None:
    exported(llama, tmp_path / "model", target_modules=["lm_head", "o_proj"])
    theirs = loaded(tmp_path / "model")
    torch.testing.assert_close(theirs(token_rows).logits, llama.model(token_rows).logits, rtol=0, atol=1e-5)
    with pytest.raises(SpecError, match=r"'lm_head'.*tied to the token embedding"):
        exported(tied_llama, tmp_path / "tied", target_modules=["lm_head", "o_proj"])


def test_the_base_in_memory_is_not_touched(base: Base, tmp_path: Path) -> None:
    exported(base, tmp_path / "model")
    fresh = loaded(base.folder)
    for path, module in bare_modules(base.model):
        for name, tensor in module.named_parameters(recurse=False):
            assert torch.equal(tensor, fresh.get_submodule(path).get_parameter(name))


def test_configs_and_tokenizer_come_along(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "model")
    folder = tmp_path / "model"
    before, after = (json.loads((f / "config.json").read_text()) for f in (llama.folder, folder))
    assert after == before
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == llama.tokenizer.chat_template
    native = load_file(folder / "native" / "adapter.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert torch.equal(native[f"{name}.A"], adapters[name].A)
    assert not list(folder.glob("adapter_*"))


def test_a_folder_that_exists_is_not_written_over(llama: Base, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    with pytest.raises(OSError, match="other"):
        exported(llama, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["kept"]


# --- rounding ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e-2, 1e-3])
def test_what_rounding_takes_is_reported(bf16_llama: Base, tmp_path: Path, size: float) -> None:
    adapters, merged = exported(bf16_llama, tmp_path / "model", size=size)
    lost = changed = 0.0
    theirs = dict(loaded(tmp_path / "model", "auto").named_parameters())
    for name, adapter in adapters.items():
        change = 6 / 4 * adapter.B.detach().double() @ adapter.A.detach().double()
        exact = bf16_llama.model.get_submodule(name).weight.double() + change
        written = theirs[f"{name}.weight"].detach()
        assert written.dtype == torch.bfloat16
        # The nearest number, or one that is as near.
        assert (written.double() - exact).abs().sum() <= 1.0001 * (
            exact.bfloat16().double() - exact
        ).abs().sum()
        lost += float((written.double() - exact).square().sum())
        changed += float(change.square().sum())
    assert merged.dtype == "bfloat16"
    assert merged.rounding_loss == pytest.approx((lost / changed) ** 0.5, rel=1e-3)
    assert merged.rounding_loss > 0.01
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["export"]["rounding_loss"] == merged.rounding_loss
    assert (
        f"Rounding lost\n{merged.rounding_loss:.2%} of the update"
        in (tmp_path / "model" / "README.md").read_text()
    )


def test_in_fp32_nothing_is_lost_but_fp32s_own_rounding(llama: Base, tmp_path: Path) -> None:
    adapters, merged = exported(llama, tmp_path / "model")
    assert (merged.dtype, merged.rounding_loss) == ("float32", 0.0)
    files = load_file(tmp_path / "model" / "model.safetensors")
    for name, adapter in adapters.items():
        W = llama.model.get_submodule(name).weight.double()
        change = 6 / 4 * adapter.B.detach().double() @ adapter.A.detach().double()
        lost = files[f"{name}.weight"].double() - (W + change)
        assert lost.norm() < 1e-5 * change.norm()


def test_an_update_of_nothing_loses_nothing(bf16_llama: Base, tmp_path: Path, token_rows: Tensor) -> None:
    _, merged = exported(bf16_llama, tmp_path / "model", "mora", size=0.0)
    assert merged.rounding_loss == 0
    with adapters_off(bf16_llama.model):
        expected = bf16_llama.model(token_rows).logits
    assert torch.equal(loaded(tmp_path / "model", "auto")(token_rows).logits, expected)


@pytest.mark.parametrize(("name", "level"), [("llama", "info"), ("bf16_llama", "warn")])
def test_a_runs_owner_is_told_what_rounding_took(request, tmp_path: Path, name: str, level: str) -> None:
    base = request.getfixturevalue(name)
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    dtype = str(base.dtype).removeprefix("torch.")
    spec = spec_for("lora", adapter={"export": "merged"}, dtype=dtype)
    said = list(train(spec, base, training, None, tmp_path / "run"))
    (note,) = [p for p in said if isinstance(p, Note) and "of the update" in p.message]
    assert note.level == level
    assert ("adapter.export = 'adapter'" in note.message) is (level == "warn")
    done = one(Finished, said)
    assert done.folder == tmp_path / "run" / "model"
    assert done.certificate["passed"]
    assert done.certificate["as_written"]["dtype"] == dtype
    assert f"As stored, in {dtype}: largest logit difference" in (done.folder / "README.md").read_text()
    assert json.loads((done.folder / "manifest.json").read_text())["certificate"] == done.certificate


# --- the certificate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "tied_llama", "bf16_llama", "gpt2"])
@pytest.mark.parametrize(("method", "options"), [("olora", {}), ("mora", {"type": 6})])
def test_what_was_trained_passes_and_the_rounded_files_own_figures_stand_beside(
    request, tmp_path: Path, name: str, method: str, options: dict[str, Any]
) -> None:
    base = request.getfixturevalue(name)
    adapters, _ = exported(base, tmp_path / "model", method, **options)
    certificate = certify_merged(base, adapters, tmp_path / "model", ROWS)
    assert certificate["passed"]
    assert certificate["max_abs_logit_diff"] <= 0.01 * certificate["bound"]
    beside = certificate["as_written"]
    assert beside["dtype"] == str(base.dtype).removeprefix("torch.")
    assert beside["max_abs_logit_diff"] == pytest.approx(
        largest_difference(base, adapters, tmp_path / "model"), rel=0.02, abs=1e-5
    )
    assert (beside["max_abs_logit_diff"] > certificate["bound"]) is (name == "bf16_llama")
    assert json.loads(json.dumps(certificate)) == certificate


def largest_difference(base: Base, adapters: dict[str, Adapter], folder: Path) -> float:
    """Largest difference of the files' logits from the logits of W + ΔW, both in float64."""
    exact, files = loaded(base.folder).double(), loaded(folder).double()
    with torch.no_grad():
        for name, adapter in adapters.items():
            layer = exact.get_submodule(name)
            change = adapter.delta_weight().double()
            layer.weight += change if isinstance(layer, nn.Linear) else change.T
        rows = [torch.tensor([row]) for row in ROWS]
        return max(float((exact(row).logits - files(row).logits).abs().max()) for row in rows)


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def adapted_weight(tensors: dict[str, Tensor]) -> Tensor:
    return tensors[next(n for n in sorted(tensors) if "up_proj.weight" in n or "c_fc.weight" in n)]


def swap_blocks(tensors: dict[str, Tensor]) -> None:
    one, other = sorted(n for n in tensors if "o_proj.weight" in n or "attn.c_proj.weight" in n)
    tensors[one], tensors[other] = tensors[other], tensors[one]


FAULTS: dict[str, Callable[[Path], object]] = {
    "a wrong number": lambda f: change_tensors(f, lambda t: adapted_weight(t).view(-1)[3:4].add_(0.5)),
    "a wrong number in a norm": lambda f: change_tensors(
        f, lambda t: t[next(n for n in sorted(t) if "norm" in n or "ln_" in n)][2:3].add_(0.5)
    ),
    "a NaN": lambda f: change_tensors(f, lambda t: adapted_weight(t).view(-1)[:1].fill_(float("nan"))),
    "two blocks swapped": lambda f: change_tensors(f, swap_blocks),
    "a tensor missing": lambda f: change_tensors(f, lambda t: t.pop(sorted(t)[-1])),
    "half a file": lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:5000]
    ),
    "no file": lambda f: (f / "model.safetensors").unlink(),
    "no config": lambda f: (f / "config.json").unlink(),
    "no tokenizer": lambda f: [path.unlink() for path in f.glob("tokenizer*")],
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["bf16_llama", "gpt2"])
def test_a_planted_fault_is_caught(request, tmp_path: Path, name: str, fault: str) -> None:
    base = request.getfixturevalue(name)
    adapters, _ = exported(base, tmp_path / "model")
    FAULTS[fault](tmp_path / "model")
    with pytest.raises(CertificateError, match=r"cannot be read back|is not the one that was trained"):
        certify_merged(base, adapters, tmp_path / "model", ROWS)


def test_the_base_shipped_as_the_trained_model_is_caught(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "model")
    original = (llama.folder / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").write_bytes(original)
    with pytest.raises(CertificateError, match="is not the one that was trained"):
        certify_merged(llama, adapters, tmp_path / "model", ROWS)


# --- quantised bases ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"), [("wide-llama", kind) for kind in KINDS[1:]] + [("wide-gpt2", "int8")]
)
def test_a_quantised_base_is_merged_into_what_its_bits_stand_for(
    base_folders, tmp_path: Path, token_rows: Tensor, name: str, kind: str
) -> None:
    base = load_base(base_folders[name], name="tiny", quantization=kind)
    adapters, merged = exported(base, tmp_path / "model", target_modules="auto")
    theirs = loaded(tmp_path / "model", "auto")
    assert merged.dtype == "float32"
    with torch.no_grad():
        got, expected = theirs(token_rows).logits, base.model(token_rows).logits
    # LLM.int8 rounds each layer's input as well.
    assert (got - expected).abs().max() < (5e-2 if kind == "int8" else 1e-4) * expected.abs().max()
    manifest = json.loads((tmp_path / "model" / "manifest.json").read_text())
    assert manifest["export"]["dequantized"] is True
    assert "dequantised, not as in" in (tmp_path / "model" / "README.md").read_text()
    assert "quantization_config" not in json.loads((tmp_path / "model" / "config.json").read_text())
    certificate = certify_merged(base, adapters, tmp_path / "model", ROWS)
    assert certificate["max_abs_logit_diff"] <= 0.05 * certificate["bound"]
    assert certificate["as_written"]["max_abs_logit_diff"] <= certificate["bound"]


def test_a_layer_without_an_adapter_is_multiplied_out_as_well(base_folders, tmp_path: Path) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization="torchao-int8")
    adapters, _ = exported(base, tmp_path / "model", target_modules=["q_proj"])
    layer = base.model.model.layers[0].mlp.up_proj
    files = load_file(tmp_path / "model" / "model.safetensors")
    expected = layer.weight.dequantize(torch.float32)
    assert torch.equal(files["model.layers.0.mlp.up_proj.weight"], expected)
    assert certify_merged(base, adapters, tmp_path / "model", ROWS)["passed"]


def test_a_base_that_is_quantised_in_its_files_is_refused_before_training(
    base_folders, tmp_path: Path
) -> None:
    quantised = load_base(base_folders["wide-llama"], name="tiny", quantization="int8")
    folder = tmp_path / "quantised"
    quantised.model.save_pretrained(folder)
    quantised.tokenizer.save_pretrained(folder)
    base = load_base(folder, name="tiny")
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    spec = spec_for("lora", adapter={"export": "merged"})
    with pytest.raises(SpecError, match="quantised in its files") as caught:
        list(train(spec, base, training, None, tmp_path / "run"))
    assert caught.value.param == "adapter.export"
    assert "adapter.export = 'adapter'" in caught.value.message


# --- what is refused ---------------------------------------------------------------------------------------


def test_layers_that_share_a_weight_are_refused_by_name(llama: Base) -> None:
    blocks = llama.model.model.layers
    blocks[1].mlp.up_proj.weight = blocks[0].mlp.up_proj.weight
    sites = target_sites(llama.model, ["up_proj"])
    check_mergeable(spec_for("lora"), llama, sites)
    with pytest.raises(
        SpecError, match=r"layers\.0\.mlp\.up_proj' shares its weight with .*layers\.1"
    ) as caught:
        check_mergeable(spec_for("lora", adapter={"export": "merged"}), llama, sites)
    assert caught.value.param == "adapter.export"
    check_mergeable(
        spec_for("lora", adapter={"export": "merged"}), llama, target_sites(llama.model, ["o_proj"])
    )


def test_merged_weights_have_no_rank_to_truncate_and_none_that_is_too_wide() -> None:
    with pytest.raises(SpecError, match="leave one of the two out") as caught:
        read_spec(model="m", adapter={"export": "merged", "export_rank": 8})
    assert caught.value.param == "adapter.export_rank"
    assert read_spec(model="m", adapter={"export": "merged", "rank": 600}).adapter.rank == 600
    with pytest.raises(SpecError, match=r"adapter\.export = 'merged'"):
        read_spec(model="m", adapter={"rank": 600})
