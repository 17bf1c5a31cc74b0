"""What a comparison may be asked for."""

from typing import Any

import pytest

from olora_core.errors import SpecError
from olora_core.specs import ADAPTER_SPECS, ComparisonSpec, LoRASpec, OLoRASpec, read_comparison


def refused(**values: Any) -> SpecError:
    with pytest.raises(SpecError) as caught:
        read_comparison(model="m", **values)
    return caught.value


def test_all_stands_for_every_method() -> None:
    assert list(read_comparison(model="m").labels) == list(ADAPTER_SPECS)
    rest = read_comparison(model="m", methods=[{"method": "lora", "rank": 4}, "all"])
    assert len(rest.methods) == len(ADAPTER_SPECS)
    assert rest.baseline == 0


def test_plain_lora_is_always_among_them() -> None:
    assert read_comparison(model="m", methods=["olora"]).labels == ("olora", "lora")
    plus = read_comparison(model="m", methods=[{"method": "lora", "lora_plus_ratio": 16}])
    assert plus.labels == ("lora (lora_plus_ratio 16.0)", "lora")
    assert plus.baseline == 1
    attention = read_comparison(model="m", methods=[{"method": "olora", "target_modules": ["q_proj"]}])
    assert attention.methods[1].adapter == LoRASpec(target_modules=("q_proj",))


def test_a_rank_that_is_given_stays_and_others_meet_the_budget() -> None:
    spec = read_comparison(model="m", methods=["olora", {"method": "olora", "r": 16}, "lora"])
    assert [compared.match_budget for compared in spec.methods] == [True, False, True]
    assert spec.methods[1].adapter == OLoRASpec(rank=16)
    assert spec.labels == ("olora", "olora (rank 16)", "lora")


def test_rates_are_put_in_order() -> None:
    spec = read_comparison(model="m", learning_rates=[1e-2, 1e-4])
    assert spec.learning_rates == (1e-4, 1e-2)


def test_it_survives_json() -> None:
    spec = read_comparison(
        model="m", methods=["olora", {"method": "cola", "links": 2}], learning_rates=[1e-4], type="dpo"
    )
    assert ComparisonSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.hyperparameters.beta == "auto"


def test_what_has_no_adapter_can_be_compared_all_the_same() -> None:
    spec = read_comparison(model="m", methods=[{"method": "mora", "type": 6, "export": "merged"}])
    assert spec.labels == ("mora", "lora")


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    error = refused(methods=["lora", "olara"])
    assert error.param == "methods[1]"
    assert "did you mean 'olora'?" in error.message


def test_an_option_of_a_method_is_refused_with_its_place() -> None:
    error = refused(methods=["lora", {"method": "olora", "rnk": 4}])
    assert error.param == "methods[1].rnk"
    assert "did you mean 'rank'?" in error.message


def test_the_same_method_twice_is_refused() -> None:
    assert refused(methods=["olora", "lora", {"method": "olora"}]).param == "methods[2]"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", 1e-4),
        ("lr", 1e-4),
        ("learning_rate_multiplier", 2),
        ("early_stopping_patience", 2),
        ("eval_steps", 10),
        ("samples", 0),
        ("rank", 8),
        ("lora_alpha", 8),
    ],
)
def test_what_the_comparison_decides_cannot_be_chosen(name: str, value: Any) -> None:
    error = refused(hyperparameters={name: value}, prefix="method.supervised.hyperparameters")
    assert error.param == f"method.supervised.hyperparameters.{name}"


def test_what_is_left_to_auto_is_no_choice() -> None:
    spec = read_comparison(model="m", hyperparameters={"learning_rate": "auto", "n_epochs": 2})
    assert spec.hyperparameters.n_epochs == 2


@pytest.mark.parametrize(
    ("values", "param"),
    [
        ({"methods": []}, "methods"),
        ({"methods": [7]}, "methods[0]"),
        ({"methods": [{"rank": 4}]}, "methods[0]"),
        ({"methods": [{"method": "lora", "export_rank": 4}]}, "methods[0].export_rank"),
        ({"methods": [{"method": "lora", "export": "merged"}]}, "methods[0].export"),
        ({"methods": [{"method": "mora", "type": 6}]}, "methods[0].export"),
        ({"methods": [{"method": "lora", "rank": 0}]}, "methods[0].rank"),
        ({"learning_rates": []}, "learning_rates"),
        ({"learning_rates": [1e-4, 1e-4]}, "learning_rates"),
        ({"learning_rates": [0.0]}, "learning_rates"),
        ({"learning_rates": "fast"}, "learning_rates"),
        ({"learning_rates": [True]}, "learning_rates"),
        ({"seeds": 0}, "seeds"),
        ({"seeds": 21}, "seeds"),
        ({"seeds": True}, "seeds"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31 - 1, "seeds": 2}, "seed"),
        ({"budget": 0}, "budget"),
        ({"search_share": 0.7}, "search_share"),
        ({"hyperparameters": {"n_epoch": 2}}, "hyperparameters.n_epoch"),
        ({"type": "ppo"}, "method.type"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_place(values: dict[str, Any], param: str) -> None:
    assert refused(**values).param == param
