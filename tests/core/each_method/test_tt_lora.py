"""TT-LoRA: cores multiplied digit by digit in float64, sizes cut into modes, and a start that moves."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_core.errors import SpecError
from olora_core.layers.adapter import Site
from olora_core.methods.tt_lora import TTLoRA, TTLoRAAdapter, factored
from olora_core.specs import TrainSpec, read_spec
from olora_core.specs.methods.tt_lora import TTLoRASpec

from ..runs import chat_rows, losses, spec_for, train, write_rows


def adapter_of(out: int, in_features: int, *, name: str = "layer", **options: Any) -> TTLoRAAdapter:
    method = TTLoRA(TTLoRASpec(**options), seed=0, total_steps=1, schedule=lambda i, n: 1.0)
    return method.adapter(torch.zeros(out, in_features), Site(name, None, 0, "linear", out, in_features))


def randomised(adapter: TTLoRAAdapter) -> TTLoRAAdapter:
    draw = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for core in adapter.parameters():
            core.normal_(generator=draw)
    return adapter


def modes_of(adapter: TTLoRAAdapter) -> tuple[list[int], list[int]]:
    return [core.shape[1] for core in adapter.G], [core.shape[1] for core in adapter.H]


def digit_by_digit(adapter: TTLoRAAdapter, alpha: float) -> Tensor:
    """ΔW by the formula, every entry a product of matrices of its own."""
    ins, outs = modes_of(adapter)
    dense = torch.zeros(math.prod(outs), math.prod(ins), dtype=torch.float64)
    for i_digits, o_digits in product(product(*map(range, ins)), product(*map(range, outs))):
        i, o = 0, 0
        for digit, mode in zip(reversed(i_digits), reversed(ins), strict=True):
            i = i * mode + digit  # the first digit is the fastest
        for digit, mode in zip(o_digits, outs, strict=True):
            o = o * mode + digit  # the last one is
        train_of_cores = torch.ones(1, 1, dtype=torch.float64)
        cores = [*zip(adapter.G, i_digits, strict=True), *zip(adapter.H, o_digits, strict=True)]
        for core, digit in cores:
            train_of_cores = train_of_cores @ core.detach().double()[:, digit]
        dense[o, i] = alpha * train_of_cores.item()
    return dense


@pytest.mark.parametrize(
    ("out", "in_features", "options"),
    [
        (8, 12, {"modes": {8: [2, 4], 12: [3, 2, 2]}}),
        (12, 8, {"modes": {8: [2, 2, 2], 12: [6, 2]}}),
        (12, 12, {"modes": {12: [3, 4]}}),
        (18, 32, {}),
        (7, 5, {"rank": 2}),  # one mode each
        (17, 40, {"rank": 1}),
    ],
)
def test_the_update_is_the_product_of_cores_of_its_digits(out: int, in_features: int, options) -> None:
    adapter = randomised(adapter_of(out, in_features, **{"rank": 3, "alpha": 2.5} | options))
    expected = digit_by_digit(adapter, alpha=2.5)
    torch.testing.assert_close(adapter.delta_weight().double(), expected, rtol=1e-5, atol=1e-4)
    pair = adapter.pair()
    assert pair.rank == adapter.G[-1].shape[2]
    torch.testing.assert_close(pair.B.double() @ pair.A.double(), expected, rtol=1e-5, atol=1e-4)
    assert torch.linalg.matrix_rank(expected) <= pair.rank


def test_a_tensor_train_of_the_same_bond_is_found_again_in_the_update() -> None:
    """The classical decomposition of ΔW, cut at the bond's rank after each digit, loses nothing."""
    adapter = randomised(adapter_of(24, 36, rank=3, modes={24: [2, 3, 4], 36: [3, 4, 3]}))
    dense = adapter.delta_weight().detach().double()
    ins, outs = modes_of(adapter)
    tensor = dense.T.reshape(*reversed(ins), *outs).permute(2, 1, 0, 3, 4, 5)
    sizes, left, rest = [*ins, *outs], [], tensor
    bond = 1
    for size in sizes[:-1]:
        U, S, Vt = torch.linalg.svd(rest.reshape(bond * size, -1), full_matrices=False)
        kept = min(3, len(S))
        left.append(U[:, :kept].reshape(bond, size, kept))
        rest, bond = S[:kept, None] * Vt[:kept], kept
    whole = torch.ones(1, 1, dtype=torch.float64)
    for core in [*left, rest.reshape(bond, sizes[-1], 1)]:
        whole = torch.einsum("na,amb->nmb", whole, core).reshape(-1, core.shape[2])
    torch.testing.assert_close(whole.reshape(tensor.shape), tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "modes"),
    [
        (4096, (16, 16, 16)),
        (14336, (16, 16, 14, 4)),
        (11008, (43, 16, 16)),
        (768, (16, 12, 4)),
        (896, (16, 14, 4)),
        (17, (17,)),
        (34, (17, 2)),
        (13, (13,)),
        (1, (1,)),
    ],
)
def test_sizes_are_cut_into_modes_of_up_to_sixteen(size: int, modes: tuple[int, ...]) -> None:
    assert factored(size) == modes


