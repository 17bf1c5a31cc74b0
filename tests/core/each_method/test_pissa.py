"""PiSSA against PEFT's, and its factors against the SVD in float64."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PreTrainedModel

from olora_core.bases.sites import target_sites
from olora_core.errors import ModelError
from olora_core.layers.adapter import Site
from olora_core.methods import build_adapters
from olora_core.methods.olora import OLoRAAdapter
from tests.tiny_base import make_gpt2, make_llama

from .test_methods import adapted, make_method, sgd_losses

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPES = [(24, 24), (40, 24), (24, 40), (257, 64)]


def weight_of(shape: tuple[int, int], seed: int = 2) -> Tensor:
    """Random, with singular values that fall as those of trained weights do."""
    U, _, Vt = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    return torch.from_numpy((U * 3 / np.arange(1, min(shape) + 1) ** 0.5) @ Vt).float()


def best_part(weight: Tensor, rank: int) -> Tensor:
    """Eckart and Young: the nearest matrix of that rank, in float64."""
    U, S, Vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return torch.from_numpy((U[:, :rank] * S[:rank]) @ Vt[:rank])


def pissa_adapter(weight: Tensor, *, name: str = "layer", seed: int = 0, **options: object) -> OLoRAAdapter:
    site = Site(name, None, 0, "linear", *weight.shape)
    adapter = make_method("pissa", seed=seed, **options).adapter(weight, site)
    assert isinstance(adapter, OLoRAAdapter)
    return adapter


@pytest.mark.parametrize("iterations", [None, 16])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_start_is_the_best_part_of_the_weight(shape: tuple[int, int], iterations: int | None) -> None:
    W = weight_of(shape)
    for rank in (1, 5, 24):
        adapter = pissa_adapter(W, rank=rank, alpha=7, svd_iterations=iterations)
        A0, B0 = adapter.A0.double(), adapter.B0.double()
        expected = best_part(W, rank)
        start = 7 / rank * B0 @ A0
        # Power iterations tell close singular values apart slowly, but leave no more of W than the best does.
        assert (start - expected).norm() < (1e-4 if iterations is None else 1e-2) * expected.norm()
        assert (W - start).norm() < 1.0001 * (W - expected).norm() + 1e-4
        # The singular values are shared evenly.
        torch.testing.assert_close(B0.T @ B0, A0 @ A0.T, rtol=1e-4, atol=1e-4)


def test_few_power_iterations_are_less_exact_and_start_as_the_base_all_the_same() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))

    def error(iterations: int | None) -> float:
        adapter = pissa_adapter(W, rank=8, alpha=8, svd_iterations=iterations)
        assert not adapter.delta(torch.randn(5, 64)).any()
        return float((adapter.B0 @ adapter.A0 - best_part(W, 8)).norm())

    assert error(0) > 10 * error(16)
    assert error(16) > error(None)


def test_the_factors_do_not_depend_on_the_weights_dtype_and_are_fp32() -> None:
    W = weight_of((40, 24)).bfloat16()
    low, wide = pissa_adapter(W), pissa_adapter(W.float())
    assert torch.equal(low.A0, wide.A0)
    assert torch.equal(low.B0, wide.B0)
    assert {low.A0.dtype, low.B0.dtype, pissa_adapter(W.double()).A0.dtype} == {torch.float32}


def test_the_draw_is_of_the_seed_and_the_layer_and_the_exact_svd_has_none() -> None:
    W = torch.randn(64, 64, generator=torch.Generator().manual_seed(3))
    first = pissa_adapter(W, svd_iterations=0)
    for other in ({"name": "there"}, {"seed": 1}):
        assert not torch.equal(pissa_adapter(W, svd_iterations=0, **other).A0, first.A0)
        exact, again = pissa_adapter(W, svd_iterations=None), pissa_adapter(W, svd_iterations=None, **other)
        assert torch.equal(exact.A0, again.A0)


def test_a_conv1d_is_factored_the_right_way_round() -> None:
    model = make_gpt2()
    adapters = adapted(model, make_method("pissa"))
    for name in ("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_proj"):
        W = model.get_submodule(name).weight.T
        start = 6 / 4 * adapters[name].B0.double() @ adapters[name].A0.double()
        torch.testing.assert_close(start, best_part(W.detach(), 4), rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_weight_that_is_not_finite_is_refused_by_name(value: str) -> None:
    W = torch.randn(24, 40)
    W[5, 39] = float(value)
    with pytest.raises(ModelError, match="'layer' is not finite"):
        pissa_adapter(W)


def test_decay_is_pointed_out() -> None:
    assert make_method("pissa").notes == []
    (note,) = make_method("pissa", weight_decay=0.01).notes
    assert "PiSSA's factors" in note


@pytest.mark.parametrize("iterations", [None, 16])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(
    ("make", "targets"),
    [(make_llama, ["q_proj", "o_proj", "down_proj"]), (make_gpt2, ["c_attn", "c_proj", "c_fc"])],
)
def test_the_loss_falls_as_with_pefts_pissa_step_by_step(
    token_rows: Tensor, make, targets: list[str], rslora: bool, iterations: int | None
) -> None:
    """PEFT takes an exact SVD and moves the start into W; y and both gradients are the same functions."""
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        use_rslora=rslora,
        init_lora_weights="pissa",
        target_modules=targets,
        fan_in_fan_out=make is make_gpt2,
    )
    theirs = get_peft_model(make(), config)
    mine: PreTrainedModel = make().requires_grad_(False)
    method = make_method("pissa", rslora=rslora, svd_iterations=iterations)
    build_adapters(method, mine, target_sites(mine, targets))
    got, expected = sgd_losses(mine, token_rows), sgd_losses(theirs, token_rows)
    assert expected[-1] < expected[0] - 0.1
    assert got == pytest.approx(expected, rel=1e-5 if iterations is None else 1e-3)
