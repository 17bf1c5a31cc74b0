"""Adapters of frozen layers: attach, detach, off."""

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from olora_core.layers.adapter import (
    AdaptedLinear,
    Adapter,
    LowRank,
    adapter_tensors,
    adapters_off,
    attach,
    attached,
    bare_modules,
    detach,
    load_adapter_tensors,
    site_weight,
)
from olora_core.methods.lora import LoRAAdapter


class Block(nn.Module):
    """Two names for one layer, and a Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 4)
        self.again = self.first
        self.conv = Conv1D(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x) + self.again(x))


@pytest.fixture
def block() -> Block:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Block().requires_grad_(False)


def random_adapter(out_features: int, in_features: int, *, dropout: float = 0.0) -> LoRAAdapter:
    draw = torch.Generator().manual_seed(7)
    A = torch.randn(3, in_features, generator=draw)
    B = torch.randn(out_features, 3, generator=draw)
    return LoRAAdapter(A, B, scale=0.5, dropout=dropout)


def test_a_layer_with_two_names_is_adapted_under_both(block: Block) -> None:
    x = torch.randn(2, 6)
    adapter = random_adapter(4, 6)
    W = block.first.weight + 0.5 * adapter.B @ adapter.A
    attach(block, {"first": adapter})
    assert block.first is block.again
    torch.testing.assert_close(block(x), block.conv(2 * (x @ W.T + block.first.bias)))


def test_a_conv1d_is_adapted_as_out_by_in(block: Block) -> None:
    x = torch.randn(2, 3, 4)
    adapter = random_adapter(5, 4)
    expected = x @ (block.conv.weight.T + 0.5 * adapter.B @ adapter.A).T + block.conv.bias
    assert site_weight(block.conv).shape == (5, 4)
    attach(block, {"conv": adapter})
    torch.testing.assert_close(block.conv(x), expected)


def test_off_and_detached_give_the_base_bit_for_bit(block: Block) -> None:
    x = torch.randn(3, 6)
    first, conv, before = block.first, block.conv, block(x)
    attach(block, {"first": random_adapter(4, 6), "conv": random_adapter(5, 4)})
    assert not torch.equal(block(x), before)
    with adapters_off(block):
        assert torch.equal(block(x), before)
    assert not torch.equal(block(x), before)
    detach(block)
    assert torch.equal(block(x), before)
    assert block.first is first
    assert block.again is first
    assert block.conv is conv


def test_off_ends_with_an_error_inside_and_nests(block: Block) -> None:
    attach(block, {"first": random_adapter(4, 6)})
    with pytest.raises(RuntimeError), adapters_off(block), adapters_off(block):
        raise RuntimeError
    assert [layer.enabled for layer in attached(block)] == [True]
    with adapters_off(block):
        with adapters_off(block):
            pass
        assert [layer.enabled for layer in attached(block)] == [False]


def test_an_adapter_follows_the_models_mode_and_device_of_its_layer(block: Block) -> None:
    block.eval()
    attach(block, {"first": random_adapter(4, 6, dropout=0.5)})
    x = torch.randn(3, 6)
    assert torch.equal(block(x), block(x))
    block.train()
    assert not torch.equal(block(x), block(x))


def test_code_that_looks_at_a_layers_weight_and_bias_still_finds_them(block: Block) -> None:
    weight, bias = block.first.weight, block.first.bias
    attach(block, {"first": random_adapter(4, 6)})
    assert isinstance(block.first, AdaptedLinear)
    assert block.first.weight is weight
    assert block.first.bias is bias


def test_the_bare_modules_are_the_same_with_and_without_adapters(block: Block) -> None:
    before = list(bare_modules(block))
    assert [name for name, _ in before] == ["", "first", "conv"]
    attach(block, {"first": random_adapter(4, 6), "conv": random_adapter(5, 4)})
    assert list(bare_modules(block)) == before


def test_only_linear_layers_take_an_adapter(block: Block) -> None:
    block.norm = nn.LayerNorm(6)
    with pytest.raises(ValueError, match="norm is a LayerNorm"):
        attach(block, {"norm": random_adapter(6, 6)})


def test_tensors_come_back_in_place_and_exactly() -> None:
    source, target = {"a.b": random_adapter(4, 6)}, {"a.b": random_adapter(4, 6)}
    with torch.no_grad():
        source["a.b"].A.mul_(3)
    A = target["a.b"].A
    load_adapter_tensors(target, adapter_tensors(source))
    assert target["a.b"].A is A
    assert torch.equal(A, source["a.b"].A)


def test_tensors_of_another_adapter_are_refused() -> None:
    mine, tensors = {"a": random_adapter(4, 6)}, adapter_tensors({"b": random_adapter(4, 6)})
    with pytest.raises(KeyError, match="only one side"):
        load_adapter_tensors(mine, tensors)
    with pytest.raises(ValueError, match=r"a\.B is \(5, 3\)"):
        load_adapter_tensors(mine, adapter_tensors({"a": random_adapter(5, 6)}))


class Dense(Adapter):
    """An adapter without a low-rank form."""

    def __init__(self, change: Tensor) -> None:
        super().__init__(change.shape[1], change.shape[0])
        self.change = nn.Parameter(change)

    def delta(self, x: Tensor) -> Tensor:
        return x @ self.change.T

    def pair(self) -> LowRank | None:
        return None


def test_delta_weight_comes_free_from_delta() -> None:
    change = torch.randn(4, 6)
    assert torch.equal(Dense(change).delta_weight(), change)
