"""MoRA: the fixed matrices written out in float64, how wide M is, and what a restart keeps and forgets."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_core.bases.sites import target_sites
from olora_core.errors import SpecError
from olora_core.layers.adapter import Site, adapter_tensors, load_adapter_tensors
from olora_core.methods import build_adapters
from olora_core.methods.mora import MoRA, MoRAAdapter, RotationAdapter, square_side
from olora_core.specs import read_spec
from olora_core.specs.methods.mora import MoRASpec
from tests.tiny_base import make_gpt2, make_llama

from ..runs import chat_rows, losses, spec_for, train, write_rows

SHAPES = [(24, 24), (12, 40), (40, 12), (31, 17)]
TYPES = [1, 2, 3, 4]


def site_of(out: int, in_features: int, name: str = "layer") -> Site:
    return Site(name, None, 0, "linear", out, in_features)


def adapter_of(out: int, in_features: int, **options: Any) -> MoRAAdapter:
    method, adapter, _ = running(out, in_features, **options)
    assert not method.restarts
    return randomised(adapter)


def running(
    out: int = 12, in_features: int = 10, *, steps: int = 1, schedule: Any = lambda i, n: 1.0, **options: Any
) -> tuple[MoRA, MoRAAdapter, torch.optim.Optimizer]:
    spec = MoRASpec(**{"rank": 2, "dropout": 0.0} | options)
    method = MoRA(spec, seed=0, total_steps=steps, schedule=schedule)
    adapter = method.adapter(torch.zeros(out, in_features), site_of(out, in_features))
    method.on_attached({"layer": adapter})
    groups = method.param_groups({"layer": adapter})
    return method, adapter, torch.optim.AdamW(groups, lr=0.01, fused=True)


def randomised(adapter: Any) -> Any:
    with torch.no_grad():
        adapter.M.normal_(generator=torch.Generator().manual_seed(4))
    return adapter


def owners(size: int, side: int) -> list[int]:
    """The group of each of `size` neighbours in `side` groups, the larger ones first."""
    quotient, larger = divmod(size, side)
    return [group for group in range(side) for _ in range(quotient + (group < larger))]


def C_of(type: int, side: int, size: int) -> Tensor:
    C = torch.zeros(side, size, dtype=torch.float64)
    if type in (1, 4):
        for q in range(math.ceil(size / side) * side):
            C[q % side, q % size] += 1
    else:
        C[owners(size, side), range(size)] = 1
    return C


def D_of(type: int, side: int, size: int) -> Tensor:
    D = torch.zeros(size, side, dtype=torch.float64)
    D[range(size), [o % side for o in range(size)] if type in (1, 3) else owners(size, side)] = 1
    return D


def dense(type: int, M: Tensor, out: int, in_features: int) -> Tensor:
    side = len(M)
    return D_of(type, side, out) @ M.detach().double() @ C_of(type, side, in_features)


# --- one matrix --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("out", "in_features"), SHAPES)
def test_the_update_is_the_matrix_between_two_fixed_ones(out: int, in_features: int, type: int) -> None:
    adapter = adapter_of(out, in_features, type=type)
    expected = dense(type, adapter.M, out, in_features)
    torch.testing.assert_close(adapter.delta_weight().double(), expected, rtol=1e-6, atol=1e-6)
    pair = adapter.pair()
    assert pair.rank == adapter.pair_rank == adapter.side
    assert torch.equal(pair.A.double(), C_of(type, adapter.side, in_features))
    for shape in [(5, in_features), (2, 3, in_features)]:
        x = torch.randn(shape, dtype=torch.float64)
        got = adapter.delta(x.float()).double()
        torch.testing.assert_close(got, x @ expected.T, rtol=1e-5, atol=1e-5)
        in_bf16 = adapter.delta(x.bfloat16()).double()
        assert (in_bf16 - x @ expected.T).norm() < 0.02 * (x @ expected.T).norm()


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("out", "in_features"), SHAPES)
def test_the_update_has_the_rank_of_the_whole_matrix(out: int, in_features: int, type: int) -> None:
    adapter = adapter_of(out, in_features, type=type)
    assert torch.linalg.matrix_rank(dense(type, adapter.M, out, in_features)) == adapter.side
    assert adapter.side > 2 * 2


@pytest.mark.parametrize("type", TYPES)
@pytest.mark.parametrize(("out", "in_features"), SHAPES)
def test_the_matrixs_gradient_is_the_weights_gradient_folded(out: int, in_features: int, type: int) -> None:
    adapter = adapter_of(out, in_features, type=type)
    x, g = torch.randn(7, in_features), torch.randn(7, out)
    adapter.delta(x).backward(g)
    G = g.double().T @ x.double()
    expected = D_of(type, adapter.side, out).T @ G @ C_of(type, adapter.side, in_features).T
    torch.testing.assert_close(adapter.M.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("out", "in_features", "side"), [(4096, 4096, 256), (1024, 4096, 202), (4096, 14336, 384)]
)
def test_the_matrix_holds_about_as_many_numbers_as_lora_trains(out: int, in_features: int, side: int) -> None:
    assert square_side(8, site_of(out, in_features)) == side
    for rank in (1, 3, 8, 13):
        for size in range(rank, 400, 7):
            found = square_side(rank, site_of(size, in_features))
            assert abs(found**2 - rank * (size + in_features)) <= found + 1


def test_a_layer_that_cannot_hold_its_matrix_gets_one_of_its_own_width_and_the_owner_is_told() -> None:
    method, adapter, _ = running(8, 60, rank=4)
    assert adapter.side == 8  # and not √(4 (8 + 60))
    (note,) = method.notes
    assert "adapter.rank = 4" in note
    assert "1 layers (layer)" in note
    assert running(40, 60, rank=2)[0].notes == []


# --- how wide it is for servers ----------------------------------------------------------------------------


def placed(*shapes: tuple[int, int], steps: int = 100, **options: Any) -> MoRA:
    method = MoRA(MoRASpec(**options), seed=0, total_steps=steps, schedule=lambda i, n: 1.0)
    sites = [site_of(*shape, name=f"layer {i}") for i, shape in enumerate(shapes)]
    method.on_attached({site.name: method.adapter(torch.empty(0), site) for site in sites})
    return method


def test_the_servers_setting_for_a_wide_adapter_is_told() -> None:
    (note,) = placed((4096, 4096), (1024, 4096)).notes
    assert "rank 256" in note
    assert "--max-lora-rank 256" in note
    (note,) = placed((4096, 4096), (4096, 14336)).notes
    assert "rank 384" in note
    assert "--max-lora-rank 512" in note
    assert placed((64, 64), rank=2).notes == []
    assert placed((4096, 4096), export_rank=16).notes == []


@pytest.mark.parametrize(
    ("options", "width", "most"),
    [({"rank": 15}, 526, 14), ({"rank": 8, "restart_every": 10}, 2 * 384, 3)],
)
def test_an_adapter_too_wide_for_servers_is_refused_before_any_training(options, width, most) -> None:
    with pytest.raises(
        SpecError, match=rf"LoRA of rank {width} for layer 'layer 1'.* up to {most}\b"
    ) as caught:
        placed((1024, 4096), (4096, 14336), **options)
    assert caught.value.param == "adapter.rank"
    assert "adapter.export_rank" in caught.value.message
    assert "adapter.export = 'merged'" in caught.value.message
    placed((1024, 4096), (4096, 14336), **options | {"rank": most})
    placed((1024, 4096), (4096, 14336), **options | {"export_rank": 64})


def test_a_layer_too_large_for_any_rank_is_named_with_the_remedy() -> None:
    with pytest.raises(SpecError, match=r"leave it out of adapter\.target_modules"):
        placed((300_000, 4096), rank=1)


# --- ReMoRA ------------------------------------------------------------------------------------------------


def run(method: MoRA, adapter: MoRAAdapter, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Trains it towards a random matrix; what each step left, before and after its hook."""
    goal, seen = torch.randn(12, 10, generator=torch.Generator().manual_seed(3)), []
    for step in range(1, method.total_steps + 1):
        (adapter.delta_weight() - goal).square().sum().backward()
        factor, type = optimizer.param_groups[0]["lr_factor"], adapter.running_type
        optimizer.step()
        before = {"M": adapter.M.detach().clone(), "dense": adapter.delta_weight().detach().clone()}
        method.after_step(step, optimizer)
        after = {"after": adapter.delta_weight().detach().clone(), "entry": adapter.M in optimizer.state}
        seen.append(before | after | {"factor": factor, "type": type})
        optimizer.zero_grad()
    return seen


