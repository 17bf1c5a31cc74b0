"""The certificate: passed by what was trained, missed by every fault that we can plant."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from olora_core.bases.loading import Base
from olora_core.errors import CertificateError
from olora_core.export.adapter import export_adapter
from olora_core.export.certificate import certify
from olora_core.export.manifest import RunRecord
from olora_core.layers.adapter import Adapter, adapters_off, detach
from olora_core.methods import METHODS

from .test_adapter import exported, spec_for, trained

ROWS = [list(range(3, 19)), [20, 30, 40], list(range(100, 110))]


@pytest.fixture(params=["llama", "tied_llama", "bf16_llama", "gpt2"])
def base(request: pytest.FixtureRequest) -> Base:
    return request.getfixturevalue(request.param)


@pytest.mark.parametrize("method", METHODS)
def test_what_was_trained_passes_with_a_wide_margin(base: Base, tmp_path: Path, method: str) -> None:
    adapters, _ = exported(base, tmp_path / "adapter", method)
    certificate = certify(base, adapters, tmp_path / "adapter", ROWS)
    assert certificate["passed"] is True
    assert certificate["max_abs_logit_diff"] <= 0.01 * certificate["bound"]
    assert certificate["bound"] == pytest.approx(1e-4 * certificate["max_abs_logit"])
    assert (certificate["rows"], certificate["tokens"]) == (3, 29)
    assert certificate["top1_agreement"] == 1.0
    assert 0 < certificate["bf16"]["max_abs_logit_diff"] < 0.1
    assert certificate["bf16"].keys() == {"max_abs_logit_diff", "mean_abs_logit_diff", "top1_agreement"}
    assert json.loads(json.dumps(certificate)) == certificate


def test_the_largest_logit_is_the_trained_models(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "adapter")
    certificate = certify(llama, adapters, tmp_path / "adapter", ROWS)
    with torch.no_grad():
        logits = [llama.model(torch.tensor([row])).logits for row in ROWS]
    assert certificate["max_abs_logit"] == pytest.approx(max(float(x.abs().max()) for x in logits), rel=1e-5)


def test_certifying_changes_neither_base_nor_adapters_nor_files(
    base: Base, tmp_path: Path, token_rows: Tensor
) -> None:
    with adapters_off(base.model):
        bare = base.model(token_rows).logits
    adapters, _ = exported(base, tmp_path / "adapter")
    base.model.train()
    logits = base.model(token_rows).logits
    files = [*base.folder.iterdir(), *(p for p in (tmp_path / "adapter").rglob("*") if p.is_file())]
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in files}
    certify(base, adapters, tmp_path / "adapter", ROWS)
    assert torch.equal(base.model(token_rows).logits, logits)
    with adapters_off(base.model):
        assert torch.equal(base.model(token_rows).logits, bare)
    assert all(adapter.training for adapter in adapters.values())
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in files} == before


# --- planted faults ----------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def first(tensors: dict[str, Tensor], factor: str = "lora_B") -> Tensor:
    return tensors[next(name for name in sorted(tensors) if factor in name and tensors[name].any())]


def swap_layers(tensors: dict[str, Tensor]) -> None:
    one, other = sorted(name for name in tensors if "o_proj.lora_B" in name or "attn.c_proj.lora_B" in name)
    tensors[one], tensors[other] = tensors[other], tensors[one]


FAULTS: dict[str, Callable[[Path], object]] = {
    "a wrong number in a factor": lambda f: change_tensors(f, lambda t: first(t).view(-1)[3:4].add_(0.5)),
    "a factor zeroed": lambda f: change_tensors(f, lambda t: first(t, "lora_A").zero_()),
    "a NaN in a factor": lambda f: change_tensors(f, lambda t: first(t).view(-1)[:1].fill_(float("nan"))),
    "an infinity in a factor": lambda f: change_tensors(
        f, lambda t: first(t).view(-1)[:1].fill_(float("inf"))
    ),
    "two layers swapped": lambda f: change_tensors(f, swap_layers),
    "a layer missing": lambda f: change_tensors(f, lambda t: t.pop(sorted(t)[0])),
    "a wrong alpha": lambda f: change_config(f, lora_alpha=16),
    "a wrong rank": lambda f: change_config(f, r=4),
    "rsLoRA switched on": lambda f: change_config(f, use_rslora=True),
    "a target missing": lambda f: change_config(
        f, target_modules=json.loads((f / "adapter_config.json").read_text())["target_modules"][1:]
    ),
    "no alpha": lambda f: change_config(f, lora_alpha=None),
    "half a file": lambda f: (f / "adapter_model.safetensors").write_bytes(
        (f / "adapter_model.safetensors").read_bytes()[:5000]
    ),
    "no file": lambda f: (f / "adapter_model.safetensors").unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("base", ["llama", "gpt2"], indirect=True)
def test_a_planted_fault_is_caught(base: Base, tmp_path: Path, fault: str) -> None:
    adapters, _ = exported(base, tmp_path / "adapter")
    FAULTS[fault](tmp_path / "adapter")
    with pytest.raises(CertificateError):
        certify(base, adapters, tmp_path / "adapter", ROWS)


@pytest.mark.parametrize(("base", "flag"), [("llama", True), ("gpt2", False)], indirect=["base"])
def test_a_wrong_transposition_flag_is_caught(base: Base, tmp_path: Path, flag: bool) -> None:
    adapters, _ = exported(base, tmp_path / "adapter")
    change_config(tmp_path / "adapter", fan_in_fan_out=flag)
    with pytest.raises(CertificateError, match="fan_in_fan_out"):
        certify(base, adapters, tmp_path / "adapter", ROWS)


def test_a_miss_names_both_figures(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "adapter")
    change_config(tmp_path / "adapter", lora_alpha=16)
    with pytest.raises(
        CertificateError, match=r"differ by up to \d\S*, and at most \d\S* is allowed"
    ) as caught:
        certify(llama, adapters, tmp_path / "adapter", ROWS)
    assert caught.value.code == "certificate_failed"


def test_native_factors_shipped_as_plain_lora_are_caught(llama: Base, tmp_path: Path) -> None:
    """The classic mistake: OLoRA's own A and B, read by a server as an update of the whole weight."""
    adapters, _ = exported(llama, tmp_path / "adapter")

    def native(tensors: dict[str, Tensor]) -> None:
        for name, adapter in adapters.items():
            prefix = f"base_model.model.{name}"
            tensors[f"{prefix}.lora_A.weight"] = adapter.A.detach().clone()
            tensors[f"{prefix}.lora_B.weight"] = adapter.B.detach().clone()

    change_tensors(tmp_path / "adapter", native)
    change_config(tmp_path / "adapter", r=4, lora_alpha=6)
    with pytest.raises(CertificateError, match="not those that were trained"):
        certify(llama, adapters, tmp_path / "adapter", ROWS)


