"""COLA: where the knots lie, what a knot keeps and forgets, and one link as LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_core.errors import SpecError
from olora_core.layers.adapter import Site
from olora_core.methods.cola import COLA, knots
from olora_core.methods.rounds import RoundsAdapter
from olora_core.specs import read_spec
from olora_core.specs.methods.cola import COLASpec

from ..runs import chat_rows, losses, spec_for, train, write_rows

SITE = Site("layer", None, 0, "linear", 12, 10)


def chain(*, steps: int = 6, **options: Any) -> tuple[COLA, RoundsAdapter, torch.optim.Optimizer]:
    """A chain beside one layer, 10 to 12 wide."""
    spec = COLASpec(**{"rank": 3, "alpha": 6} | options)
    method = COLA(spec, seed=0, total_steps=steps, schedule=lambda i, n: i / n)
    adapter = method.adapter(torch.zeros(12, 10), SITE)
    method.on_attached({"layer": adapter})
    optimizer = torch.optim.AdamW(method.param_groups({"layer": adapter}), lr=0.01, fused=True)
    return method, adapter, optimizer


def run(method: COLA, adapter: RoundsAdapter, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Trains it towards a random matrix; what each step left, before and after its hook."""
    draw = torch.Generator().manual_seed(3)
    goal, seen = torch.randn(12, 10, generator=draw), []
    for step in range(1, method.total_steps + 1):
        (adapter.delta_weight() - goal).square().sum().backward()
        factor = optimizer.param_groups[0]["lr_factor"]
        optimizer.step()
        before = {
            "A": adapter.A.detach().double().clone(),
            "B": adapter.B.detach().double().clone(),
            "dense": adapter.delta_weight().detach().clone(),
        }
        method.after_step(step, optimizer)
        entries = [p in optimizer.state for p in adapter.parameters()]
        after = adapter.delta_weight().detach().clone()
        seen.append(before | {"after": after, "entries": entries, "factor": factor})
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize(
    ("shares", "steps", "ends"),
    [
        ((1, 1, 1), 6, [2, 4, 6]),
        ((1, 1, 1), 10, [3, 7, 10]),
        ((3, 2), 100, [60, 100]),
        ((1000, 1, 1), 5, [3, 4, 5]),
        ((1, 1, 1000), 5, [1, 2, 5]),
        ((1,), 7, [7]),
    ],
)
def test_links_share_the_steps_and_each_has_one(shares, steps, ends) -> None:
    assert knots(shares, steps) == ends


def test_a_knot_keeps_the_update_and_leaves_the_optimizer_nothing() -> None:
    seen = run(*chain())
    for step, at in enumerate(seen, 1):
        is_knot = step in (2, 4)
        assert at["entries"] == ([False, False] if is_knot else [True, True])
        torch.testing.assert_close(at["after"], at["dense"], rtol=0, atol=1e-6)


def test_the_update_is_the_sum_of_the_links() -> None:
    method, adapter, optimizer = chain(link_ranks=[3, 2, 1], links=3)
    seen = run(method, adapter, optimizer)
    links = [seen[i] for i in (1, 3, 5)]
    expected = sum(6 / rank * at["B"] @ at["A"] for rank, at in zip((3, 2, 1), links, strict=True))
    torch.testing.assert_close(adapter.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)
    assert adapter.pair().rank == 6 == method.spec.pair_rank
    assert torch.linalg.matrix_rank(adapter.delta_weight().double(), rtol=1e-6) == 6
    x = torch.randn(4, 10)
    torch.testing.assert_close(adapter.delta(x).double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)


def test_a_narrower_link_leaves_the_other_rows_exactly_zero() -> None:
    seen = run(*chain(link_ranks=[3, 2, 1], links=3))
    for at, rank in zip(seen, (3, 3, 2, 2, 1, 1), strict=True):
        assert at["A"][:rank].all()
        assert not at["A"][rank:].any()
        assert not at["B"][:, rank:].any()