def test_a_restart_keeps_the_update_and_leaves_the_optimizer_nothing() -> None:
    for step, at in enumerate(run(*running(steps=7, restart_every=3)), 1):
        assert at["entry"] is (step not in (3, 6))
        torch.testing.assert_close(at["after"], at["dense"], rtol=0, atol=1e-6)


def test_the_first_step_after_a_restart_is_as_large_as_the_first_of_all() -> None:
    """Adam's first step is its rate in every entry; a counter that lives on makes it larger."""
    seen = run(*running(steps=7, restart_every=3))
    for i in (0, 3, 6):
        assert seen[i]["M"].abs().max() == pytest.approx(0.01, rel=1e-3)  # from 0


def test_nine_rounds_add_up_in_a_pair_of_twice_the_width() -> None:
    method, adapter, optimizer = running(steps=18, restart_every=2)
    seen = run(method, adapter, optimizer)
    rounds = [seen[i] for i in range(1, 18, 2)]
    assert [at["type"] for at in rounds] == [1, 2, 3, 4, 1, 2, 3, 4, 1]
    expected = sum(dense(at["type"], at["M"], 12, 10) for at in rounds)
    torch.testing.assert_close(adapter.delta_weight().double(), expected, rtol=1e-5, atol=1e-6)
    assert adapter.pair().rank == adapter.pair_rank == 2 * adapter.side
    x = torch.randn(4, 10)
    torch.testing.assert_close(adapter.delta(x).double(), x.double() @ expected.T, rtol=1e-4, atol=1e-5)
    assert {name for name, _ in adapter.named_parameters()} == {"M"}
    assert adapter.kept.shape == (4, adapter.side, adapter.side)


