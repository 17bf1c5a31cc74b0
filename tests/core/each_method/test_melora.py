"""MELoRA against its mini LoRAs one by one in float64, and against LoRA where it is one."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from olora_core.bases.sites import target_sites
from olora_core.errors import SpecError
from olora_core.layers.adapter import Adapter, Site
from olora_core.methods import build_adapters
from olora_core.methods.lora import LoRAAdapter
from olora_core.methods.melora import MELoRAAdapter
from olora_core.specs import read_spec
from olora_core.specs.methods.melora import MELoRASpec
from tests.tiny_base import make_llama

from ..runs import chat_rows, losses, spec_for, train, write_rows
from .test_methods import make_method, randomise


def melora_adapter(out_features: int, in_features: int, **options: object) -> Adapter:
    site = Site("layer", None, 0, "linear", out_features, in_features)
    return make_method("melora", **options).adapter(torch.zeros(out_features, in_features), site)


@pytest.fixture(params=[2, 4, 8])
def moved(request: pytest.FixtureRequest) -> MELoRAAdapter:
    """A 24×40 adapter of 2, 4 or 8 mini LoRAs of rank 3, alpha 6, with random factors."""
    adapter = melora_adapter(24, 40, rank=3, mini_loras=request.param)
    assert isinstance(adapter, MELoRAAdapter)
    randomise({"": adapter}, 1.0)
    return adapter


def one_by_one(A: Tensor, B: Tensor, x: Tensor) -> Tensor:
    """The paper's formula: each slice through its own mini LoRA, the results end to end."""
    slices = x.chunk(len(A), dim=-1)
    return torch.cat([6 / 3 * x_i @ A_i.T @ B_i.T for A_i, B_i, x_i in zip(A, B, slices, strict=True)], -1)


@pytest.mark.parametrize("shape", [(40,), (7, 40), (2, 5, 40)])
def test_slices_go_through_their_own_mini_loras(moved: MELoRAAdapter, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    expected = one_by_one(moved.A.double(), moved.B.double(), x)
    torch.testing.assert_close(moved.delta(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    pair = moved.pair()
    torch.testing.assert_close(x @ (pair.B @ pair.A).double().T, expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_exact(moved: MELoRAAdapter) -> None:
    x = torch.randn(9, 40, dtype=torch.float64, requires_grad=True)
    A, B = (p.detach().double().requires_grad_() for p in (moved.A, moved.B))
    one_by_one(A, B, x).square().sum().backward()
    mine = x.detach().float().requires_grad_()
    moved.delta(mine).square().sum().backward()
    for got, exact in [(moved.A.grad, A.grad), (moved.B.grad, B.grad), (mine.grad, x.grad)]:
        torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-3)


def test_a_slice_of_the_inputs_reaches_its_slice_of_the_outputs_alone(moved: MELoRAAdapter) -> None:
    n, before = len(moved.A), torch.randn(40)
    for i in range(n):
        after = before.clone()
        after[i * 40 // n : (i + 1) * 40 // n] += 1
        changed = (moved.delta(after) != moved.delta(before)).nonzero().flatten()
        assert changed.tolist() == list(range(i * 24 // n, (i + 1) * 24 // n))


@pytest.mark.parametrize("mini_loras", [1, 2, 4, 8])
def test_the_rank_grows_with_the_mini_loras_and_the_count_does_not(mini_loras: int) -> None:
    adapter = melora_adapter(24, 40, rank=3, mini_loras=mini_loras)
    randomise({"": adapter}, 1.0)
    rank = 3 * mini_loras
    assert torch.linalg.matrix_rank(adapter.delta_weight().double(), rtol=1e-6) == rank
    assert adapter.pair().rank == rank
    lora_of_that_rank = rank * (24 + 40)
    assert sum(p.numel() for p in adapter.parameters()) == lora_of_that_rank / mini_loras


def test_each_mini_lora_starts_as_a_lora_of_its_slice() -> None:
    adapter = melora_adapter(16, 800, rank=2, mini_loras=8)
    bound = 1 / math.sqrt(100)
    assert adapter.A.shape == (8, 2, 100)
    assert 0.99 * bound < adapter.A.abs().max() <= bound
    assert adapter.A.var().item() == pytest.approx(1 / (3 * 100), rel=0.1)
    assert not torch.equal(adapter.A[0], adapter.A[1])
    assert not adapter.B.any()


def test_one_draw_of_the_dropout_serves_all_slices(moved: MELoRAAdapter) -> None:
    moved.dropout = 0.5
    x = torch.ones(200, 40)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    torch.manual_seed(1)
    expected = one_by_one(moved.A.double(), moved.B.double(), dropped.double())
    torch.testing.assert_close(moved.delta(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_its_card_is_its_default() -> None:
    adapter = read_spec(model="m", adapter={"method": "melora"}).adapter
    assert isinstance(adapter, MELoRASpec)
    assert (adapter.rank, adapter.mini_loras, adapter.alpha, adapter.dropout) == (1, 8, 16, 0.05)
    assert (adapter.scale, adapter.pair_rank) == (16, 8)


@pytest.mark.parametrize("mini_loras", [3, 5, 16])
def test_a_layer_that_cannot_be_cut_evenly_is_refused_by_name(mini_loras: int) -> None:
    with pytest.raises(SpecError, match=r"'layer' \(24×40\).*a divisor of 8,") as caught:
        melora_adapter(24, 40, mini_loras=mini_loras)
    assert caught.value.param == "adapter.mini_loras"


def test_a_rank_wider_than_a_slice_is_refused_by_name() -> None:
    melora_adapter(24, 40, rank=6, mini_loras=4)
    with pytest.raises(SpecError, match=r"'layer' \(4 slices of 6×10\).*at most 6") as caught:
        melora_adapter(24, 40, rank=7, mini_loras=4)
    assert caught.value.param == "adapter.rank"


def test_mini_loras_are_an_option_of_melora_alone() -> None:
    with pytest.raises(SpecError, match=r"adapter\.mini_loras is unknown"):
        read_spec(model="m", adapter={"method": "lora", "mini_loras": 2})


def test_one_mini_lora_is_lora_bit_for_bit(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    seen: list[Any] = []
    for method, options in (("lora", {}), ("melora", {"mini_loras": 1})):
        spec = spec_for(method, adapter={"dropout": 0.1, **options})
        folder = tmp_path / method
        seen.append(losses(train(spec, llama, training, None, folder)))
        seen.append((folder / "adapter" / "adapter_model.safetensors").read_bytes())
    assert seen[:2] == seen[2:]


def test_one_mini_lora_is_a_plain_lora_adapter(token_rows: Tensor) -> None:
    model = make_llama().requires_grad_(False)
    adapters = build_adapters(make_method("melora", mini_loras=1), model, target_sites(model, "auto"))
    assert {type(adapter) for adapter in adapters.values()} == {LoRAAdapter}
