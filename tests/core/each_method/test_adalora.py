"""AdaLoRA: step by step what PEFT does, its formulas in float64, a budget kept to the last component."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from olora_core.bases.sites import target_sites
from olora_core.errors import SpecError
from olora_core.layers.adapter import Site, adapter_tensors
from olora_core.methods import Outputs, build_adapters
from olora_core.methods.adalora import AdaLoRA, AdaLoRAAdapter
from olora_core.specs import read_spec
from olora_core.specs.methods.adalora import AdaLoRASpec
from tests.tiny_base import make_llama

from ..export.test_adapter import reloaded
from ..runs import Finished, Step, chat_rows, spec_for, train, write_rows

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SHAPES = {"small": (6, 10), "tall": (20, 9), "wide": (5, 30)}
OUTPUTS = Outputs(logits=None, labels=torch.zeros(1, 1), loss=torch.zeros(()))
FAST = {"initial_steps": 2, "final_steps": 6, "mask_interval": 2}
"""Of a run of 20 steps: it freezes after step 14."""


def adalora(*, steps: int = 20, shapes: dict[str, tuple[int, int]] = SHAPES, **options: Any) -> AdaLoRA:
    """A method whose adapters are attached, with random values in all tensors."""
    method = AdaLoRA(
        AdaLoRASpec(**{"rank": 4, "alpha": 8} | options), seed=0, total_steps=steps, schedule=lambda i, n: 1.0
    )
    adapters = {
        name: method.adapter(torch.zeros(shape), Site(name, None, 0, "linear", *shape))
        for name, shape in shapes.items()
    }
    method.on_attached(adapters)
    draw = torch.Generator().manual_seed(8)
    for adapter in adapters.values():
        for parameter in adapter.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw)
    return method


def optimizer_of(method: AdaLoRA, rate: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(method.group(p for a in method.adapters for p in a.parameters())["params"], rate)


def step_with(
    method: AdaLoRA, optimizer: torch.optim.Optimizer, step: int, draw: torch.Generator | None = None
) -> None:
    """One step by random gradients."""
    for adapter in method.adapters:
        for parameter in adapter.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=draw)
    optimizer.step()
    method.after_step(step, optimizer)


# --- PEFT --------------------------------------------------------------------------------------------------


def test_it_trains_and_prunes_as_pefts_step_by_step(token_rows: Tensor) -> None:
    steps, targets = 60, ["q_proj", "o_proj", "down_proj"]
    schedule = {"tinit": 6, "tfinal": 20, "deltaT": 3, "beta1": 0.8, "beta2": 0.9, "orth_reg_weight": 0.3}
    config = AdaLoraConfig(
        task_type="CAUSAL_LM",  # else PEFT leaves its penalty out
        init_r=5,
        target_r=2,
        lora_alpha=40,
        total_step=steps,
        target_modules=targets,
        **schedule,
    )
    theirs = get_peft_model(make_llama(), config)
    spec = AdaLoRASpec(
        rank=5, target_rank=2, alpha=40, initial_steps=6, final_steps=20, mask_interval=3,
        beta1=0.8, beta2=0.9, orthogonality=0.3,
    )  # fmt: skip
    mine = make_llama().requires_grad_(False)
    method = AdaLoRA(spec, seed=1, total_steps=steps, schedule=lambda i, n: 1.0)
    adapters = build_adapters(method, mine, target_sites(mine, targets))
    layers = {name: theirs.base_model.model.get_submodule(name) for name in adapters}
    assert len(layers) == 6
    with torch.no_grad():
        for name, adapter in adapters.items():
            layers[name].lora_A["default"].copy_(adapter.A)
            layers[name].lora_B["default"].copy_(adapter.B)
            assert not layers[name].lora_E["default"].any()
    their_optimizer = torch.optim.AdamW(
        [p for p in theirs.parameters() if p.requires_grad], lr=0.02, weight_decay=0.0
    )
    my_optimizer = torch.optim.AdamW(method.param_groups(adapters), lr=0.02)
    seen = []
    for step in range(1, steps + 1):
        expected = theirs(input_ids=token_rows, labels=token_rows).loss
        expected.backward()
        their_optimizer.step()
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()

        loss = mine(token_rows, labels=token_rows).loss
        penalty = method.penalty(OUTPUTS, lambda: torch.zeros(()))
        assert penalty is not None
        (loss + penalty).backward()
        my_optimizer.step()
        method.after_step(step, my_optimizer)
        my_optimizer.zero_grad()
        assert (loss + penalty).item() == pytest.approx(expected.item(), rel=1e-5), step
        live = {name: (adapter.g != 0).tolist() for name, adapter in adapters.items()}
        their_live = {
            name: (layer.lora_E["default"] != 0).flatten().tolist() for name, layer in layers.items()
        }
        assert live == their_live, step
        seen.append(sum(map(sum, live.values())))
    assert seen[5] == 30
    assert 12 < seen[20] < 30
    assert seen[-20:] == [12] * 20
    assert len({sum(kept) for kept in live.values()}) > 1, "layers of different ranks"
    for name, adapter in adapters.items():
        change = layers[name].get_delta_weight("default")
        torch.testing.assert_close(adapter.delta_weight(), change, rtol=1e-3, atol=1e-4)


# --- budget and masks --------------------------------------------------------------------------------------


def test_the_budget_falls_along_a_cubic_from_all_components_to_the_target() -> None:
    method = adalora(steps=100, rank=4, target_rank=1, initial_steps=10, final_steps=40)
    budgets = [method.budget(step) for step in range(1, 101)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[:10] == [12] * 10
    assert budgets[59:] == [3] * 41
    for step in range(11, 61):
        assert budgets[step - 1] == int(3 + 9 * (1 - (step - 10) / 50) ** 3)


def test_the_automatic_schedule_is_a_tenth_and_four_tenths_of_the_run() -> None:
    for steps, initial, frozen_at, interval in (
        *((3, 0, 2, 1), (10, 1, 6, 1), (250, 25, 150, 2)),
        *((1000, 100, 600, 10), (9999, 999, 6000, 10)),
    ):
        method = adalora(steps=steps)
        assert (method.initial_steps, method.frozen_at, method.mask_interval) == (
            initial,
            frozen_at,
            interval,
        )
    assert [AdaLoRASpec(rank=rank).target for rank in (1, 2, 3, 12)] == [1, 1, 2, 8]


def test_masks_come_when_they_are_due_and_the_last_one_stays() -> None:
    method = adalora(target_rank=2, **FAST)
    optimizer, draw, alive = optimizer_of(method), torch.Generator().manual_seed(2), []
    for step in range(1, 21):
        step_with(method, optimizer, step, draw)
        alive.append(torch.stack([a.g.detach() for a in method.adapters]) != 0)
    counts = [int(live.sum()) for live in alive]
    # Steps 4, 6 … 12 mask, step 14 freezes; what was masked moves again in between.
    assert counts == [
        12 if step < 4 or (step < 14 and step % 2) else 6 if step >= 14 else method.budget(step)
        for step in range(1, 21)
    ]
    assert all(torch.equal(live, alive[13]) for live in alive[13:])
    assert torch.equal(torch.stack([a.pattern for a in method.adapters]) != 0, alive[13])


def test_masking_zeroes_gates_and_touches_nothing_else() -> None:
    method = adalora(target_rank=1, steps=20, **FAST)
    optimizer = optimizer_of(method, rate=0.0)
    before = [(a.A.detach().clone(), a.g.detach().clone(), a.B.detach().clone()) for a in method.adapters]
    for step in range(1, 5):
        step_with(method, optimizer, step)
    moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
    masked = 0
    for adapter, (A, g, B) in zip(method.adapters, before, strict=True):
        assert torch.equal(adapter.A, A)
        assert torch.equal(adapter.B, B)
        changed = adapter.g != g
        masked += int(changed.sum())
        assert not adapter.g.detach()[changed].view(torch.int32).any(), "exact zeros, without a sign"
    assert masked == 12 - method.budget(4)
    assert all(m.any() for m in moments), "AdamW's moments are left"


def test_importance_and_uncertainty_are_the_papers_averages() -> None:
    method = adalora(beta1=0.7, beta2=0.9, steps=50)
    optimizer, draw = optimizer_of(method), torch.Generator().manual_seed(5)
    adapter = method.adapters[1]
    exact = {name: [torch.zeros(1), torch.zeros(1)] for name in "AgB"}
    for step in range(1, 5):
        step_with(method, optimizer, step, draw)
        for name, averages in exact.items():
            w = getattr(adapter, name)
            importance = (w * w.grad).double().abs().detach()
            averages[0] = 0.7 * averages[0] + 0.3 * importance
            averages[1] = 0.9 * averages[1] + 0.1 * (importance - averages[0]).abs()
    for name, (mean, spread) in exact.items():
        assert torch.allclose(getattr(adapter, f"{name}_importance").double(), mean, rtol=1e-5)
        assert torch.allclose(getattr(adapter, f"{name}_uncertainty").double(), spread, rtol=1e-4, atol=1e-7)
    scores = {name: mean * spread for name, (mean, spread) in exact.items()}
    worth = scores["g"] + scores["B"].mean(dim=0) + scores["A"].mean(dim=1)
    assert torch.allclose(adapter.worth().double(), worth, rtol=1e-4, atol=1e-9)


def test_a_constant_importance_is_certain() -> None:
    method = adalora(steps=400, initial_steps=200)
    optimizer = optimizer_of(method, rate=0.0)
    for step in range(1, 200):
        for adapter in method.adapters:
            for parameter in adapter.parameters():
                parameter.grad = 3 / parameter.detach()
        method.after_step(step, optimizer)
    for adapter in method.adapters:
        for mean, spread in zip(adapter.smoothed("importance"), adapter.smoothed("uncertainty"), strict=True):
            torch.testing.assert_close(mean, torch.full_like(mean, 3))
            assert spread.abs().max() < 1e-4


def test_nothing_is_measured_once_the_choice_is_made() -> None:
    method = adalora(**FAST)
    optimizer = optimizer_of(method)
    for step in range(1, 14):
        step_with(method, optimizer, step)
    assert all(a.worth().all() for a in method.adapters)
    for step in range(14, 17):
        step_with(method, optimizer, step)
        assert not any(a.worth().any() for a in method.adapters)


def test_a_large_layer_is_not_worth_more_for_its_size() -> None:
    method = adalora(shapes={"small": (8, 8), "large": (64, 256)})
    for adapter in method.adapters:
        for tensor in (*adapter.smoothed("importance"), *adapter.smoothed("uncertainty")):
            tensor.fill_(0.5)
    small, large = method.adapters
    torch.testing.assert_close(small.worth(), torch.full((4,), 0.75))
    torch.testing.assert_close(large.worth(), small.worth())


def test_equals_are_kept_up_to_the_budget_in_the_layers_order() -> None:
    """A threshold, as PEFT takes it, would cut all of them."""
    method = adalora()
    kept = torch.stack(method._best(6))
    assert kept.flatten().tolist() == [1] * 6 + [0] * 6


def test_a_target_of_the_whole_rank_masks_nothing(llama, tmp_path: Path) -> None:
    method = adalora(target_rank=4, **FAST)
    optimizer = optimizer_of(method)
    for step in range(1, 21):
        step_with(method, optimizer, step)
        assert all(a.g.all() for a in method.adapters)


@pytest.mark.parametrize("norm", ["plain", "squared_sum"])
def test_the_penalty_is_that_of_float64(norm: str) -> None:
    method = adalora(orthogonality=0.5, orthogonality_norm=norm)
    eye, exact = torch.eye(4).double(), 0.0
    for adapter in method.adapters:
        for G in (adapter.A.double() @ adapter.A.double().T, adapter.B.double().T @ adapter.B.double()):
            distance = torch.linalg.norm(G.detach() - eye)
            exact += float(distance**2 if norm == "squared_sum" else distance / 6)
    penalty = method.penalty(OUTPUTS, lambda: torch.zeros(()))
    assert penalty is not None
    assert penalty.item() == pytest.approx(0.5 * exact, rel=1e-6)
    assert adalora(orthogonality=0).penalty(OUTPUTS, lambda: torch.zeros(())) is None


def test_factors_are_drawn_small_and_the_scale_is_the_references() -> None:
    method = AdaLoRA(AdaLoRASpec(), seed=0, total_steps=9, schedule=lambda i, n: 1.0)
    adapter = method.adapter(torch.zeros(600, 900), Site("layer", None, 0, "linear", 600, 900))
    assert isinstance(adapter, AdaLoRAAdapter)
    assert not adapter.g.any()
    for factor in (adapter.A, adapter.B):
        assert float(factor.detach().std()) == pytest.approx(0.02, rel=0.05)
    nn.init.ones_(adapter.g)
    exact = 16 / (12 + 1e-5) * adapter.B.double() @ adapter.A.double()
    torch.testing.assert_close(adapter.delta_weight().double(), exact.detach(), rtol=1e-4, atol=1e-6)


# --- a run -------------------------------------------------------------------------------------------------


def test_a_run_exports_what_the_budget_kept_and_layers_without_a_component_as_zeros(
    llama, tmp_path: Path, token_rows: Tensor
) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    spec = spec_for("adalora", n_epochs=4, learning_rate=0.05, adapter={"target_rank": 1})
    for said in train(spec, llama, training, None, tmp_path / "run"):
        if isinstance(said, Finished):
            finished, trained = said, llama.model(token_rows).logits
    assert finished.certificate["passed"] is True
    native = load_file(finished.folder / "native" / "adapter.safetensors")
    left = {name.removesuffix(".g"): int((g != 0).sum()) for name, g in native.items() if name.endswith(".g")}
    assert sum(left.values()) == len(left) == 14
    assert min(left.values()) == 0
    tensors = load_file(finished.folder / "adapter_model.safetensors")
    for name, count in left.items():
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert B.shape[1] == max(left.values())
        assert int(B.any(dim=0).sum()) == count
    theirs = reloaded(llama, finished.folder)
    torch.testing.assert_close(theirs(token_rows).logits, trained, rtol=0, atol=1e-5)


def test_the_state_keeps_its_shapes_for_the_whole_run(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    shapes = set()
    for said in train(spec_for("adalora"), llama, training, None, tmp_path / "run"):
        if isinstance(said, Step):
            tensors = adapter_tensors({"": llama.model.model.layers[0].self_attn.q_proj.adapter})
            shapes.add(str({name: tensor.shape for name, tensor in tensors.items()}))
    assert len(shapes) == 1


# --- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "options", "option"),
    [
        (2, {}, "final_steps"),
        (20, {"final_steps": 20}, "final_steps"),
        (20, {"initial_steps": 14, "final_steps": 6}, "final_steps"),
        (20, {"final_steps": 19}, "final_steps"),
        (20, {"initial_steps": 2, "final_steps": 6, "mask_interval": 13}, "mask_interval"),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(steps: int, options: Any, option: str) -> None:
    with pytest.raises(SpecError) as caught:
        adalora(steps=steps, **options)
    assert caught.value.param == f"adapter.{option}"


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("target_rank", 13, "at most adapter.rank = 12"),
        ("rslora", True, "raise alpha"),
        ("final_steps", 0, "at least 1"),
        ("initial_steps", -1, "at least 0"),
        ("mask_interval", 0, "at least 1"),
        ("beta1", 1, "less than 1"),
        ("beta2", 0, "greater than 0"),
        ("orthogonality", -1, "at least 0"),
        ("orthogonality_norm", "sum", "'squared_sum'"),
        ("lora_plus_ratio", 2, "unknown"),
    ],
)
def test_values_that_make_no_sense_are_refused(option: str, value: object, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        read_spec(model="m", adapter={"method": "adalora", option: value})
    assert caught.value.param == f"adapter.{option}"
