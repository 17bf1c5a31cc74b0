"""The exported folder: what is in it, and that plain PEFT makes the trained model of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from olora_core.bases.loading import Base
from olora_core.bases.sites import target_sites
from olora_core.export.adapter import exact_pairs, export_adapter, record_certificate, truncated
from olora_core.export.card import sparkline
from olora_core.export.manifest import Export, RunRecord
from olora_core.layers.adapter import Adapter, LowRank
from olora_core.methods import METHODS, build_adapters
from olora_core.methods.lora import LoRAAdapter
from olora_core.specs import TrainSpec, read_spec
from olora_core.specs.serving import server_rank

from ..each_method.test_methods import randomise
from ..runs import OPTIONS

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

CONFIG_KEYS = {
    "peft_type",
    "task_type",
    "base_model_name_or_path",
    "revision",
    "r",
    "lora_alpha",
    "target_modules",
    "bias",
    "lora_dropout",
    "fan_in_fan_out",
    "use_rslora",
    "init_lora_weights",
    "modules_to_save",
    "inference_mode",
}
REFUSED = [("adalora", True), ("tt_lora", True), ("mora", True)]
"""Methods with a scale of their own, and rslora."""


def spec_for(method: str, **adapter: object) -> TrainSpec:
    chosen = {"method": method, "rank": 4, "alpha": 6} | OPTIONS.get(method, {}) | adapter
    return read_spec(model="tiny", adapter=chosen)


def trained(base: Base, spec: TrainSpec, *, size: float = 0.05) -> dict[str, Adapter]:
    """Adapters as training would leave them, attached to the base."""
    method = METHODS[spec.adapter.method](spec.adapter, seed=0, total_steps=10, schedule=lambda i, n: 1.0)
    adapters = build_adapters(method, base.model, target_sites(base.model, spec.adapter.target_modules))
    randomise(adapters, size)
    return adapters


def exported(
    base: Base, folder: Path, method: str = "olora", **options: object
) -> tuple[dict[str, Adapter], Export]:
    spec = spec_for(method, **options)
    adapters = trained(base, spec)
    return adapters, export_adapter(base, adapters, folder, RunRecord(spec, spec))


def reloaded(base: Base, folder: Path) -> PeftModel:
    """The files on a fresh base, by plain PEFT; a missing or unused tensor is an error."""
    fresh = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    return PeftModel.from_pretrained(fresh, folder)


@pytest.fixture(params=["llama", "tied_llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


# --- what a loader gets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "rslora"),
    [(method, rslora) for method in METHODS for rslora in (False, True) if (method, rslora) not in REFUSED],
)
def test_plain_peft_gives_the_trained_models_logits(
    base: Base, tmp_path: Path, method: str, rslora: bool, token_rows: Tensor
) -> None:
    exported(base, tmp_path / "adapter", method, rslora=rslora)
    expected = base.model(token_rows).logits
    theirs = reloaded(base, tmp_path / "adapter")
    torch.testing.assert_close(theirs(token_rows).logits, expected, rtol=0, atol=1e-5)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(merged(token_rows).logits, expected, rtol=0, atol=1e-5)


def test_peft_loads_it_on_meta_tensors_too(llama: Base, tmp_path: Path, token_rows: Tensor) -> None:
    """PEFT's own OLoRA files crash here, for it wants to run the QR again."""
    exported(llama, tmp_path / "adapter")
    fresh = AutoModelForCausalLM.from_pretrained(llama.folder)
    theirs = PeftModel.from_pretrained(fresh, tmp_path / "adapter", low_cpu_mem_usage=True)
    torch.testing.assert_close(theirs(token_rows).logits, llama.model(token_rows).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_the_config_holds_exactly_what_every_loader_accepts(base: Base, tmp_path: Path, method: str) -> None:
    _, export = exported(base, tmp_path / "adapter", method)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config.keys() == CONFIG_KEYS
    rank = {"olora": 8, "pissa": 8, "melora": 8, "ba_lora": 8, "prilora": 6}.get(method, 4)
    if method == "mora":
        rank = 25 if base.name == "tiny-gpt2" else 18  # √(4 (32 + 128)), √(4 (32 + 48))
    assert export.rank == config["r"] == config["lora_alpha"] == rank
    assert config["fan_in_fan_out"] is (base.name == "tiny-gpt2")
    assert config["init_lora_weights"] is True
    assert config["base_model_name_or_path"] == base.name
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
    assert config["target_modules"] == export.target_modules


def test_tensors_are_fp32_of_one_rank_and_named_as_loaders_look_for_them(llama: Base, tmp_path: Path) -> None:
    exported(llama, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    tensors = load_file(path)
    assert len(tensors) == 2 * 14
    prefix = "base_model.model.model.layers.0.mlp.down_proj."
    assert tensors[prefix + "lora_A.weight"].shape == (8, 48)
    assert tensors[prefix + "lora_B.weight"].shape == (32, 8)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


@pytest.mark.parametrize("method", METHODS)
def test_factors_cast_to_bf16_change_the_update_by_less_than_one_percent(
    base: Base, tmp_path: Path, method: str
) -> None:
    adapters = trained(base, spec_for(method), size=1e-3)
    for pair in exact_pairs(adapters).values():
        exact = pair.B.double() @ pair.A.double()
        rounded = pair.B.bfloat16().double() @ pair.A.bfloat16().double()
        assert (rounded - exact).norm() < 0.01 * exact.norm()


def test_partners_that_servers_fuse_are_completed_with_zeros(
    llama: Base, tmp_path: Path, token_rows: Tensor
) -> None:
    _, export = exported(llama, tmp_path / "adapter", target_modules=["q_proj", "up_proj"])
    assert set(export.target_modules) == {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 2 * 5
    for name, tensor in tensors.items():
        assert bool(tensor.any()) == ("q_proj" in name or "up_proj" in name), name
    expected = llama.model(token_rows).logits
    torch.testing.assert_close(
        reloaded(llama, tmp_path / "adapter")(token_rows).logits, expected, rtol=0, atol=1e-5
    )


def test_a_loader_selects_only_the_layers_that_were_adapted(
    llama: Base, tmp_path: Path, token_rows: Tensor
) -> None:
    """Block 0 has layers of the same names."""
    _, export = exported(llama, tmp_path / "adapter", target_modules=r"model\.layers\.1\.mlp\.down_proj")
    assert export.target_modules == ["1.mlp.down_proj"]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(tensors) == 2
    assert all(tensor.any() for tensor in tensors.values())
    expected = llama.model(token_rows).logits
    torch.testing.assert_close(
        reloaded(llama, tmp_path / "adapter")(token_rows).logits, expected, rtol=0, atol=1e-5
    )


def test_an_untied_lm_head_travels_too(llama: Base, tmp_path: Path, token_rows: Tensor) -> None:
    _, export = exported(llama, tmp_path / "adapter", target_modules=["lm_head", "o_proj"])
    assert set(export.target_modules) == {"lm_head", "o_proj"}
    expected = llama.model(token_rows).logits
    torch.testing.assert_close(
        reloaded(llama, tmp_path / "adapter")(token_rows).logits, expected, rtol=0, atol=1e-5
    )


def test_the_tokenizer_and_its_template_come_along(llama: Base, tmp_path: Path) -> None:
    exported(llama, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    assert tokenizer.chat_template == llama.tokenizer.chat_template
    text = "def f():\n    return 'ä'"
    assert tokenizer(text).input_ids == llama.tokenizer(text).input_ids
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "adapter" / name).read_bytes() == (llama.folder / name).read_bytes()


def test_native_tensors_are_the_methods_own(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "adapter")
    tensors = load_file(tmp_path / "adapter" / "native" / "adapter.safetensors")
    name = "model.layers.1.mlp.up_proj"
    assert {key.removeprefix(f"{name}.") for key in tensors if key.startswith(name)} == {"A", "B", "A0", "B0"}
    assert torch.equal(tensors[f"{name}.A0"], adapters[name].A0)
    assert len(tensors) == 4 * 14


# --- truncation --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_truncation_is_the_best_one_and_reports_its_energy(rank: int) -> None:
    draw = torch.Generator().manual_seed(0)
    pair = LowRank(torch.randn(30, 8, generator=draw), torch.randn(8, 20, generator=draw))
    S = torch.linalg.svdvals(pair.B.double() @ pair.A.double())
    best, kept, total = truncated(pair, rank)
    assert best.rank == rank
    assert kept == pytest.approx(float((S[:rank] ** 2).sum()))
    assert total == pytest.approx(float((S**2).sum()))
    error = (best.B.double() @ best.A.double() - pair.B.double() @ pair.A.double()).norm()
    assert float(error) == pytest.approx(float((S[rank:] ** 2).sum().sqrt()), rel=1e-4)


def test_truncation_beyond_the_pairs_own_rank_changes_nothing() -> None:
    pair = LowRank(torch.randn(30, 8), torch.randn(8, 20))
    for rank in (8, 100):
        best, kept, total = truncated(pair, rank)
        assert best is pair
        assert kept == total == pytest.approx(float((pair.B.double() @ pair.A.double()).norm() ** 2))


def test_a_truncated_export_has_the_rank_asked_for_and_says_what_it_kept(llama: Base, tmp_path: Path) -> None:
    adapters, export = exported(llama, tmp_path / "adapter", export_rank=3)
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert export.rank == 3
    assert 0.3 < export.energy_kept < 1
    assert manifest["export"]["energy_kept"] == export.energy_kept
    assert f"{export.energy_kept:.2%}" in (tmp_path / "adapter" / "README.md").read_text()
    kept = total = 0.0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, pair in exact_pairs(adapters).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{AB}.weight"].double() for AB in "AB")
        kept += float((B @ A).norm() ** 2)
        total += float((pair.B.double() @ pair.A.double()).norm() ** 2)
    assert export.energy_kept == pytest.approx(kept / total, rel=1e-4)


def test_an_untrained_adapter_exports_as_no_change(llama: Base, tmp_path: Path) -> None:
    spec = spec_for("olora", export_rank=2)
    adapters = trained(llama, spec, size=0.0)
    export = export_adapter(llama, adapters, tmp_path / "adapter", RunRecord(spec, spec))
    assert export.energy_kept == 1.0


# --- what a reader gets ------------------------------------------------------------------------------------


def test_the_manifest_tells_where_the_adapter_comes_from(llama: Base, tmp_path: Path) -> None:
    asked, resolved = spec_for("olora"), spec_for("olora", dropout=0.1)
    record = RunRecord(
        asked, resolved, data={"training": "ab12"}, metrics={"train_loss": 0.5}, losses=[(1, 2.0)]
    )
    export_adapter(llama, trained(llama, resolved), tmp_path / "adapter", record)
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["base_model"] == {
        "name": "tiny-llama",
        "fingerprint": llama.fingerprint,
        "quantization": None,
        "provenance": None,
    }
    assert manifest["spec"]["asked"] == asked.model_dump(mode="json")
    assert manifest["spec"]["resolved"]["adapter"]["dropout"] == 0.1
    assert manifest["data"] == {"training": {"sha256": "ab12"}}
    assert manifest["metrics"] == {"train_loss": 0.5}
    assert manifest["versions"]["torch"] == torch.__version__
    assert TrainSpec.model_validate(manifest["spec"]["resolved"]) == resolved


def test_the_card_says_how_to_load_it_and_shows_the_curve(llama: Base, tmp_path: Path) -> None:
    spec = spec_for("olora")
    losses = [(step, 4.0 - step / 50) for step in range(1, 101)]
    record = RunRecord(spec, spec, metrics={"train_loss": 2.0}, losses=losses)
    export_adapter(llama, trained(llama, spec), tmp_path / "adapter", record)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny-llama"\nlibrary_name: peft\n')
    assert "--max-lora-rank 8 " in card
    assert "PeftModel.from_pretrained" in card
    assert "model.load_adapter(ADAPTER)" in card
    assert "convert_lora_to_gguf.py" in card
    assert "| 100 | 2.0900 |" in card
    assert "| train_loss | 2 |" in card


def test_the_cards_advice_for_transformers_works(llama: Base, tmp_path: Path, token_rows: Tensor) -> None:
    exported(llama, tmp_path / "adapter")
    model = AutoModelForCausalLM.from_pretrained(llama.folder)
    model.load_adapter(tmp_path / "adapter")
    torch.testing.assert_close(model(token_rows).logits, llama.model(token_rows).logits, rtol=0, atol=1e-5)


def test_the_certificate_is_added_to_manifest_and_card(llama: Base, tmp_path: Path) -> None:
    exported(llama, tmp_path / "adapter")
    certificate = {"max_abs_logit_diff": 1e-6, "bound": 1e-3, "rows": 3, "tokens": 48, "passed": True}
    before = {path.name for path in (tmp_path / "adapter").iterdir()}
    record_certificate(tmp_path / "adapter", certificate)
    manifest = json.loads((tmp_path / "adapter" / "manifest.json").read_text())
    assert manifest["certificate"] == certificate
    assert (
        "largest logit difference 1.0e-06 (allowed 1.0e-03)"
        in (tmp_path / "adapter" / "README.md").read_text()
    )
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == before


def test_a_folder_that_exists_is_not_written_over(llama: Base, tmp_path: Path) -> None:
    exported(llama, tmp_path / "adapter")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "kept").touch()
    spec = spec_for("lora")
    adapters = {"model.layers.0.mlp.up_proj": trained_alone()}
    with pytest.raises(OSError, match="other"):
        export_adapter(llama, adapters, tmp_path / "other", RunRecord(spec, spec))
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["kept"]


def trained_alone() -> Adapter:
    return LoRAAdapter(torch.randn(4, 32), torch.randn(48, 4), scale=1.0)


@pytest.mark.parametrize(
    ("rank", "served"), [(1, 1), (2, 8), (16, 16), (17, 32), (64, 64), (300, 320), (321, 512), (512, 512)]
)
def test_the_servers_rank_setting_is_the_smallest_that_fits(rank: int, served: int) -> None:
    assert server_rank(rank) == served


def test_a_sparkline_goes_from_low_to_high_in_a_fixed_width() -> None:
    assert sparkline([0.0, 1.0, 2.0, 7.0]) == "▁▂▃█"
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert len(sparkline([float(i) for i in range(1000)])) <= 60