@pytest.mark.parametrize(
    ("options", "types", "width"),
    [
        ({"type": 3}, [3, 4, 1, 2, 3], 2),
        ({"restart_types": [1, 2]}, [1, 2, 1, 2, 1], 2),
        ({"restart_types": [4, 1]}, [1, 4, 1, 4, 1], 1),  # their C is the same
        ({"restart_types": [1]}, [1, 1, 1, 1, 1], 1),
    ],
)
def test_types_follow_each_other_from_the_first_one_on(options, types, width) -> None:
    method, adapter, optimizer = running(steps=10, restart_every=2, **options)
    seen = run(method, adapter, optimizer)
    assert [at["type"] for at in seen[::2]] == types
    assert adapter.pair().rank == adapter.pair_rank == width * adapter.side
    assert len(adapter.kept) == len(set(types))


def test_the_rate_rises_again_after_each_restart_and_not_before() -> None:
    seen = run(*running(steps=10, restart_every=4, ramp_steps=3))
    rising = [1 / 3, 2 / 3, 1]
    assert [at["factor"] for at in seen] == pytest.approx([1, 1, 1, 1, *rising, 1, *rising[:2]])
    assert run(*running(steps=8, restart_every=2))[-1]["factor"] == 1  # within the round


def test_the_first_round_goes_through_the_warm_up() -> None:
    warm_up = {"schedule": lambda i, n: min(1.0, (i - 1) / 4)}
    method, *_ = running(steps=12, restart_every=3, **warm_up)
    assert list(method.restarts) == [4, 7, 10]
    assert "warm-up's 4 steps" in method.notes[0]
    method, *_ = running(steps=12, restart_every=5, **warm_up)
    assert list(method.restarts) == [5, 10]
    assert method.notes == []


def test_a_run_too_short_to_restart_is_plain_mora() -> None:
    method, adapter, _ = running(steps=4, restart_every=4)
    assert not method.restarts
    assert adapter.pair().rank == adapter.side
    assert len(adapter.kept) == 0


def test_what_is_kept_sees_the_input_without_dropout() -> None:
    method, adapter, optimizer = running(steps=8, restart_every=2, dropout=0.5)
    run(method, adapter, optimizer)
    with torch.no_grad():
        adapter.M.zero_()
    adapter.train()
    x = torch.randn(5, 10)
    torch.testing.assert_close(adapter.delta(x), x @ adapter.delta_weight().T, rtol=1e-4, atol=1e-5)


