"""The same promises for one tiny model of each family: what is adapted, where it starts, what is exported.

A family is a row of the table; what is unlike in the families is said there and nowhere else.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sites import target_sites, unadapted
from olora_core.errors import SpecError
from olora_core.layers.adapter import detach
from olora_core.methods import METHODS, build_adapters
from olora_core.progress import Finished, Note, Progress, Resolved
from olora_core.specs import TrainSpec
from olora_core.training.train import train
from tests.tiny_base import CONTEXT, VOCABULARY, save_base

from ..runs import ROWS, chat_rows, losses, one, spec_for, write_rows

# PEFT reads a property that transformers deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

STEPS, RANK = 20, 4
WIDTH, INNER, HEADS, GROUPS, HEAD = 32, 48, 4, 2, 16
"""Heads are wider than WIDTH / HEADS where a config lets them be, so that no two sizes are mixed up."""

Shapes = dict[str, tuple[int, int]]
"""out×in by the ending of a layer's path."""


@dataclass(frozen=True)
class Family:
    """A tiny model and what is to be expected of it."""

    config: PreTrainedConfig
    layers: Shapes
    """What "auto" adapts in every block, in the order of the model."""
    stack: str = "model.layers"
    packed_by: Literal["segments", "positions"] = "segments"
    """What keeps packed examples apart: attention of our own, or transformers'."""
    unadapted: dict[str, list[str]] = field(default_factory=dict)
    """Tensors that `unadapted` must list, by kind."""

    @property
    def sites(self) -> dict[str, tuple[int, int]]:
        """Shape of each layer to adapt by its whole path."""
        return {f"{self.stack}.{i}.{ending}": shape for i in (0, 1) for ending, shape in self.layers.items()}


def attention(head: int) -> Shapes:
    """Separate projections with two query heads to a key head."""
    return {
        "self_attn.q_proj": (HEADS * head, WIDTH),
        "self_attn.k_proj": (GROUPS * head, WIDTH),
        "self_attn.v_proj": (GROUPS * head, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * head),
    }


def gated(path: str = "mlp", inner: int = INNER) -> Shapes:
    return {
        f"{path}.gate_proj": (inner, WIDTH),
        f"{path}.up_proj": (inner, WIDTH),
        f"{path}.down_proj": (WIDTH, inner),
    }


def small(kind: type[PreTrainedConfig], **settings: Any) -> PreTrainedConfig:
    shared = {
        "vocab_size": VOCABULARY + 5,  # transformers gives some families' tokenizers a token more
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.1,
    }
    return kind(**shared | settings)


