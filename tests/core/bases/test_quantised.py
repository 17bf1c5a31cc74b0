"""Quantised bases: an adapter starts at them exactly, leaves them alone, and is served on them as trained."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel, TorchAoConfig

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites
from olora_core.errors import CertificateError, ModelError, SpecError
from olora_core.export.certificate import certify
from olora_core.layers import quantisation
from olora_core.layers.adapter import Adapter, adapters_off, site_weight
from olora_core.layers.quantisation import PACKAGES, stored_tensors
from olora_core.methods import METHODS, build_adapters
from olora_core.progress import Evaluated, Finished, Step
from olora_core.training.train import train
from tests.tiny_base import make_tokenizer

from ..export.test_adapter import exported
from ..export.test_certificate import ROWS, change_config, change_tensors, first, swap_layers
from ..runs import chat_rows, losses, one, preference_rows, spec_for, write_rows

KINDS = list(PACKAGES)
CASES = [(base, kind) for base in ("wide-llama", "wide-llama-bf16") for kind in KINDS]
CASES += [("wide-gpt2", "nf4"), ("wide-gpt2", "int8")]
FP32_CASES = [case for case in CASES if "bf16" not in case[0]]
RUNS = [(*case, "olora") for case in CASES] + [("wide-llama", kind, "lora") for kind in KINDS]
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks it
NF4 = [
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.09105004, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
]
"""The sixteen numbers of QLoRA (arXiv 2305.14314, appendix E)."""


def config_of(kind: str, dtype: torch.dtype) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig

    return {
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
        "torchao-int8": TorchAoConfig(Int8WeightOnlyConfig()),
        "torchao-fp8": TorchAoConfig(Float8WeightOnlyConfig()),
    }[kind]


def as_transformers_loads_it(folder: Path, kind: str) -> PreTrainedModel:
    """In eval mode, but for NF4: there bitsandbytes would then compute in bf16 on some CPUs."""
    dtype = torch.bfloat16 if "bf16" in folder.name else torch.float32
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=config_of(kind, dtype)
    )
    return model.train(kind == "nf4")


def digests(model: nn.Module) -> dict[str, str]:
    return {
        f"{path}.{name}": hashlib.sha256(tensor.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()
        for path, module in model.named_modules()
        for name, tensor in stored_tensors(module).items()
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder, rows = tmp_path_factory.mktemp("files"), chat_rows(20)
    return write_rows(folder / "t.jsonl", rows[:14]), write_rows(folder / "v.jsonl", rows[14:])


# --- the base as it was ------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_step_0_is_the_quantised_base_bit_for_bit(base_folders, token_rows, name, kind, method) -> None:
    with torch.no_grad():
        expected = as_transformers_loads_it(base_folders[name], kind)(token_rows).logits
    base = load_base(base_folders[name], name="tiny", quantization=kind)
    adapters = placed(base, method)
    with torch.no_grad():
        assert torch.equal(base.model(token_rows).logits, expected)
    assert all(p.dtype == torch.float32 for adapter in adapters.values() for p in adapter.parameters())


def placed(base: Base, method: str) -> dict[str, Adapter]:
    spec = spec_for(method)
    chosen = METHODS[method](spec.adapter, seed=0, total_steps=10, schedule=lambda i, n: 1.0)
    return build_adapters(chosen, base.model, target_sites(base.model, "auto"))


@pytest.mark.parametrize(("name", "kind", "method"), RUNS)
def test_training_learns_and_leaves_every_quantised_tensor_as_it_was(
    base_folders, files, token_rows, tmp_path, name, kind, method
) -> None:
    base = load_base(base_folders[name], name="tiny", quantization=kind)
    before, dtype = digests(base.model), str(base.dtype).removeprefix("torch.")
    with torch.no_grad():
        bare = base.model(token_rows).logits
    spec = spec_for(method, quantization=kind, dtype=dtype, learning_rate=5e-3, n_epochs=3)
    said = []
    for progress in train(spec, base, files[0], None, tmp_path / "run"):
        said.append(progress)
        if isinstance(progress, Finished):
            with torch.no_grad():
                assert not torch.equal(base.model(token_rows).logits, bare)
                with adapters_off(base.model):
                    assert torch.equal(base.model(token_rows).logits, bare)
    assert losses(said)[-1] < losses(said)[0] - 0.5
    assert digests(base.model) == before
    assert len(before) > len(list(base.model.parameters()))  # the scales too


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_keeps_no_more_for_its_backward_than_on_a_plain_base(base_folders, token_rows, kind) -> None:
    """torchao's own layers would keep every weight multiplied out."""
    kept: dict[str, int] = {}
    for quantization in ("none", kind):
        base = load_base(base_folders["wide-llama"], name="tiny", quantization=quantization)
        kept[quantization] = kept_bytes(base, token_rows)
    assert kept[kind] <= 1.05 * kept["none"]