def test_an_earlier_steps_tensors_bring_their_type_back() -> None:
    """As early stopping loads the best step's over the last one's."""
    method, adapter, optimizer = running(steps=4, restart_every=1)
    kept = {}
    for step in (1, 2):
        (adapter.delta_weight() - 1).square().sum().backward()
        optimizer.step()
        kept[step] = {name: t.clone() for name, t in adapter_tensors({"": adapter}).items()}
        kept[step]["dense"] = adapter.delta_weight().detach()
        method.after_step(step, optimizer)
    expected = kept[2].pop("dense")
    assert adapter.running_type == 3
    load_adapter_tensors({"": adapter}, kept[2])
    assert adapter.running_type == 2
    torch.testing.assert_close(adapter.delta_weight(), expected)


@pytest.mark.parametrize("options", [{}, {"type": 2}, {"restart_every": 2, "ramp_steps": 1}])
def test_it_trains_and_exports_a_certified_lora(llama, tmp_path: Path, options: dict[str, Any]) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    spec = spec_for("mora", adapter=options, n_epochs=4, learning_rate=1e-2)
    said = list(train(spec, llama, training, None, tmp_path / "run"))
    assert losses(said)[-1] < losses(said)[0] - 0.3
    assert said[-1].certificate["passed"]


# --- type 6 ------------------------------------------------------------------------------------------------


def rotating(out: int, in_features: int, rank: int = 2) -> RotationAdapter:
    """With random values, as training would leave them."""
    method = MoRA(
        MoRASpec(type=6, rank=rank, export="merged"), seed=0, total_steps=1, schedule=lambda i, n: 1.0
    )
    adapter = method.adapter(torch.zeros(out, in_features), site_of(out, in_features))
    assert isinstance(adapter, RotationAdapter)
    return randomised(adapter.eval())