grouped = partial(small, num_key_value_heads=GROUPS, intermediate_size=INNER)
narrow = attention(WIDTH // HEADS)
wide = attention(HEAD)
windowed = {"sliding_window": 16}  # shorter than the examples
gemma = partial(grouped, head_dim=HEAD, query_pre_attn_scalar=HEAD, **windowed)
experts = {"num_experts_per_tok": 2}


def expert_tensors(*blocks: int) -> dict[str, list[str]]:
    fused = ("gate_up_proj", "down_proj")
    return {
        "experts": [f"model.layers.{i}.mlp.experts.{tensor}" for i in blocks for tensor in fused],
        "routers": [f"model.layers.{i}.mlp.gate.weight" for i in blocks],
    }


QWEN2_ROUTERS = ("gate.weight", "shared_expert_gate")
FAMILIES = {
    "Llama": Family(grouped(LlamaConfig), narrow | gated()),
    "Mistral": Family(grouped(MistralConfig, **windowed), narrow | gated()),
    "Qwen2": Family(grouped(Qwen2Config), narrow | gated()),
    "Qwen3": Family(grouped(Qwen3Config, head_dim=HEAD), wide | gated()),
    "Gemma 2": Family(gemma(Gemma2Config), wide | gated(), packed_by="positions"),
    "Gemma 3": Family(gemma(Gemma3TextConfig), wide | gated()),
    "Phi-3": Family(
        grouped(Phi3Config),
        {
            "self_attn.o_proj": (WIDTH, WIDTH),
            "self_attn.qkv_proj": ((HEADS + 2 * GROUPS) * WIDTH // HEADS, WIDTH),
            "mlp.gate_up_proj": (2 * INNER, WIDTH),
            "mlp.down_proj": (WIDTH, INNER),
        },
    ),
    "GPT-2": Family(
        small(GPT2Config, n_inner=INNER, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0),
        {
            "attn.c_attn": (3 * WIDTH, WIDTH),
            "attn.c_proj": (WIDTH, WIDTH),
            "mlp.c_fc": (INNER, WIDTH),
            "mlp.c_proj": (WIDTH, INNER),
        },
        stack="transformer.h",
    ),
    "OPT": Family(
        small(OPTConfig, ffn_dim=INNER, word_embed_proj_dim=WIDTH, dropout=0.0, init_std=0.1),
        {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("k", "v", "q", "out")}
        | {"fc1": (INNER, WIDTH), "fc2": (WIDTH, INNER)},
        stack="model.decoder.layers",
    ),
    "GPT-NeoX": Family(
        small(GPTNeoXConfig, intermediate_size=INNER),
        {
            "attention.query_key_value": (3 * WIDTH, WIDTH),
            "attention.dense": (WIDTH, WIDTH),
            "mlp.dense_h_to_4h": (INNER, WIDTH),
            "mlp.dense_4h_to_h": (WIDTH, INNER),
        },
        stack="gpt_neox.layers",
    ),
    "Mixtral": Family(
        grouped(MixtralConfig, num_local_experts=4, **experts),
        narrow,
        unadapted=expert_tensors(0, 1),
    ),
    "Qwen2-MoE": Family(
        grouped(
            Qwen2MoeConfig,
            num_experts=4,
            moe_intermediate_size=24,
            shared_expert_intermediate_size=24,
            **experts,
        ),
        narrow | gated("mlp.shared_expert", 24),
        unadapted={
            "experts": expert_tensors(0, 1)["experts"],
            "routers": [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in QWEN2_ROUTERS],
        },
    ),
    "Qwen3-MoE": Family(
        grouped(
            Qwen3MoeConfig,
            head_dim=HEAD,
            num_experts=4,
            moe_intermediate_size=24,
            decoder_sparse_step=2,  # a dense block before one with experts
            **experts,
        ),
        wide,
        unadapted=expert_tensors(1) | {"layers": [f"model.layers.0.{ending}" for ending in gated()]},
    ),
}
WITH_EXPERTS = [name for name, family in FAMILIES.items() if family.unadapted]


@dataclass(frozen=True)
class Ran:
    """A run of twenty steps, and the tuned model's logits while it was in place."""

    progress: list[Progress]
    logits: Tensor
    base: Base
    before: dict[str, Tensor]
    """The base's tensors before the run."""

    @property
    def adapter(self) -> Path:
        return one(Finished, self.progress).folder


@pytest.fixture(scope="module", params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def folder(name: str, family: Family, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base as users have it; tests only read it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(family.config).eval()
    return save_base(tmp_path_factory.mktemp("family"), model)


@pytest.fixture(scope="module")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "training.jsonl", chat_rows())


@pytest.fixture(scope="module")
def ran(folder: Path, training: Path, token_rows: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    base = load_base(folder, name="tiny", dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
    progress: list[Progress] = []
    logits = torch.empty(0)
    for said in train(run_spec(), base, training, None, tmp_path_factory.mktemp("run")):
        progress.append(said)
        if isinstance(said, Finished):
            logits = logits_of(base.model, token_rows)
    return Ran(progress, logits, base, before)


def run_spec(**settings: Any) -> TrainSpec:
    """Every step sees all rows, so that losses of two steps can be compared."""
    adapter = {"rank": RANK, "alpha": RANK}
    chosen = {"n_epochs": STEPS, "batch_size": ROWS, "micro_batch_size": 4, "learning_rate": 5e-3}
    chosen["packing"] = False
    return spec_for("olora", adapter=adapter, **chosen | settings)


@torch.no_grad()
def logits_of(model: torch.nn.Module, tokens: Tensor) -> Tensor:
    return model(tokens, use_cache=False).logits


# --- before a run ------------------------------------------------------------------------------------------


def test_auto_finds_every_linear_layer_of_the_blocks_and_nothing_else(family: Family, ran: Ran) -> None:
    sites = target_sites(ran.base.model, "auto")
    assert {site.name: (site.out_features, site.in_features) for site in sites} == family.sites
    assert one(Resolved, ran.progress).targets == [site.name for site in sites] == list(family.sites)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_0_is_the_base_bit_for_bit(
    folder: Path, token_rows: Tensor, method: str, dtype: torch.dtype
) -> None:
    base = load_base(folder, name="tiny", dtype=dtype)
    spec = spec_for(method).adapter
    for training in (False, True):
        base.model.train(training)
        expected = logits_of(base.model, token_rows)
        maker = METHODS[method](spec, seed=0, total_steps=10, schedule=lambda i, n: 1.0)
        build_adapters(maker, base.model, target_sites(base.model, "auto"))
        assert torch.equal(logits_of(base.model, token_rows), expected)
        detach(base.model)


# --- a run -------------------------------------------------------------------------------------------------


def test_twenty_steps_lower_the_loss_and_leave_the_base_as_it_was(ran: Ran) -> None:
    seen = losses(ran.progress)
    assert len(seen) == STEPS
    assert seen[-1] < 0.9 * seen[0]
    after = ran.base.model.state_dict()
    assert after.keys() == ran.before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in ran.before.items())


def test_packing_trains_the_same(family: Family, ran: Ran, training: Path, tmp_path: Path) -> None:
    progress = train(run_spec(packing=True), ran.base, training, None, tmp_path)
    assert ran.base.passes.packing == family.packed_by
    packed = losses_of(progress)
    assert [next(packed) for _ in range(4)] == pytest.approx(losses(ran.progress)[:4], rel=1e-5)
    progress.close()


def losses_of(progress: Iterator[Progress]) -> Iterator[float]:
    for said in progress:
        yield from losses([said])


# --- what is exported --------------------------------------------------------------------------------------


def test_the_export_is_certified_and_plain_peft_gives_the_trained_models_logits(
    folder: Path, ran: Ran, token_rows: Tensor
) -> None:
    assert one(Finished, ran.progress).certificate["passed"]
    # By itself, older transformers leaves out the cap on Gemma 2's attention.
    attention = ran.base.model.config._attn_implementation
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)
    untrained = logits_of(fresh, token_rows)
    theirs = logits_of(PeftModel.from_pretrained(fresh, ran.adapter), token_rows)
    # fp32 rounds in proportion to the numbers: 1e-5 of the largest logit, which stays below 30 even where a
    # model caps it there.
    bound = 1e-5 * max(1.0, float(ran.logits.abs().max()))
    assert float((theirs - ran.logits).abs().max()) <= bound
    assert float((untrained - ran.logits).abs().max()) > 1000 * bound, "the run has to have changed something"


def test_the_exported_factors_have_the_shapes_of_their_layers(family: Family, ran: Ran) -> None:
    tensors = load_file(ran.adapter / "adapter_model.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {}
    for name, (outputs, inputs) in family.sites.items():
        expected[f"base_model.model.{name}.lora_A.weight"] = (2 * RANK, inputs)
        expected[f"base_model.model.{name}.lora_B.weight"] = (outputs, 2 * RANK)
    assert shapes == expected


# --- what is not adapted ----------------------------------------------------------------------------------


def test_what_auto_leaves_out_is_noted_and_recorded(family: Family, ran: Ran) -> None:
    notes = [said.message for said in ran.progress if isinstance(said, Note)]
    notes = [note for note in notes if "not adapted" in note]
    manifest = json.loads((ran.adapter / "manifest.json").read_text())
    card = (ran.adapter / "README.md").read_text()
    assert manifest["export"]["left_out"] == family.unadapted
    assert ("| not adapted |" in card) == bool(family.unadapted)
    assert len(notes) == len(family.unadapted)
    for names, note in zip(family.unadapted.values(), notes, strict=True):
        assert note.startswith(f"{len(names)} ")
        assert names[0] in note
        assert names[0] in card


def test_nothing_in_the_blocks_is_silently_skipped(family: Family, ran: Ran) -> None:
    """Every matrix of a block is adapted or listed as not adapted."""
    weights = {f"{site}.weight" for site in family.sites}
    named = {name for names in family.unadapted.values() for name in names}
    for name, tensor in ran.base.model.named_parameters():
        if name.startswith(f"{family.stack}.") and tensor.dim() > 1:
            assert name in weights or name in named or name.removesuffix(".weight") in named


@pytest.mark.parametrize("targets", [["experts"], ["gate_up_proj"], ["q_proj", "down_proj"], ["gate"]])
@pytest.mark.parametrize("name", WITH_EXPERTS, indirect=True, scope="module")
def test_named_experts_and_routers_are_refused_by_name(folder: Path, targets: list[str]) -> None:
    base = load_base(folder, name="tiny")
    says = rf"'model\.layers\.\d\.mlp\..*{targets[-1]}', which cannot be adapted"
    with pytest.raises(SpecError, match=says):
        target_sites(base.model, targets)


@pytest.mark.parametrize("name", ["Qwen3-MoE"], indirect=True, scope="module")
def test_a_name_that_peft_takes_for_the_experts_is_refused(folder: Path) -> None:
    base = load_base(folder, name="tiny")
    with pytest.raises(SpecError, match=r"'model\.layers\.0\.mlp\.up_proj'.*PEFT maps its name"):
        target_sites(base.model, ["mlp.up_proj"])


@pytest.mark.parametrize("name", ["Qwen2-MoE"], indirect=True, scope="module")
def test_a_router_that_is_a_linear_layer_may_be_named(folder: Path) -> None:
    base = load_base(folder, name="tiny")
    sites = target_sites(base.model, ["shared_expert_gate"])
    assert [(site.out_features, site.in_features) for site in sites] == [(1, WIDTH)] * 2
    assert [name for name in unadapted(base.model)["routers"] if name.endswith("_gate")] != []
    adapter = spec_for("lora", adapter={"rank": 1}).adapter
    build_adapters(
        METHODS["lora"](adapter, seed=0, total_steps=1, schedule=lambda i, n: 1.0), base.model, sites
    )
    assert [name for name in unadapted(base.model)["routers"] if name.endswith("_gate")] == []


def test_a_familys_own_linear_layer_is_adapted_only_if_it_is_one() -> None:
    """Llama 4's router inherits from a linear layer and returns scores; Falcon's only rewrites W x."""
    router = AutoModelForCausalLM.from_config(
        grouped(Llama4TextConfig, head_dim=HEAD, intermediate_size_mlp=INNER, num_local_experts=4)
    )
    with pytest.raises(SpecError, match=r"feed_forward\.router'.*it is a Llama4Router, not a linear layer"):
        target_sites(router, ["router"])
    names = [f"model.layers.{i}.feed_forward.router" for i in (0, 1)]
    assert unadapted(router)["routers"] == names
    falcon = AutoModelForCausalLM.from_config(small(FalconConfig))
    assert len(target_sites(falcon, "auto")) == 2 * 4


def test_packing_is_refused_by_name_where_examples_would_see_each_other(
    training: Path, tmp_path: Path
) -> None:
    """BLOOM knows no positions."""
    config = BloomConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, n_layer=2, n_head=HEADS)
    base = load_base(save_base(tmp_path / "base", AutoModelForCausalLM.from_config(config)), name="tiny")
    with pytest.raises(SpecError, match=r"hyperparameters\.packing: .*set it to false"):
        list(train(run_spec(packing=True), base, training, None, tmp_path / "run"))
    progress = list(train(run_spec(packing="auto", n_epochs=1), base, training, None, tmp_path / "run"))
    assert one(Resolved, progress).spec.hyperparameters.packing is False


# --- the documentation -------------------------------------------------------------------------------------


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[3] / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [line for line in text.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert rows[1:] == [row_of(name, family) for name, family in FAMILIES.items()]


def row_of(name: str, family: Family) -> str:
    adapted = dict.fromkeys(ending.rpartition(".")[2] for ending in family.layers)
    layers = ", ".join(f"`{layer}`" for layer in adapted)
    packing = {"segments": "by segment", "positions": "by a mask"}[family.packed_by]
    return f"| {name} | {layers} | {', '.join(family.unadapted) or 'nothing'} | {packing} |"