def test_finished_links_do_not_change_and_have_no_gradient() -> None:
    method, adapter, optimizer = chain(steps=9)
    kept: list[Tensor] = []

    class Keeps(COLA):
        def tie(self, link: int, optimizer: torch.optim.Optimizer) -> None:
            super().tie(link, optimizer)
            kept.append(adapter.B_fin[:, : 3 * link].clone())

    method.__class__ = Keeps
    run(method, adapter, optimizer)
    assert len(kept) == 2
    for columns in kept:
        assert columns.any()
        assert torch.equal(adapter.B_fin[:, : columns.shape[1]], columns)
    assert not adapter.B_fin.requires_grad
    assert {name for name, _ in adapter.named_parameters()} == {"A", "B"}


def test_the_first_step_of_a_link_is_as_large_as_the_first_of_all() -> None:
    """Adam's first step is its rate in every entry; a counter that lives on makes it larger."""
    method, adapter, optimizer = chain(steps=6)
    seen = run(method, adapter, optimizer)
    for i in (0, 2, 4):
        moved = seen[i]["B"].abs()  # from 0
        assert moved.max() == pytest.approx(0.01, rel=1e-3)


def test_links_start_as_a_lora_that_is_drawn_anew() -> None:
    method, adapter, optimizer = chain()
    starts = [adapter.A.detach().clone()]
    draws = []
    for step in range(1, 6):
        method.after_step(step, optimizer)
        draws.append(adapter.A.detach().clone())
    starts += [draws[1], draws[3]]
    for A in starts:
        assert A.abs().max() <= 1 / 10**0.5
        assert A.all()
    assert not torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[1], starts[2])
    assert not adapter.B.any()
    again = chain()[0]
    again.finished_steps = 2
    assert torch.equal(again.adapter(torch.zeros(12, 10), SITE).A, starts[1])


def test_the_schedule_starts_anew_with_each_link_or_never() -> None:
    """The schedule here is i / n."""
    assert [at["factor"] for at in run(*chain(steps=7))] == [1 / 2, 1, 1 / 3, 2 / 3, 1, 1 / 2, 1]
    method, adapter, optimizer = chain(lr_restart="never")
    assert {at["factor"] for at in run(method, adapter, optimizer)} == {1.0}
    assert optimizer.param_groups[0]["lr_by"] == "job"


def test_finished_links_see_the_input_without_dropout() -> None:
    method, adapter, optimizer = chain(dropout=0.5)
    run(method, adapter, optimizer)
    adapter.begin(3, torch.Generator().manual_seed(1), init="kaiming", scale=1.0)
    adapter.train()
    x = torch.randn(5, 10)
    expected = x @ adapter.delta_weight().T
    torch.testing.assert_close(adapter.delta(x), expected, rtol=1e-4, atol=1e-5)


def test_normal_draws_have_the_deviation_of_their_rank() -> None:
    method, _, _ = chain(init="gaussian", rank=8)
    wide = method.adapter(torch.zeros(8, 900), Site("wide", None, 0, "linear", 8, 900))
    assert wide.A.std().item() == pytest.approx(1 / 8, rel=0.05)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_one_link_is_lora_bit_for_bit(llama, tmp_path: Path, dropout: float) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    seen: list[Any] = []
    for method, options in (("lora", {}), ("cola", {"links": 1})):
        spec = spec_for(method, adapter={"dropout": dropout, **options})
        seen.append(losses(train(spec, llama, training, None, tmp_path / method)))
        seen.append((tmp_path / method / "adapter" / "adapter_model.safetensors").read_bytes())
    assert seen[:2] == seen[2:]


def test_fewer_steps_than_links_are_pointed_out() -> None:
    method, adapter, optimizer = chain(steps=2)
    assert "2 step" in method.notes[0]
    run(method, adapter, optimizer)
    assert adapter.pair().rank == 6
    assert chain()[0].notes == []


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"link_ranks": [8, 4]}, "link_ranks"),
        ({"link_ranks": [9, 4, 2]}, "link_ranks"),
        ({"link_shares": [1, 0, 1]}, "link_shares"),
        ({"link_shares": [1]}, "link_shares"),
        ({"links": 0}, "links"),
        ({"lr_restart": "always"}, "lr_restart"),
        ({"lora_plus_ratio": 2}, "lora_plus_ratio"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(options: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", adapter={"method": "cola", **options})
    assert caught.value.param == f"adapter.{param}"
