"""What a caller may ask for: names, aliases, bounds, and the numbers that "auto" becomes."""

import subprocess
import sys
from typing import Any

import pytest

from olora_core.errors import SpecError
from olora_core.specs import (
    ADAPTER_ALIASES,
    ADAPTER_SPECS,
    RunFacts,
    TrainSpec,
    auto_batch_size,
    auto_epochs,
    known_hyperparameters,
    learning_rate_for,
    read_spec,
    resolve,
)
from olora_core.specs.methods.ba_lora import BALoRASpec
from olora_core.specs.methods.lora import LoRASpec
from olora_core.specs.methods.melora import MELoRASpec
from olora_core.specs.methods.mora import MoRASpec
from olora_core.specs.methods.olora import OLoRASpec
from olora_core.specs.methods.pissa import PiSSASpec
from olora_core.specs.methods.sora import SoRASpec
from olora_core.specs.methods.tt_lora import TTLoRASpec


def spec(hyperparameters: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None) -> TrainSpec:
    return read_spec(model="m", hyperparameters=hyperparameters, adapter=adapter)


def refused(
    hyperparameters: dict[str, Any] | None = None, adapter: dict[str, Any] | None = None
) -> SpecError:
    with pytest.raises(SpecError) as caught:
        spec(hyperparameters, adapter)
    return caught.value


FACTS = RunFacts(examples=100, hidden_size=192, context_length=256)


def test_nothing_asked_is_olora_with_its_card() -> None:
    adapter = spec().adapter
    assert isinstance(adapter, OLoRASpec)
    assert (adapter.rank, adapter.alpha, adapter.scale, adapter.dropout) == (8, 16, 2.0, 0)


def test_lora_has_its_own_card() -> None:
    adapter = spec(adapter={"method": "lora"}).adapter
    assert isinstance(adapter, LoRASpec)
    assert (adapter.rank, adapter.alpha, adapter.scale) == (8, 16, 2)


def test_rslora_scales_by_the_root_of_the_rank() -> None:
    assert spec(adapter={"rank": 16, "alpha": 8, "rslora": True}).adapter.scale == 2


@pytest.mark.parametrize(
    ("given", "place", "name", "value"),
    [
        ({"lora_r": 4}, "adapter", "rank", 4),
        ({"r": 4}, "adapter", "rank", 4),
        ({"rank": 4}, "adapter", "rank", 4),
        ({"lora_alpha": 3.5}, "adapter", "alpha", 3.5),
        ({"lora_dropout": 0.1}, "adapter", "dropout", 0.1),
        ({"lora_target_modules": ["q_proj"]}, "adapter", "target_modules", ("q_proj",)),
        ({"target_modules": "auto"}, "adapter", "target_modules", "auto"),
        ({"lr": 1e-3}, "hyperparameters", "learning_rate", 1e-3),
        ({"epochs": 2}, "hyperparameters", "n_epochs", 2),
        ({"lr_scheduler_type": "cosine"}, "hyperparameters", "schedule", "cosine"),
        ({"packing": True}, "hyperparameters", "packing", True),
        ({"context_length": 8192}, "hyperparameters", "context_length", 8192),
        ({"warmup_ratio": 0}, "hyperparameters", "warmup_ratio", 0),
        ({"lora": True}, "adapter", "method", "olora"),
    ],
)
def test_names_of_hosted_services_are_understood(given, place, name, value) -> None:
    assert getattr(getattr(spec(given), place), name) == value


def test_aliases_work_in_the_adapter_object_too() -> None:
    assert spec(adapter={"lora_r": 4, "lora_alpha": 8}).adapter.rank == 4


@pytest.mark.parametrize(
    ("given", "suggestion"),
    [
        ({"learningrate": 1}, "learning_rate"),
        ({"batchsize": 1}, "batch_size"),
        ({"n_epoch": 1}, "n_epochs"),
        ({"lora_rank": 1}, "lora_r"),
        ({"warmup": 1}, "warmup_ratio"),
    ],
)
def test_an_unknown_hyperparameter_names_the_nearest(given, suggestion) -> None:
    error = refused(given)
    assert f"did you mean '{suggestion}'" in error.message
    assert error.param == f"hyperparameters.{next(iter(given))}"