def kept_bytes(base: Base, token_rows: Tensor) -> int:
    """Bytes that autograd saves in a forward pass, without the weights themselves."""
    weights = {
        t.untyped_storage().data_ptr() for m in base.model.modules() for t in stored_tensors(m).values()
    }
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embedded = base.model.get_input_embeddings()(token_rows).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = base.model(inputs_embeds=embedded, use_cache=False).logits
    assert output.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_weights_multiplied_out(base_folders, token_rows, kind) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    layer = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    g = torch.randn(2, 5, 192, generator=torch.Generator().manual_seed(1))
    layer(x).backward(g)
    expected = g.double() @ site_weight(layer).double()
    assert (x.grad - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_a_family_may_change_a_layers_output_in_place(base_folders, kind) -> None:
    """As those with clip_qkv do, also with layers that have no adapter."""
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    layer = base.model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(0), requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).clamp(-0.5, 0.5).sum(), x)
    (got,) = torch.autograd.grad(layer(x).clamp_(-0.5, 0.5).sum(), x)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_computes_what_an_evaluation_does(base_folders, tmp_path, kind) -> None:
    """LLM.int8 on a CPU has another product for training, also of layers without an adapter."""
    rows = write_rows(tmp_path / "rows.jsonl", chat_rows(4))
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    spec = spec_for(adapter={"target_modules": ["q_proj"]}, quantization=kind, max_steps=1, packing=False)
    said = list(train(spec, base, rows, rows, tmp_path / "run"))
    before = next(p.loss for p in said if isinstance(p, Evaluated))
    assert losses(said) == [pytest.approx(before, rel=1e-6)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_dpo_step_costs_ln_2(base_folders, tmp_path, kind) -> None:
    rows = write_rows(tmp_path / "t.jsonl", preference_rows(8))
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    spec = spec_for(type="dpo", quantization=kind, max_steps=1)
    assert one(Step, train(spec, base, rows, None, tmp_path / "run")).loss == pytest.approx(
        math.log(2), rel=1e-7
    )


# --- what the layers hold ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_given_to_a_method_is_what_the_bytes_stand_for(base_folders, kind) -> None:
    path = "model.layers.1.mlp.down_proj"
    W = load_base(base_folders["wide-llama"], name="tiny").model.get_submodule(path).weight.double()
    quantised = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    given = site_weight(quantised.model.get_submodule(path))
    assert given.dtype == torch.float32
    assert given.shape == W.shape
    largest = W.abs().amax(dim=1, keepdim=True)
    if kind == "nf4":
        scales = W.view(-1, 64).abs().amax(dim=1, keepdim=True)
        entries = torch.tensor(NF4, dtype=torch.float64)
        nearest = (W.view(-1, 64, 1) / scales[..., None] - entries).abs().argmin(dim=2)
        expected, tolerance = (entries[nearest] * scales).view(W.shape), 0.02  # the scales are rounded too
    elif kind == "int8":
        W = W.half().double()
        largest = W.abs().amax(dim=1, keepdim=True)
        expected, tolerance = (W / largest * 127).round() * largest / 127, 1e-6
    elif kind == "torchao-int8":
        expected, tolerance = (W / largest * 127.5).round().clamp(-128, 127) * largest / 127.5, 1e-6
    else:
        scaled = (W.float() * (448 / largest.float())).to(torch.float8_e4m3fn).double()
        expected, tolerance = scaled * largest / 448, 1e-6
    # A number on the edge between two steps may fall to either side.
    off = (given - expected).abs() > tolerance * largest
    assert off.float().mean() < 0.002
    assert float((given - W).norm() / W.norm()) < (0.12 if kind == "nf4" else 0.04)


def test_nf4_is_read_rightly_or_refused_whatever_the_width(base_folders) -> None:
    """bitsandbytes 0.50 misreads some widths on CPUs with AVX-512; this model is 32 wide."""
    refusal = None
    try:
        base = load_base(base_folders["llama"], name="tiny", quantization="nf4")
    except ModelError as error:
        refusal = error.message
    if refusal is not None:
        assert re.search(r"has \d\d inputs, a width for which .* use 'int8', or another device", refusal)
        return
    W = load_base(base_folders["llama"], name="tiny").model.model.layers[0].mlp.up_proj.weight
    given = site_weight(base.model.model.layers[0].mlp.up_proj)
    assert float((given - W).norm() / W.norm()) < 0.12


# --- export and certificate --------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "kind"), FP32_CASES)
def test_plain_peft_on_the_same_quantised_base_gives_the_trained_models_logits(
    base_folders, tmp_path, token_rows, name, kind, method
) -> None:
    base = load_base(base_folders[name], name="tiny", quantization=kind)
    exported(base, tmp_path / "adapter", method)
    theirs = as_transformers_loads_it(base_folders[name], kind)
    theirs = PeftModel.from_pretrained(theirs, tmp_path / "adapter").train(kind == "nf4")
    with torch.no_grad():
        expected, got = base.model(token_rows).logits, theirs(token_rows).logits
    # LLM.int8 rounds each layer's input, so that one last bit can become a whole step.
    assert (got - expected).abs().max() < (2e-2 if kind == "int8" else 1e-5) * expected.abs().max()


@pytest.mark.parametrize(("name", "kind", "method"), RUNS)
def test_what_was_trained_passes_and_the_whole_base_is_told_beside_it(
    base_folders, tmp_path, name, kind, method
) -> None:
    base = load_base(base_folders[name], name="tiny", quantization=kind)
    adapters, _ = exported(base, tmp_path / "adapter", method)
    with torch.no_grad():
        as_trained = [base.model(torch.tensor([row])).logits[0].float() for row in ROWS]
    certificate = certify(base, adapters, tmp_path / "adapter", ROWS)
    assert certificate["max_abs_logit_diff"] <= 0.01 * certificate["bound"]
    assert certificate["as_served"]["max_abs_logit_diff"] < 0.05 * certificate["max_abs_logit"]

    whole = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32)
    whole = PeftModel.from_pretrained(whole, tmp_path / "adapter")
    with torch.no_grad():
        on_whole = [whole(torch.tensor([row])).logits[0] for row in ROWS]
    told = certificate["on_full_precision"]
    pairs = zip(on_whole, as_trained, strict=True)
    largest = max(float((a - b).abs().max()) for a, b in pairs)
    # The certificate compares in fp32, these logits are in the run's own precision.
    slack = 1e-4 if name != "wide-llama-bf16" and kind != "int8" else 0.1 * certificate["max_abs_logit"]
    assert told["max_abs_logit_diff"] == pytest.approx(largest, abs=slack)
    assert told["max_abs_logit_diff"] > 10 * certificate["bound"]
    assert told["loss"] == pytest.approx(loss_per_token(on_whole), rel=1e-5)
    assert told["trained_loss"] == pytest.approx(loss_per_token(as_trained), abs=max(slack, 1e-4))
    assert json.loads(json.dumps(certificate)) == certificate


