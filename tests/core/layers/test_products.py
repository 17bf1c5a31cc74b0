"""The fused product of a frozen layer and its adapter against float64, and against the parts it fuses."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from olora_core.layers.adapter import AdaptedLinear
from olora_core.layers.products import LowRankProduct
from olora_core.methods.lora import LoRAAdapter
from olora_core.methods.olora import OLoRAAdapter

IN, OUT, R, SCALE = 12, 20, 3, 0.7


def factors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """A, B, A0, B0."""
    draw = torch.Generator().manual_seed(3)
    shapes = ((R, IN), (OUT, R), (R, IN), (OUT, R))
    return tuple(torch.randn(*shape, generator=draw).to(dtype) for shape in shapes)


def adapter_of(kind: str) -> LoRAAdapter:
    A, B, A0, B0 = factors()
    if kind == "lora":
        return LoRAAdapter(A, B, scale=SCALE)
    adapter = OLoRAAdapter(A0, B0, scale=SCALE)
    with torch.no_grad():
        adapter.A.copy_(A)
        adapter.B.copy_(B)
    return adapter


def by_formula(kind: str, x: Tensor, layer: nn.Linear, g: Tensor) -> list[Tensor]:
    """y = W x + bias + s (B A x − B0 A0 x) and its gradients for dL/dy = g, in float64."""
    A, B, A0, B0 = (t.double().requires_grad_() for t in factors())
    x = x.detach().double().requires_grad_()
    weight = SCALE * (B @ A - (B0 @ A0 if kind == "olora" else 0))
    bias = None if layer.bias is None else layer.bias.double()
    y = F.linear(x, layer.weight.double() + weight, bias)
    y.backward(g.double())
    return [y, x.grad, A.grad, B.grad]


@pytest.mark.parametrize("kind", ["lora", "olora"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 5)])
def test_the_layer_and_its_gradients_are_the_formulas(kind: str, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT, bias=bias).requires_grad_(False)
    adapted = AdaptedLinear(layer, adapter_of(kind))
    x = torch.randn(*shape, IN, requires_grad=True)
    g = torch.randn(*shape, OUT)
    y = adapted(x)
    y.backward(g)
    assert y.grad_fn.next_functions[0][0].name() == "LowRankProductBackward"
    mine = [y, x.grad, adapted.adapter.A.grad, adapted.adapter.B.grad]
    for got, expected in zip(mine, by_formula(kind, x, layer, g), strict=True):
        assert torch.allclose(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "olora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_takes_the_long_way_to_the_same_numbers(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).requires_grad_(False).to(dtype)
    adapted = AdaptedLinear(layer, adapter_of(kind))
    x = torch.randn(4, IN).to(dtype)
    fused = adapted(x)
    adapted.adapter.dropout = 1e-12  # drops nothing
    apart = adapted.train()(x)
    assert torch.allclose(fused, apart, rtol=2e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-2)


IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp": lambda y: y.clamp_(-0.5, 0.5),  # clip_qkv in OLMo and DBRX
    "add": lambda y: y.add_(torch.ones_like(y)),  # Llama 4's experts
    "scale a part": lambda y: y[..., : OUT // 2].mul_(3.0),
}


@pytest.mark.parametrize("kind", ["lora", "olora"])
@pytest.mark.parametrize("shape", [(7,), (2, 5), (2, 3, 2)])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_family_may_change_the_output_in_place(kind: str, shape: tuple[int, ...], change: str) -> None:
    """The gradients are those of the same change made to a copy."""
    torch.manual_seed(0)
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    adapted = AdaptedLinear(layer, adapter_of(kind))
    x = torch.randn(*shape, IN, requires_grad=True)
    g = torch.randn(*shape, OUT)
    got = []
    for kept in (True, False):
        y = adapted(x).clone() if kept else adapted(x)
        IN_PLACE[change](y)
        got.append(torch.autograd.grad(y, [x, adapted.adapter.A, adapted.adapter.B], g))
    for expected, mine in zip(*got, strict=True):
        assert torch.equal(mine, expected)


def test_an_expert_without_tokens_has_a_gradient_of_zero() -> None:
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    adapted = AdaptedLinear(layer, adapter_of("olora"))
    y = adapted(torch.zeros(0, IN, requires_grad=True))
    assert y.shape == (0, OUT)
    y.sum().backward()
    assert not adapted.adapter.A.grad.any()
    assert not adapted.adapter.B.grad.any()


def test_no_gradient_is_formed_for_an_input_that_needs_none() -> None:
    layer = nn.Linear(IN, OUT).requires_grad_(False)
    adapted = AdaptedLinear(layer, adapter_of("olora"))
    x = torch.randn(4, IN)
    adapted(x).sum().backward()
    assert x.grad is None
    assert adapted.adapter.A.grad is not None


def test_the_product_alone_is_checked_by_differences() -> None:
    """torch's own numerical gradients, in float64; L and R are made of A and B, as the adapters do."""
    A, B, A0, B0 = factors(torch.float64)
    A.requires_grad_()
    B.requires_grad_()
    x = torch.randn(5, IN, dtype=torch.float64, requires_grad=True)

    def product(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        L = SCALE * torch.cat([B0, B - B0], dim=1)
        R_ = torch.cat([A - A0, A])
        return LowRankProduct.apply(x, A, B, L.detach(), R_.detach(), SCALE)

    assert torch.autograd.gradcheck(product, (x, A, B))