@pytest.mark.parametrize("name", known_hyperparameters())
def test_every_suggested_name_is_accepted(name) -> None:
    values: dict[str, Any] = {
        "lora": True,
        "schedule": "linear",
        "lr_scheduler_type": "linear",
        "packing": False,
        "rslora": False,
        "lora_dropout": 0,
        "dropout": 0,
        "max_steps": None,
        "quantization": "nf4",
        "train_on_reasoning": False,
        "control_tokens": "text",
        "export_rank": None,
        "target_modules": "auto",
        "lora_target_modules": "auto",
        "dtype": "auto",
        "sharding": "auto",
        "context_length": "auto",
        "micro_batch_tokens": "auto",
        "label_smoothing": 0.1,
        "neftune_alpha": 0,
        "early_stopping_min_delta": 0,
        "modes": {768: [12, 8, 8]},
        "scale_by": "rank",
        "prune_share": 0.75,
        "prune_group": "matrix",
        "prune_at_end": False,
        "regrow": False,
        "importance_decay": 0.5,
    }
    option = ADAPTER_ALIASES.get(name, name)
    takes_it = (method for method, spec in ADAPTER_SPECS.items() if option in spec.model_fields)
    method = next(takes_it, "olora")
    field = ADAPTER_SPECS[method].model_fields.get(option)
    value = values.get(name, 1 if field is None else field.default)
    # dpo takes all of them.
    read_spec(model="m", type="dpo", adapter={"method": method}, hyperparameters={name: value})


def test_an_unknown_option_of_the_adapter_names_the_nearest() -> None:
    error = refused(adapter={"rnk": 4})
    assert error.param == "adapter.rnk"
    assert "did you mean 'rank'" in error.message


def test_an_unknown_method_names_the_nearest_and_all() -> None:
    error = refused(adapter={"method": "olorra"})
    assert error.param == "adapter.method"
    assert "did you mean 'olora'" in error.message
    assert "lora" in error.message


def test_the_method_is_not_taken_from_the_hyperparameters() -> None:
    assert refused({"method": "lora"}).param == "hyperparameters.method"


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"learning_rate": 1e-4, "learning_rate_multiplier": 2}, "hyperparameters.learning_rate"),
        ({"lr": 1e-4, "learning_rate": 2e-4}, "hyperparameters.learning_rate"),
        ({"lora_r": 4, "rank": 8}, "hyperparameters.rank"),
        ({"lora": False}, "hyperparameters.lora"),
    ],
)
def test_contradictions_are_refused(given, param) -> None:
    assert refused(given).param == param


def test_the_same_value_under_two_names_is_no_contradiction() -> None:
    assert spec({"lora_r": 4, "rank": 4}).adapter.rank == 4
    assert spec({"lora_r": 4}, {"rank": 4}).adapter.rank == 4