def loss_per_token(logits: list[Tensor]) -> float:
    total = sum(
        -float(row.double().log_softmax(-1)[range(len(ids) - 1), ids[1:]].sum())
        for row, ids in zip(logits, ROWS, strict=True)
    )
    return total / sum(len(ids) - 1 for ids in ROWS)


FAULTS = {
    "a wrong number in a factor": lambda f: change_tensors(f, lambda t: first(t).view(-1)[3:4].add_(0.5)),
    "two layers swapped": lambda f: change_tensors(f, swap_layers),
    "a wrong alpha": lambda f: change_config(f, lora_alpha=16),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_fault_is_caught(base_folders, tmp_path, kind, fault) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    adapters, _ = exported(base, tmp_path / "adapter")
    FAULTS[fault](tmp_path / "adapter")
    with pytest.raises(CertificateError, match="differ by up to"):
        certify(base, adapters, tmp_path / "adapter", ROWS)


WRITES = {
    ("nf4", "weight"): lambda layer: layer.weight.data.view(-1)[5:6].bitwise_xor_(1),
    ("nf4", "scale"): lambda layer: layer.weight.quant_state.absmax[3:4].bitwise_xor_(1),
    ("int8", "weight"): lambda layer: layer.weight.data.view(-1)[5:6].bitwise_xor_(1),
    ("int8", "scale"): lambda layer: layer.state.SCB[1:2].mul_(1.001),
    ("torchao-int8", "weight"): lambda layer: layer.weight.qdata.view(-1)[5:6].bitwise_xor_(1),
    ("torchao-int8", "scale"): lambda layer: layer.weight.scale.view(-1)[1:2].mul_(1.001),
    ("torchao-fp8", "weight"): lambda layer: (
        layer.weight.qdata.view(torch.uint8).view(-1)[5:6].bitwise_xor_(1)
    ),
    ("torchao-fp8", "scale"): lambda layer: layer.weight.scale.view(-1)[1:2].mul_(1.001),
}


@pytest.mark.parametrize(("kind", "what"), WRITES)
def test_a_quantised_base_that_was_written_in_memory_is_caught(base_folders, tmp_path, kind, what) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    adapters, _ = exported(base, tmp_path / "adapter")
    with torch.no_grad():
        WRITES[kind, what](base.model.model.layers[1].mlp.up_proj.base)
    with pytest.raises(CertificateError, match=r"up_proj\.weight.* is not what its files hold"):
        certify(base, adapters, tmp_path / "adapter", ROWS)


def test_manifest_and_card_say_how_the_base_was_quantised(base_folders, files, tmp_path) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization="nf4")
    done = one(Finished, train(spec_for(quantization="nf4"), base, *files, tmp_path / "run"))
    manifest = json.loads((done.folder / "manifest.json").read_text())
    told = manifest["base_model"]["quantization"]
    assert (told["kind"], told["in_files"]) == ("nf4", False)
    assert told["package"].startswith("bitsandbytes ")
    again = AutoModelForCausalLM.from_pretrained(
        base.folder, dtype=torch.float32, quantization_config=BitsAndBytesConfig(**told["config"])
    )
    assert digests(again) == digests(base.model)
    assert manifest["spec"]["resolved"]["hyperparameters"]["quantization"] == "nf4"
    assert manifest["certificate"]["on_full_precision"]["loss"] > 0
    card = (done.folder / "README.md").read_text()
    assert "quantised during training (nf4, bitsandbytes" in card
    assert "On the base before quantisation: largest logit difference" in card