def rotated(adapter: RotationAdapter, x: Tensor) -> Tensor:
    """The paper's formula for one input, a block and a pair of its numbers at a time."""
    M, out = adapter.M.detach().double(), adapter.out_features
    side, blocks = len(M), math.ceil(len(x) / len(M))
    y: list[float] = []
    for j in range(blocks):
        block = [float(x[(j * side + i) % len(x)]) for i in range(side)]
        turned = [0.0] * side
        for i in range(side // 2):
            angle = j * 10000 ** (-2 * i / side)
            first, second = block[i], block[i + side // 2]
            turned[i] = first * math.cos(angle) - second * math.sin(angle)
            turned[i + side // 2] = second * math.cos(angle) + first * math.sin(angle)
        y += (M @ torch.tensor(turned, dtype=torch.float64)).tolist()
    return torch.tensor([y[o % len(y)] for o in range(out)], dtype=torch.float64)


@pytest.mark.parametrize(("out", "in_features"), [(24, 24), (40, 12), (31, 17), (70, 10)])
def test_type_6_turns_each_block_and_lays_the_products_side_by_side(out: int, in_features: int) -> None:
    adapter = rotating(out, in_features)
    assert adapter.side % 2 == 0
    x = torch.randn(3, in_features, dtype=torch.float64)
    expected = torch.stack([rotated(adapter, row) for row in x])
    torch.testing.assert_close(adapter.delta(x.float()).double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x @ adapter.delta_weight().double().T, expected, rtol=1e-5, atol=1e-5)
    assert adapter.delta(x.float().view(1, 3, -1)).shape == (1, 3, out)
    in_bf16 = adapter.delta(x.bfloat16()).double()
    assert (in_bf16 - expected).norm() < 0.02 * expected.norm()


def test_type_6_has_any_rank_and_no_pair() -> None:
    adapter = rotating(96, 96)
    assert adapter.side == 20
    assert torch.linalg.matrix_rank(adapter.delta_weight().double()) == 96
    assert adapter.pair() is None


def test_type_6_trains_about_as_many_numbers_as_lora() -> None:
    for out, in_features in ((96, 96), (120, 40), (33, 17)):
        adapter = rotating(out, in_features)
        (counted,) = (p.numel() for p in adapter.parameters())
        assert abs(counted - 2 * (out + in_features)) <= 3 * adapter.side + 3
        assert list(adapter_tensors({"": adapter})) == [".M"]


@pytest.mark.parametrize(("out", "in_features", "share"), [(1024, 4096, 0.30), (4096, 14336, 0.29)])
def test_fewer_outputs_than_inputs_would_leave_most_inputs_unread(out, in_features, share) -> None:
    """Why such layers are of type 1."""
    side = square_side(8, site_of(out, in_features)) // 2 * 2
    assert math.ceil(out / side) * side / in_features == pytest.approx(share, abs=0.01)
    small = RotationAdapter(6, site_of(12, 40), dropout=0.0)
    read = randomised(small).delta_weight().any(dim=0)
    assert read.tolist() == [i < 12 for i in range(40)]


def test_narrower_layers_of_a_run_of_type_6_are_of_type_1_and_the_owner_is_told() -> None:
    method, adapter, _ = running(12, 40, type=6, export="merged")
    assert isinstance(adapter, MoRAAdapter)
    assert adapter.running_type == 1
    assert adapter.side == square_side(2, site_of(12, 40))
    (note,) = method.notes
    assert "1 layers (layer) have fewer outputs than inputs" in note
    assert "type 1" in note


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [make_llama, make_gpt2])
def test_type_6_starts_as_the_base_bit_for_bit(make, token_rows: Tensor, dtype: torch.dtype) -> None:
    model = make().to(dtype).requires_grad_(False)
    before = model(token_rows).logits
    method = MoRA(MoRASpec(type=6, export="merged"), seed=0, total_steps=1, schedule=lambda i, n: 1.0)
    adapters = build_adapters(method, model.train(), target_sites(model, "auto"))
    assert {type(adapter) for adapter in adapters.values()} == {MoRAAdapter, RotationAdapter}
    assert torch.equal(model(token_rows).logits, before)


@pytest.mark.parametrize("packing", [False, True])
def test_type_6_trains_and_leaves_a_certified_model(llama, tmp_path: Path, packing: bool) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    adapter = {"type": 6, "export": "merged", "dropout": 0.1}
    spec = spec_for("mora", adapter=adapter, n_epochs=4, learning_rate=1e-2, packing=packing)
    said = list(train(spec, llama, training, None, tmp_path / "run"))
    assert losses(said)[-1] < losses(said)[0] - 0.3
    assert said[-1].certificate["passed"]


def test_type_6_is_merged_or_refused_with_both_remedies() -> None:
    with pytest.raises(SpecError, match=r"adapter\.type = 6") as refused:
        read_spec(model="m", adapter={"method": "mora", "type": 6})
    assert refused.value.param == "adapter.export"
    assert "adapter.export = 'merged', or use another adapter.type" in refused.value.message
    assert read_spec(model="m", adapter={"method": "mora", "type": 6, "export": "merged"}).adapter.type == 6


def test_merged_weights_are_never_too_wide() -> None:
    assert placed((4096, 14336), rank=15, export="merged").notes == []


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"alpha": 16}, "must be left out: the scale of mora is 1"),
        ({"rslora": True}, "must be false, since the scale of mora is 1"),
        ({"type": 5}, "1, 2, 3"),
        ({"restart_types": [2, 3], "restart_every": 10}, r"adapter\.type = 1"),
        ({"restart_types": []}, "must have 1 or more entries"),
        ({"restart_types": [1, 7]}, "1, 2, 3"),
        ({"restart_every": 5, "type": 6, "export": "merged"}, "which has no restarts"),
        ({"restart_every": -1}, "at least 0"),
        ({"ramp_steps": 0}, "at least 1"),
    ],
)
def test_options_that_do_not_fit_are_refused_by_name(options: dict[str, Any], says: str) -> None:
    with pytest.raises(SpecError, match=says) as refused:
        read_spec(model="m", adapter={"method": "mora"} | options)
    assert refused.value.param == f"adapter.{next(iter(options))}"


@pytest.mark.parametrize(
    "sent",
    [
        {"adapter": {"method": "mora", "lora_alpha": 16}},
        {"adapter": {"method": "mora"}, "hyperparameters": {"lora_alpha": 16}},
    ],
)
def test_alpha_is_refused_under_every_name_and_place(sent: dict[str, Any]) -> None:
    with pytest.raises(SpecError, match="must be left out: the scale of mora is 1") as refused:
        read_spec(model="m", **sent)
    assert refused.value.param == f"{list(sent)[-1]}.alpha"


def test_alpha_is_not_shown_as_if_it_did_something() -> None:
    shown = MoRASpec.options()["properties"]
    assert shown["alpha"]["const"] == 1
    assert shown["rslora"]["const"] is False
    assert MoRASpec().scale == 1