def test_a_rank_given_twice_differently_is_refused() -> None:
    assert "contradicts" in refused({"lora_r": 4}, {"rank": 8}).message


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"n_epochs": 0}, "must be at least 1 or 'auto' (got 0)."),
        ({"n_epochs": 51}, "must be at most 50 or 'auto' (got 51)."),
        ({"n_epochs": 1.5}, "must be a whole number or 'auto' (got 1.5)."),
        ({"batch_size": 257}, "must be at most 256 or 'auto' (got 257)."),
        ({"learning_rate_multiplier": 0}, "must be greater than 0 or 'auto' (got 0)."),
        ({"learning_rate": float("nan")}, "must be 'auto', 'table' or a finite number (got nan)."),
        ({"learning_rate": float("inf")}, "must be 'auto', 'table' or a finite number (got inf)."),
        ({"schedule": "step"}, "must be 'linear', 'cosine' or 'constant' (got 'step')."),
        ({"dtype": "fp16"}, "must be 'auto', 'float32' or 'bfloat16' (got 'fp16')."),
        ({"lora_r": 0}, "must be at least 1 (got 0)."),
        ({"lora_dropout": 1}, "must be less than 1 (got 1)."),
        ({"target_modules": []}, "must be 'auto' or at least one module name (got [])."),
        ({"target_modules": 5}, "must be a string, a list or 'auto' (got 5)."),
        ({"target_modules": "(q"}, "must be a valid regular expression"),
        ({"lora_r": 10**9}, "must be at most 4096 (got 1000000000)."),
        ({"lora_r": "many"}, "must be a whole number (got 'many')."),
        ({"lora_r": "7" * 100}, f"(got '{'7' * 76}…)."),
        ({"rslora": "maybe"}, "must be true or false (got 'maybe')."),
        ({"packing": "maybe"}, "must be true, false or 'auto' (got 'maybe')."),
        ({"sharding": "half"}, "must be 'none', 'full' or 'auto' (got 'half')."),
        ({"max_steps": "all"}, "must be a whole number (got 'all')."),
    ],
)
def test_what_does_not_fit_is_refused_with_its_bounds(given, says) -> None:
    error = refused(given)
    name = next(iter(given))
    shown = {"lora_r": "rank", "lora_dropout": "dropout"}.get(name, name)
    assert error.param == f"hyperparameters.{shown}"
    assert says in error.message
    assert error.code == "invalid_request"


def test_auto_is_mentioned_where_it_may_be_said() -> None:
    assert "or 'auto'" in refused({"batch_size": "many"}).message


def test_several_misfits_are_counted() -> None:
    assert "1 more value is invalid." in refused({"n_epochs": 0, "batch_size": 0}).message


@pytest.mark.parametrize("seed", [-1, 2**31, "7", 1.5, True, None])
def test_a_seed_is_an_integer_of_31_bits(seed) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", seed=seed)
    assert caught.value.param == "seed"
    assert read_spec(model="m", seed=2**31 - 1).seed == 2147483647


def test_other_training_types_are_refused() -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", type="reinforcement")
    assert caught.value.param == "method.type"


def test_dpo_has_a_beta_and_supervised_training_has_none() -> None:
    asked = read_spec(model="m", type="dpo")
    assert asked.hyperparameters.beta == "auto"
    resolved, why = resolve(asked, RunFacts(100, 192, 128))
    assert resolved.hyperparameters.beta == 0.1
    assert "beta = 0.1" in why["beta"]
    for given in ({"beta": 2}, {"beta": 0.01}):
        assert read_spec(model="m", type="dpo", hyperparameters=given).hyperparameters.beta == given["beta"]
    supervised, why = resolve(read_spec(model="m", hyperparameters={"beta": None}), RunFacts(100, 192, 128))
    assert supervised.hyperparameters.beta is None
    assert "beta" not in why


@pytest.mark.parametrize("beta", [0, -0.1, 2.01, "much"])
def test_betas_that_do_not_fit_are_refused(beta) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", type="dpo", hyperparameters={"beta": beta})
    assert caught.value.param == "hyperparameters.beta"


@pytest.mark.parametrize("beta", [0.1, "auto"])
def test_beta_is_refused_by_name_without_dpo(beta) -> None:
    with pytest.raises(SpecError, match="or use dpo") as caught:
        read_spec(model="m", hyperparameters={"beta": beta})
    assert caught.value.param == "hyperparameters.beta"


@pytest.mark.parametrize("method", ADAPTER_SPECS)
def test_a_spec_comes_back_from_json(method) -> None:
    asked = spec({"n_epochs": 3, "target_modules": ["q_proj"]}, {"method": method})
    assert TrainSpec.model_validate_json(asked.model_dump_json()) == asked
    assert TrainSpec.model_validate(asked.model_dump(mode="json")) == asked


# --- what auto becomes: OpenAI's public rule, and the table of the docs ---------------------------------