@pytest.mark.parametrize("size", [*range(1, 200), 257, 5504, 18944, 151936])
def test_modes_multiply_to_their_size(size: int) -> None:
    modes = factored(size)
    assert math.prod(modes) == size
    assert all(mode <= 16 or is_prime(mode) for mode in modes)


def is_prime(number: int) -> bool:
    return all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def test_inputs_go_from_large_to_small_and_outputs_back() -> None:
    assert modes_of(adapter_of(768, 896)) == ([16, 14, 4], [4, 12, 16])
    chosen = {768: [64, 4, 3]}
    assert modes_of(adapter_of(768, 768, modes=chosen)) == ([64, 4, 3], [3, 4, 64])


@pytest.mark.parametrize(
    ("out", "in_features", "options", "numbers"),
    [
        (4096, 4096, {}, 4_352),
        (4096, 14336, {}, 4_480),
        (14336, 4096, {}, 4_480),
        (768, 768, {}, 2_304),
        # RoBERTa-base, 17,664 in 24 of them; q and v of LLaMA-3-8B, 212,480 in 32 of both
        (768, 768, {"rank": 4, "modes": {768: [64, 4, 3]}}, 736),
        (4096, 4096, {"rank": 10, "modes": {4096: [16, 4, 4, 4, 2, 2]}}, 3_520),
        (
            1024,
            4096,
            {"rank": 10, "modes": {4096: [16, 4, 4, 4, 2, 2], 1024: [16, 4, 4, 2, 2]}},
            3_120,
        ),
    ],
)
def test_the_cores_hold_as_many_numbers_as_the_paper_counts(out, in_features, options, numbers) -> None:
    adapter = adapter_of(out, in_features, **options)
    assert sum(core.numel() for core in adapter.parameters()) == numbers


def test_the_start_changes_nothing_and_only_the_last_core_has_a_gradient() -> None:
    adapter = adapter_of(24, 36, rank=4)
    x = torch.randn(5, 36)
    for dtype in (torch.float32, torch.bfloat16):
        assert not adapter.delta(x.to(dtype)).any()
    (adapter.delta(x) - 1).square().sum().backward()
    *others, last = adapter.parameters()
    assert last.grad.abs().min() > 0
    assert not any(core.grad.any() for core in others)


def test_the_inputs_cores_start_with_the_variance_of_loras_a() -> None:
    adapters = [adapter_of(768, 768, name=f"layer {i}") for i in range(40)]
    squares = torch.stack([adapter.pair().A.square().mean() for adapter in adapters])
    assert squares.mean().item() == pytest.approx(1 / (3 * 768), rel=0.15)
    hidden = torch.cat([core.flatten() for adapter in adapters for core in adapter.H[:-1]])
    assert hidden.var().item() == pytest.approx(1 / 8, rel=0.03)


def test_layers_of_one_shape_start_apart() -> None:
    here, there = adapter_of(16, 16, name="here"), adapter_of(16, 16, name="there")
    assert not torch.equal(here.G[0], there.G[0])


def test_the_contraction_keeps_its_precision_under_autocast() -> None:
    adapter = randomised(adapter_of(24, 36, rank=4))
    plain = adapter.pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(adapter.pair().A, plain.A)
        assert torch.equal(adapter.pair().B, plain.B)


def test_it_trains_and_exports_a_certified_lora(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    spec = spec_for("tt_lora", adapter={"alpha": 16}, n_epochs=4, learning_rate=1e-2)
    said = list(train(spec, llama, training, None, tmp_path / "run"))
    assert losses(said)[-1] < losses(said)[0] - 0.3
    assert said[-1].certificate["passed"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"rslora": True}, "scales by alpha itself"),
        ({"modes": {768: [16, 12]}}, "whose product is 768"),
        ({"modes": {12: [-3, -4]}}, "factors above 1"),
        ({"modes": {12: [12, 1]}}, "factors above 1"),
        ({"modes": {12: []}}, "factors above 1"),
        ({"modes": {"wide": [3]}}, "the name 'wide' must be a whole number"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as refused:
        read_spec(model="m", adapter={"method": "tt_lora"} | options)
    assert refused.value.param == f"adapter.{next(iter(options))}"
    assert read_spec(model="m", adapter={"method": "tt_lora", "rslora": False}).adapter.scale == 16


def test_modes_come_back_from_json() -> None:
    asked = read_spec(model="m", adapter={"method": "tt_lora", "modes": {"768": [64, 4, 3]}})
    assert asked.adapter.modes == {768: (64, 4, 3)}
    assert TrainSpec.model_validate_json(asked.model_dump_json()) == asked


def test_modes_of_a_size_that_no_layer_has_are_refused(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    spec = spec_for("tt_lora", adapter={"modes": {33: [11, 3]}})
    with pytest.raises(SpecError, match="has that size; their sizes are 16, 32, 48") as refused:
        list(train(spec, llama, training, None, tmp_path / "run"))
    assert refused.value.param == "adapter.modes"
