"""How many numbers a method trains, and the rank at which it trains as many as asked."""

import pytest
from transformers import PreTrainedModel

from olora_core.bases.sites import target_sites
from olora_core.comparison.budget import trainable_parameters, within_budget
from olora_core.errors import SpecError
from olora_core.layers.adapter import Site, detach
from olora_core.methods import METHODS, Method, build_adapters
from olora_core.methods.xgblora import XGBLoRA
from olora_core.specs import ADAPTER_SPECS, AdapterSpec
from olora_core.specs.methods.cola import COLASpec
from olora_core.specs.methods.lora import LoRASpec
from olora_core.specs.methods.melora import MELoRASpec
from olora_core.specs.methods.mora import MoRASpec
from olora_core.specs.methods.olora import OLoRASpec
from tests.tiny_base import make_gpt2, make_llama

STEPS = 50
BASES = {"linear": make_llama, "conv1d": make_gpt2}


@pytest.fixture(params=BASES)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return BASES[request.param]()


@pytest.fixture(params=METHODS)
def adapter(request: pytest.FixtureRequest) -> AdapterSpec:
    return ADAPTER_SPECS[request.param](rank=2)


def built(adapter: AdapterSpec, model: PreTrainedModel) -> int:
    """The numbers that a run's optimizer moves, counted in the tensors themselves."""
    method: Method = METHODS[adapter.method](
        adapter, seed=3, total_steps=STEPS, schedule=lambda i, n: 1.0, weight_decay=0.0
    )
    adapters = build_adapters(method, model, target_sites(model, "auto"))
    numbers = {name: sum(p.numel() for p in a.parameters()) for name, a in adapters.items()}
    detach(model)
    if isinstance(adapter, COLASpec):
        return sum(adapter.links * n for n in numbers.values())
    if isinstance(method, XGBLoRA):
        rounds = [method.drawn(step) for step in range(0, STEPS, method.round_steps)]
        return sum(n for drawn in rounds for name, n in numbers.items() if method.layer_of[name] in drawn)
    return sum(numbers.values())


@pytest.mark.methods
def test_the_count_of_a_method_is_what_its_run_trains(adapter: AdapterSpec, model: PreTrainedModel) -> None:
    model.requires_grad_(False)
    assert trainable_parameters(adapter, target_sites(model, "auto"), STEPS) == built(adapter, model)


def test_a_chain_counts_only_links_that_a_run_has_steps_for(model: PreTrainedModel) -> None:
    sites = target_sites(model, "auto")
    one = trainable_parameters(LoRASpec(rank=4), sites, 2)
    assert trainable_parameters(COLASpec(rank=4, links=3), sites, 2) == 2 * one


def test_every_method_comes_as_near_to_the_budget_as_its_ranks_allow(
    adapter: AdapterSpec, model: PreTrainedModel
) -> None:
    """By trying every rank that can be built at all."""
    sites = target_sites(model, "auto")
    model.requires_grad_(False)
    budget = trainable_parameters(LoRASpec(rank=8), sites, STEPS)
    chosen = within_budget(adapter, budget, sites, STEPS)
    reached = []
    for rank in range(1, 33):
        try:
            reached.append(built(type(adapter)(rank=rank), model))
        except SpecError:
            continue
    assert abs(built(chosen, model) - budget) == min(abs(numbers - budget) for numbers in reached)


def test_lora_meets_its_own_budget_exactly(model: PreTrainedModel) -> None:
    sites = target_sites(model, "auto")
    budget = sum(8 * (site.in_features + site.out_features) for site in sites)
    assert within_budget(LoRASpec(), budget, sites, STEPS).rank == 8
    assert within_budget(OLoRASpec(alpha=3), budget, sites, STEPS) == OLoRASpec(rank=8, alpha=3)


def test_no_rank_is_chosen_that_no_server_loads() -> None:
    wide = [Site("layer", 0, 1, "linear", 2048, 2048)]
    assert within_budget(LoRASpec(), 10**9, wide, STEPS).rank == 512
    assert within_budget(OLoRASpec(), 10**9, wide, STEPS).rank == 256
    assert within_budget(MoRASpec(), 10**9, wide, STEPS).rank == 64  # √(64 · 4096) = 512
    assert within_budget(MoRASpec(restart_every=10), 10**9, wide, STEPS).rank == 16


def test_a_method_without_a_fitting_rank_is_refused_by_name() -> None:
    narrow = [Site("layer", 0, 1, "linear", 4, 4)]
    with pytest.raises(SpecError, match="melora has no rank"):
        within_budget(MELoRASpec(), 100, narrow, STEPS)