@pytest.mark.parametrize(
    ("examples", "epochs"),
    [
        *((1, 25), (4, 25), (10, 10), (20, 5), (33, 3), (34, 3), (100, 3)),
        *((8333, 3), (8334, 2), (12_500, 2), (12_501, 1), (25_000, 1), (1_000_000, 1)),
    ],
)
def test_auto_epochs_are_openais(examples, epochs) -> None:
    assert auto_epochs(examples) == epochs


@pytest.mark.parametrize(
    ("examples", "batch"), [(1, 4), (2000, 4), (3000, 6), (10_000, 20), (128_000, 256), (10**6, 256)]
)
def test_auto_batch_is_a_fifth_of_a_percent(examples, batch) -> None:
    assert auto_batch_size(examples) == batch


@pytest.mark.parametrize(
    ("adapter", "width", "rate"),
    [
        (OLoRASpec(), 4096, 4e-6),
        (OLoRASpec(), 576, 1.9e-4),
        (OLoRASpec(), 192, 1.6e-3),
        (LoRASpec(), 4096, 2e-4),
        (LoRASpec(), 192, 3e-3),
        (PiSSASpec(), 4096, 1.3e-5),
        (PiSSASpec(), 192, 2.2e-3),
        (MELoRASpec(), 4096, 3e-4),
        (BALoRASpec(), 4096, 1.3e-5),
        (BALoRASpec(), 192, 2.2e-3),
        (SoRASpec(), 4096, 1.8e-4),
        (SoRASpec(), 192, 8.6e-3),
        (TTLoRASpec(), 4096, 1e-3),
        (TTLoRASpec(), 192, 3e-3),
        (MoRASpec(), 4096, 3e-4),
        (MoRASpec(), 192, 4.5e-3),
    ],
)
def test_the_learning_rate_goes_through_its_anchors(adapter, width, rate) -> None:
    assert learning_rate_for(adapter, width) == rate


@pytest.mark.parametrize("adapter", [OLoRASpec(), LoRASpec(), PiSSASpec(), MELoRASpec(), BALoRASpec()])
def test_wider_models_learn_more_slowly(adapter) -> None:
    rates = [learning_rate_for(adapter, width) for width in (128, 256, 896, 2048, 4096, 8192)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(
    ("adapter", "published"),
    [
        (OLoRASpec(rank=128, alpha=128), 1.1e-5),
        (PiSSASpec(rank=128, alpha=128), 2e-5),
        (LoRASpec(rank=128, alpha=128), 2e-4),
    ],
    ids=["olora", "pissa", "lora"],
)
def test_the_learning_rate_is_within_a_factor_2_of_published_optima(adapter, published) -> None:
    """Of arXiv 2602.04998, a model of hidden size 1024 with the scale 1."""
    assert published / 2 < learning_rate_for(adapter, 1024) < 2 * published


@pytest.mark.parametrize("method", ["olora", "pissa", "ba_lora"])
def test_where_the_update_depends_on_scale_times_rate_so_does_the_learning_rate(method) -> None:
    def rate(**options) -> float:
        return learning_rate_for(ADAPTER_SPECS[method](**options), 576)

    for rank in (8, 32):
        products = [alpha * rate(rank=rank, alpha=alpha) for alpha in (4, 16, 64)]
        assert products == pytest.approx([products[0]] * 3, rel=0.03)  # rates have two digits
    assert rate(rank=16, alpha=16) == pytest.approx(rate(rank=16, alpha=4, rslora=True), rel=0.03)


def test_every_auto_becomes_a_number_with_a_reason() -> None:
    resolved, why = resolve(spec(), FACTS)
    h = resolved.hyperparameters
    assert (h.n_epochs, h.batch_size, h.micro_batch_size) == (3, 4, 4)
    assert (h.learning_rate, h.learning_rate_multiplier) == (1.6e-3, 1.0)
    assert (h.context_length, h.dtype) == (256, "float32")
    assert list(why) == [
        "n_epochs",
        "batch_size",
        "context_length",
        "dtype",
        "learning_rate",
    ]


def test_a_multiplier_scales_the_methods_own_rate() -> None:
    resolved, _ = resolve(spec({"learning_rate_multiplier": 0.5}), FACTS)
    assert resolved.hyperparameters.learning_rate == 8e-4


def test_an_absolute_rate_is_kept_and_told_as_a_multiplier() -> None:
    resolved, _ = resolve(spec({"learning_rate": 3.2e-3}), FACTS)
    assert resolved.hyperparameters.learning_rate == 3.2e-3
    assert resolved.hyperparameters.learning_rate_multiplier == pytest.approx(2)


def test_what_was_asked_is_not_decided_again() -> None:
    asked = {
        "n_epochs": 7,
        "batch_size": 12,
        "context_length": 64,
        "micro_batch_size": 3,
        "dtype": "bfloat16",
    }
    resolved, why = resolve(spec(asked), FACTS)
    assert {name: getattr(resolved.hyperparameters, name) for name in asked} == asked
    assert len(why) == 1  # the learning rate


def test_a_resolved_spec_is_left_as_it_is() -> None:
    once, _ = resolve(spec({"learning_rate_multiplier": 0.7}), FACTS)
    assert resolve(once, RunFacts(5000, 4096, 512, "bfloat16")) == (once, {})


def test_a_pass_may_hold_the_whole_batch() -> None:
    resolved, _ = resolve(spec({"batch_size": 64}), FACTS)
    assert resolved.hyperparameters.micro_batch_size == 64


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ({"batch_size": 2, "micro_batch_size": 4}, "micro_batch_size"),
        ({"context_length": 512}, "context_length"),
    ],
)
def test_what_the_model_or_batch_cannot_hold_is_refused(asked, name) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(spec(asked), FACTS)
    assert caught.value.param == f"hyperparameters.{name}"