@pytest.mark.parametrize("base", ["llama", "bf16_llama"], indirect=True)
def test_a_base_that_was_written_in_memory_is_caught(base: Base, tmp_path: Path) -> None:
    adapters, _ = exported(base, tmp_path / "adapter")
    with torch.no_grad():
        base.model.model.layers[1].mlp.up_proj.weight[0, 0] += 0.5
    with pytest.raises(
        CertificateError, match=r"up_proj\.weight of base model .* is not what its files hold"
    ):
        certify(base, adapters, tmp_path / "adapter", ROWS)


def test_a_trained_model_that_gives_no_numbers_is_caught(llama: Base, tmp_path: Path) -> None:
    spec = spec_for("lora")
    adapters = trained(llama, spec)
    with torch.no_grad():
        next(iter(adapters.values())).B[0, 0] = float("nan")
    export_adapter(llama, adapters, tmp_path / "adapter", RunRecord(spec, spec))
    with pytest.raises(CertificateError, match="differ by up to nan"):
        certify(llama, adapters, tmp_path / "adapter", ROWS)


def test_no_rows_is_no_certificate(llama: Base, tmp_path: Path) -> None:
    adapters, _ = exported(llama, tmp_path / "adapter")
    with pytest.raises(CertificateError, match="no row"):
        certify(llama, adapters, tmp_path / "adapter", [[]])


# --- truncated on request ----------------------------------------------------------------------------------


def truncated_export(base: Base, folder: Path) -> dict[str, Adapter]:
    adapters, export = exported(base, folder, export_rank=3)
    assert export.rank == 3
    return adapters


def test_a_truncated_export_is_gated_on_the_exact_pair_and_its_own_figures_stand_beside(
    llama: Base, tmp_path: Path
) -> None:
    adapters = truncated_export(llama, tmp_path / "adapter")
    certificate = certify(llama, adapters, tmp_path / "adapter", ROWS)
    assert certificate["max_abs_logit_diff"] <= certificate["bound"]
    assert certificate["truncated"]["max_abs_logit_diff"] > certificate["bound"]
    assert certificate["truncated"]["top1_agreement"] <= 1


def test_a_layer_forgotten_in_files_and_config_alike_is_caught(llama: Base, tmp_path: Path) -> None:
    for export_rank in (None, 3):
        folder = tmp_path / f"adapter-{export_rank}"
        adapters, export = exported(llama, folder, export_rank=export_rank)
        detach(llama.model)
        change_config(folder, target_modules=[n for n in export.target_modules if n != "o_proj"])
        change_tensors(folder, forget_o_proj)
        with pytest.raises(CertificateError, match=r"lack the trained layer .*\.o_proj"):
            certify(llama, adapters, folder, ROWS)


def forget_o_proj(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if "o_proj" in name]:
        del tensors[name]


def test_a_fault_in_a_truncated_export_is_caught(llama: Base, tmp_path: Path) -> None:
    adapters = truncated_export(llama, tmp_path / "adapter")
    change_tensors(tmp_path / "adapter", lambda tensors: first(tensors).view(-1)[3:4].add_(0.1))
    with pytest.raises(CertificateError, match="not those that were trained"):
        certify(llama, adapters, tmp_path / "adapter", ROWS)
