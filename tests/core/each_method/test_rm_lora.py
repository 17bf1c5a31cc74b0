"""RM-LoRA: its penalty in float64, masks that let p of r directions move, and LoRA where both are off."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_core.errors import SpecError
from olora_core.layers.adapter import Site
from olora_core.methods import Outputs
from olora_core.methods.lora import LoRAAdapter
from olora_core.methods.rm_lora import RMLoRA
from olora_core.specs import read_spec
from olora_core.specs.methods.rm_lora import RMLoRASpec

from ..runs import chat_rows, losses, spec_for, train, write_rows

SHAPES = {"small": (6, 10), "tall": (20, 9)}
OUTPUTS = Outputs(logits=None, labels=torch.zeros(1, 1), loss=torch.zeros(()))


def rm_lora(*, shapes: dict[str, tuple[int, int]] = SHAPES, **options: Any) -> RMLoRA:
    """A method whose adapters are attached."""
    spec = RMLoRASpec(**{"rank": 5, "alpha": 10} | options)
    method = RMLoRA(spec, seed=4, total_steps=50, schedule=lambda i, n: 1.0)
    adapters = {
        name: method.adapter(torch.zeros(shape), Site(name, None, 0, "linear", *shape))
        for name, shape in shapes.items()
    }
    method.on_attached(adapters)
    return method


def penalty_of(method: RMLoRA) -> Tensor:
    penalty = method.penalty(OUTPUTS, lambda: torch.zeros(()))
    assert penalty is not None
    return penalty


def randomise(adapters: Any) -> None:
    for adapter in adapters:
        for factor in (adapter.A, adapter.B):
            nn.init.normal_(factor, std=0.3)


# --- the penalty -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("norm", "power"), [("plain", 1), ("squared", 2)])
def test_the_penalty_and_its_gradient_are_those_of_float64(norm: str, power: int) -> None:
    method = rm_lora(orthogonality=0.3, orthogonality_norm=norm)
    randomise(method.adapters.values())
    factors = [p.detach().double().requires_grad_() for a in method.adapters.values() for p in (a.A, a.B)]
    products = [p @ p.T if i % 2 == 0 else p.T @ p for i, p in enumerate(factors)]
    exact = 0.3 * sum(torch.linalg.norm(G - torch.eye(5).double()) ** power for G in products) / 4
    exact.backward()
    mine = penalty_of(method)
    mine.backward()
    assert mine.item() == pytest.approx(exact.item(), rel=1e-6)
    trained = [p for a in method.adapters.values() for p in (a.A, a.B)]
    for got, expected in zip(trained, factors, strict=True):
        torch.testing.assert_close(got.grad.double(), expected.grad, rtol=1e-5, atol=1e-6)


def test_it_is_0_for_orthonormal_factors_and_has_a_gradient_there() -> None:
    method = rm_lora(orthogonality=1.0)
    for adapter in method.adapters.values():
        nn.init.orthogonal_(adapter.A)
        nn.init.orthogonal_(adapter.B)
    penalty = penalty_of(method)
    assert penalty.item() < 1e-5
    penalty.backward()
    assert all(a.A.grad.isfinite().all() and a.B.grad.isfinite().all() for a in method.adapters.values())


def test_it_is_the_root_of_the_rank_for_factors_of_0_and_does_not_move_them() -> None:
    method = rm_lora(orthogonality=1.0)
    for adapter in method.adapters.values():
        nn.init.zeros_(adapter.A)
    penalty = penalty_of(method)
    assert penalty.item() == pytest.approx(math.sqrt(5))
    penalty.backward()
    assert not any(a.B.grad.any() for a in method.adapters.values())


def test_it_is_a_mean_that_more_layers_do_not_change() -> None:
    method, twice = (
        rm_lora(),
        rm_lora(shapes=SHAPES | {f"{name} too": shape for name, shape in SHAPES.items()}),
    )
    randomise(method.adapters.values())
    for name, adapter in twice.adapters.items():
        adapter.load_state_dict(method.adapters[name.removesuffix(" too")].state_dict())
    assert penalty_of(twice).item() == pytest.approx(penalty_of(method).item())


# --- the mask ----------------------------------------------------------------------------------------------


def moved(method: RMLoRA, step: int) -> list[tuple[set[int], set[int]]]:
    """Rows of A and columns of B, layer by layer, that plain gradient descent moves at this step."""
    trained = [p for a in method.adapters.values() for p in (a.A, a.B)]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    before = [p.detach().clone() for p in trained]
    method.after_backward(step)
    optimizer.step()
    method.after_step(step, optimizer)
    changed = [
        set(torch.nonzero((p != b).all(dim=1 - i % 2)).flatten().tolist())
        for i, (p, b) in enumerate(zip(trained, before, strict=True))
    ]
    untouched = [
        (p == b).all(dim=1 - i % 2).sum() for i, (p, b) in enumerate(zip(trained, before, strict=True))
    ]
    assert all(len(c) + int(u) == 5 for c, u in zip(changed, untouched, strict=True)), "whole ones only"
    return list(zip(changed[::2], changed[1::2], strict=True))


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_from_the_second_step_on_p_of_r_directions_move(variant: str) -> None:
    method = rm_lora(variant=variant, moved_rank=2)
    assert moved(method, 1) == [({0, 1, 2, 3, 4},) * 2] * 2
    seen = [moved(method, step) for step in range(2, 30)]
    assert all(len(rows) == len(columns) == 2 for layers in seen for rows, columns in layers)
    together = [rows == columns for layers in seen for rows, columns in layers]
    assert all(together) if variant == "v1" else not all(together)
    assert any(layers[0] != layers[1] for layers in seen), "layers are drawn for themselves"
    assert seen[0] != seen[1]


def test_every_direction_moves_as_often_as_any_other() -> None:
    method = rm_lora(moved_rank=2)
    counts = sum(method.mask(step, "small") for step in range(2, 2002))
    assert (counts / 2000 - 2 / 5).abs().max() < 0.04


def test_masks_depend_on_seed_step_and_layer_alone() -> None:
    torch.manual_seed(1)
    first = rm_lora().mask(7, "small")
    state = torch.get_rng_state()
    again = rm_lora()
    again.finished_steps = 3
    assert torch.equal(again.mask(7, "small"), first)
    assert torch.equal(torch.get_rng_state(), state)


def test_half_the_rank_moves_unless_told_otherwise() -> None:
    assert [RMLoRASpec(rank=rank).moved for rank in (1, 4, 5, 8)] == [1, 2, 3, 4]
    assert RMLoRASpec(moved_rank=7).moved == 7


# --- a run -------------------------------------------------------------------------------------------------


def test_without_mask_and_penalty_it_is_lora_bit_for_bit(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    shared = {"dropout": 0.2, "lora_plus_ratio": 4}
    plain = losses(train(spec_for("lora", adapter=shared), llama, training, None, tmp_path / "lora"))
    off = spec_for("rm_lora", adapter=shared | {"moved_rank": 4, "orthogonality": 0})
    assert losses(train(off, llama, training, None, tmp_path / "off")) == plain
    for i, on in enumerate(({"moved_rank": 2, "orthogonality": 0}, {"moved_rank": 4})):
        spec = spec_for("rm_lora", adapter=shared | on)
        assert losses(train(spec, llama, training, None, tmp_path / f"{i}")) != plain


def test_the_penalty_counts_once_a_step_however_the_batch_is_cut(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    seen = []
    for size in (4, 1):
        spec = spec_for("rm_lora", micro_batch_size=size, adapter={"orthogonality": 5})
        seen.append(losses(train(spec, llama, training, None, tmp_path / f"{size}")))
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


def test_a_gaussian_start_is_the_references() -> None:
    shape = {"wide": (8, 4000)}
    (adapter,) = rm_lora(shapes=shape, init="gaussian").adapters.values()
    assert isinstance(adapter, LoRAAdapter)
    assert float(adapter.A.detach().std()) == pytest.approx(0.02, rel=0.05)
    assert not adapter.B.any()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("moved_rank", value) for value in (0, 9, "most")),
        *(("orthogonality", -1), ("variant", "v3"), ("init", "zeros"), ("orthogonality_norm", "sum")),
    ],
)
def test_values_that_make_no_sense_are_refused(option: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", adapter={"method": "rm_lora", option: value})
    assert caught.value.param == f"adapter.{option}"