# --- a checkpoint that is quantised in its files -----------------------------------------------------------


@pytest.fixture(scope="module")
def quantised_folders(base_folders, tmp_path_factory) -> dict[str, Path]:
    root, folders = tmp_path_factory.mktemp("quantised"), {}
    for kind in KINDS:
        model = AutoModelForCausalLM.from_pretrained(
            base_folders["wide-llama"],
            dtype=torch.float32,
            quantization_config=config_of(kind, torch.bfloat16),
        )
        model.save_pretrained(root / kind)
        make_tokenizer().save_pretrained(root / kind)
        folders[kind] = root / kind
    return folders


@pytest.mark.parametrize("asked", ["none", "the same"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_checkpoint_is_trained_on_as_it_is(
    quantised_folders, base_folders, files, tmp_path, kind, asked
) -> None:
    asked = kind if asked == "the same" else asked
    base = load_base(quantised_folders[kind], name="tiny", quantization=asked)
    assert base.notes == []
    on_the_fly = load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    assert digests(base.model) == digests(on_the_fly.model)
    said = list(train(spec_for(quantization=asked, max_steps=2), base, *files, tmp_path / "run"))
    same = train(spec_for(quantization=kind, max_steps=2), on_the_fly, *files, tmp_path / "other")
    assert losses(said) == losses(same)
    certificate = one(Finished, said).certificate
    assert "as_served" in certificate
    assert "on_full_precision" not in certificate  # its files hold no other base


def test_a_quantised_checkpoint_is_not_quantised_otherwise(quantised_folders) -> None:
    with pytest.raises(SpecError, match=r"quantised in its files already \(nf4\)") as caught:
        load_base(quantised_folders["nf4"], name="tiny", quantization="int8")
    assert caught.value.param == "hyperparameters.quantization"


def test_a_checkpoint_of_another_quantiser_is_not_quantised_again(quantised_folders, tmp_path) -> None:
    config = json.loads((quantised_folders["nf4"] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    for file in quantised_folders["nf4"].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SpecError, match=r"quantised in its files already \(gptq\)"):
        load_base(tmp_path, name="tiny", quantization="int8")


def test_layers_that_quantise_their_inputs_too_are_refused_by_name(base_folders) -> None:
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    model = AutoModelForCausalLM.from_pretrained(
        base_folders["wide-llama"],
        dtype=torch.float32,
        quantization_config=TorchAoConfig(Int8DynamicActivationInt8WeightConfig()),
    )
    with pytest.raises(SpecError, match=r"layers\.0\.mlp\.up_proj'.*torchao quantises its inputs"):
        target_sites(model, ["up_proj"])


# --- refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_names_the_extra(base_folders, monkeypatch, kind) -> None:
    monkeypatch.setattr(quantisation, "find_spec", lambda package: None)
    with pytest.raises(ModelError, match=rf"{PACKAGES[kind]}, which is not installed.*extra 'gpu'") as caught:
        load_base(base_folders["wide-llama"], name="tiny", quantization=kind)
    assert caught.value.param == "hyperparameters.quantization"


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_cannot_is_named(base_folders, kind) -> None:
    with pytest.raises(ModelError, match=rf"'{kind}' runs on cpu or cuda, and not on mps"):
        load_base(base_folders["wide-llama"], name="tiny", device="mps", quantization=kind)


@pytest.mark.parametrize("kind", ["torchao-int8", "torchao-fp8"])
def test_a_model_without_a_layer_to_quantise_is_refused(base_folders, kind) -> None:
    with pytest.raises(
        ModelError, match=r"no layer that torchao quantises.*bitsandbytes also GPT-2's Conv1D"
    ):
        load_base(base_folders["wide-gpt2"], name="tiny", quantization=kind)


@pytest.mark.parametrize(("loaded", "asked"), [("none", "nf4"), ("nf4", "none"), ("int8", "nf4")])
def test_a_base_that_is_loaded_otherwise_than_asked_is_refused(
    base_folders, files, tmp_path, loaded, asked
) -> None:
    base = load_base(base_folders["wide-llama"], name="tiny", quantization=loaded)
    with pytest.raises(SpecError, match=rf"quantization = '{asked}'.*loaded with '{loaded}'"):
        next(train(spec_for(quantization=asked), base, *files, tmp_path / "run"))