def test_specs_and_formats_leave_torch_unloaded() -> None:
    program = "import sys, olora_core.specs, olora_core.formats; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.parametrize("rate", [1e-300, 1e-6, 1.0, 10.0])
def test_a_resolved_spec_keeps_to_the_bounds_of_a_request(rate: float) -> None:
    resolved, _ = resolve(spec({"learning_rate": rate}), FACTS)
    assert TrainSpec.model_validate(resolved.model_dump(mode="json")) == resolved


def test_a_multiplier_that_leads_to_an_impossible_rate_is_refused() -> None:
    with pytest.raises(SpecError, match=r"at most 10 \(got 1600\.0\)") as refused:
        resolve(spec({"learning_rate_multiplier": 1e6}), FACTS)
    assert refused.value.param == "hyperparameters.learning_rate"


@pytest.mark.parametrize("method", [["olora"], {}, None, 3])
def test_a_method_that_is_no_name_is_refused(method: object) -> None:
    with pytest.raises(SpecError, match="Available: olora, lora, "):
        read_spec(model="m", adapter={"method": method})


def test_an_option_and_its_alias_contradict_each_other_also_within_the_adapter() -> None:
    with pytest.raises(SpecError, match="contradicts rank = 4") as refused:
        read_spec(model="m", adapter={"rank": 4, "lora_r": 8})
    assert refused.value.param == "adapter.lora_r"
    assert read_spec(model="m", adapter={"rank": 4, "lora_r": 4}).adapter.rank == 4


@pytest.mark.parametrize(
    ("adapter", "hyperparameters", "param"),
    [
        ({"rank": True}, {}, "adapter.rank"),
        ({}, {"n_epochs": True}, "hyperparameters.n_epochs"),
        ({}, {1: 2}, "hyperparameters.1"),
    ],
)
def test_true_is_no_number_and_a_number_is_no_name(
    adapter: dict[str, object], hyperparameters: dict[str, object], param: str
) -> None:
    with pytest.raises(SpecError) as refused:
        read_spec(model="m", adapter=adapter, hyperparameters=hyperparameters)
    assert refused.value.param == param
