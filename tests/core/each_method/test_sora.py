"""SoRA: the soft threshold in float64, gates that close and are not exported, LoRA where none can move."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from olora_core import methods
from olora_core.bases.sites import target_sites
from olora_core.errors import SpecError
from olora_core.layers.adapter import Site
from olora_core.methods import build_adapters
from olora_core.methods.gated import GatedAdapter
from olora_core.methods.sora import SoRA
from olora_core.specs import read_spec
from olora_core.specs.methods.sora import SoRASpec
from tests.tiny_base import make_llama

from ..runs import Finished, chat_rows, losses, one, spec_for, train, write_rows

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

SITE = Site("layer", None, 0, "linear", 6, 10)


def sora(*, steps: int = 100, weight_decay: float = 0.0, **options: Any) -> SoRA:
    spec = SoRASpec(**{"rank": 5, "alpha": 10} | options)
    return SoRA(
        spec, seed=0, total_steps=steps, schedule=lambda i, n: 1 - (i - 1) / n, weight_decay=weight_decay
    )


def layer_of(method: SoRA) -> tuple[GatedAdapter, torch.optim.Optimizer]:
    """One adapter 6×10 with values in all tensors, and an optimizer that moves nothing by itself."""
    adapter = method.adapter(torch.zeros(6, 10), SITE)
    nn.init.normal_(adapter.B)
    return adapter, torch.optim.SGD(method.param_groups({"layer": adapter}), lr=0.0)


# --- the update and its gates ------------------------------------------------------------------------------


def test_the_change_is_the_papers_formula() -> None:
    adapter, _ = layer_of(sora())
    adapter.g.data[2] = 0
    A, g, B = (p.detach().double() for p in (adapter.A, adapter.g, adapter.B))
    dense = 10 / 5 * B @ g.diag() @ A
    torch.testing.assert_close(adapter.delta_weight().double(), dense, rtol=1e-5, atol=1e-5)
    x = torch.randn(7, 10)
    torch.testing.assert_close(adapter.delta(x).double(), x.double() @ dense.T, rtol=1e-5, atol=1e-5)
    assert adapter.pair().rank == 4


def test_gates_are_drawn_as_a_standard_normal_and_differ_between_layers() -> None:
    method = sora(rank=512)
    wide = [method.adapter(torch.zeros(512, 512), Site(n, None, 0, "linear", 512, 512)) for n in "ab"]
    gates = torch.stack([adapter.g.detach() for adapter in wide])
    assert abs(float(gates.mean())) < 0.1
    assert float(gates.std()) == pytest.approx(1, abs=0.1)
    assert not torch.equal(*gates)
    assert sora(gate_init="ones").adapter(torch.zeros(6, 10), SITE).g.tolist() == [1] * 5


def test_a_closed_gate_takes_the_gradients_of_its_factors_and_keeps_its_own() -> None:
    adapter, _ = layer_of(sora())
    adapter.g.data[[1, 3]] = 0
    adapter.delta(torch.randn(4, 10)).square().sum().backward()
    assert not adapter.A.grad[[1, 3]].any()
    assert not adapter.B.grad[:, [1, 3]].any()
    assert adapter.A.grad[[0, 2, 4]].all()
    assert adapter.g.grad.all()


def test_the_threshold_is_soft() -> None:
    method = sora(threshold=0.5)
    adapter, optimizer = layer_of(method)
    for values in ([0.2, 0.5, 0.7, 1.0, 3.0], [-0.2, -0.5, -0.7, -1.0, -3.0]):
        g = torch.tensor(values, dtype=torch.float64)
        adapter.g.data = g.float()
        method.after_step(1, optimizer)
        expected = g.sign() * (g.abs() - 0.5).clamp(min=0)
        torch.testing.assert_close(adapter.g.data.double(), expected, rtol=0, atol=1e-7)
        assert adapter.g.data[:2].view(torch.int32).tolist() == [0, 0], "exact zeros, without a sign"


def test_without_a_gradient_every_gate_shrinks_by_the_threshold_a_step() -> None:
    method = sora(steps=10)
    adapter, optimizer = layer_of(method)
    adapter.g.data = torch.tensor([0.1, -0.3, 0.5, -0.7, 2.0])
    start = adapter.g.detach().double()
    for step in range(1, 11):
        adapter.delta(torch.zeros(1, 10)).sum().backward()
        optimizer.step()
        method.after_step(step, optimizer)
        optimizer.zero_grad()
        expected = start.sign() * (start.abs() - step * 0.5 / 10).clamp(min=0)
        torch.testing.assert_close(adapter.g.detach().double(), expected, rtol=0, atol=1e-6)


def test_a_threshold_may_go_with_the_gates_rate() -> None:
    method = sora(threshold=0.5, threshold_times_rate=True)
    adapter, optimizer = layer_of(method)
    optimizer.param_groups[1]["lr"] = 0.1
    adapter.g.data = torch.tensor([1.0, -1.0, 0.05, 0.02, 0.5])
    method.after_step(1, optimizer)
    expected = torch.tensor([0.95, -0.95, 0, 0, 0.45])
    torch.testing.assert_close(adapter.g.data, expected, rtol=0, atol=1e-7)


def left_after(threshold: float) -> int:
    """Gates left of a layer of twelve that learns a change of rank 3."""
    method = sora(steps=300, rank=12, alpha=12, threshold=threshold, gate_learning_rate=0.03)
    adapter = method.adapter(torch.zeros(16, 16), Site("layer", None, 0, "linear", 16, 16))
    draw = torch.Generator().manual_seed(3)
    goal = torch.randn(16, 3, generator=draw) @ torch.randn(3, 16, generator=draw) / 4
    optimizer = torch.optim.AdamW(method.param_groups({"layer": adapter}), lr=0.01)
    for step in range(1, 301):
        x = torch.randn(32, 16, generator=draw)
        (adapter.delta(x) - x @ goal.T).square().mean().backward()
        optimizer.step()
        method.after_step(step, optimizer)
        optimizer.zero_grad()
    return adapter.pair().rank


def test_a_larger_threshold_leaves_fewer_gates() -> None:
    left = [left_after(threshold) for threshold in (0.0, 0.01, 0.02)]
    assert left[0] == 12 > left[1] > left[2] >= 1


# --- a run -------------------------------------------------------------------------------------------------


class Watched(SoRA):
    """Tells each step's rates and decays."""

    seen: ClassVar[list[list[tuple[float, float]]]] = []

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        self.seen.append([(group["lr"], group["weight_decay"]) for group in optimizer.param_groups])


@pytest.mark.parametrize(
    ("adapter", "job_decay", "peak", "decay"),
    [
        ({}, 0.0, 2.5 * 0.5 / 6, 0.1),
        ({}, 0.03, 2.5 * 0.5 / 6, 0.03),
        ({"threshold": 0.1}, 0.0, 0.25, 0.1),
        ({"threshold": 0.1, "gate_learning_rate": 0.3}, 0.0, 0.3, 0.1),
        ({"threshold": 0.0, "factor_decay": 0.0}, 0.0, 0.01, 0.0),
        ({"threshold": 0.1, "threshold_times_rate": True}, 0.0, 0.01, 0.1),
    ],
)
def test_gates_have_a_rate_of_their_own_and_never_decay(
    llama, tmp_path, monkeypatch, adapter, job_decay, peak, decay
) -> None:
    monkeypatch.setitem(methods.METHODS, "sora", Watched)
    monkeypatch.setattr(Watched, "seen", [])
    rates = {"learning_rate": 0.01, "warmup_ratio": 0.0, "weight_decay": job_decay}
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    list(train(spec_for("sora", adapter=adapter, **rates), llama, training, None, tmp_path / "run"))
    for i, (factors, gates) in enumerate(Watched.seen):
        left = 1 - i / 6
        assert factors == pytest.approx((0.01 * left, decay))
        assert gates == pytest.approx((peak * left, 0.0))


def test_closed_gates_are_not_exported_and_the_pair_is_certified(llama, tmp_path, token_rows) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    spec = spec_for("sora", adapter={"threshold": 0.25, "gate_learning_rate": 0.3}, n_epochs=3)
    with torch.no_grad():
        bare = llama.model(token_rows).logits
    for said in train(spec, llama, training, None, tmp_path / "run"):
        if isinstance(said, Finished):
            finished, trained = said, llama.model(token_rows).logits
    assert finished.certificate["passed"] is True
    native = load_file(finished.folder / "native" / "adapter.safetensors")
    left = {name.removesuffix(".g"): int((g != 0).sum()) for name, g in native.items() if name.endswith(".g")}
    assert 0 < sum(left.values()) < 4 * len(left)
    tensors = load_file(finished.folder / "adapter_model.safetensors")
    for name, count in left.items():
        B = tensors[f"base_model.model.{name}.lora_B.weight"]
        assert int(B.any(dim=0).sum()) == count, name
    assert B.shape[1] == max(left.values())
    assert not torch.equal(trained, bare)


def test_a_layer_without_a_gate_is_the_base(token_rows: Tensor) -> None:
    model = make_llama().requires_grad_(False)
    before = model(token_rows).logits
    adapters = build_adapters(sora(rank=4), model, target_sites(model, "auto"))
    for adapter in adapters.values():
        nn.init.normal_(adapter.B)
        nn.init.zeros_(adapter.g)
        assert adapter.pair().rank == 0
        assert not adapter.delta_weight().any()
    assert torch.equal(model(token_rows).logits, before)


def test_an_export_without_any_gate_loads_as_the_base(llama, tmp_path, token_rows) -> None:
    from ..export.test_adapter import reloaded

    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    spec = spec_for("sora", adapter={"threshold": 9.0})
    finished = one(Finished, train(spec, llama, training, None, tmp_path / "run"))
    theirs = reloaded(llama, finished.folder)
    bare = AutoModelForCausalLM.from_pretrained(llama.folder)
    assert torch.equal(theirs(token_rows).logits, bare(token_rows).logits)


def test_open_gates_that_cannot_move_give_lora_bit_for_bit(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "t.jsonl", chat_rows())
    job = {"max_grad_norm": 1e9, "weight_decay": 0.1}
    frozen = {"threshold": 0.0, "gate_init": "ones", "gate_learning_rate": 0.0}
    plain = losses(train(spec_for("lora", **job), llama, training, None, tmp_path / "lora"))
    gated = spec_for("sora", adapter=frozen, **job)
    assert losses(train(gated, llama, training, None, tmp_path / "sora")) == plain


# --- what is refused ---------------------------------------------------------------------------------------


def test_a_threshold_that_no_gate_can_withstand_is_pointed_out() -> None:
    assert sora().notes == []
    assert sora(threshold=0.0).notes == []
    for hopeless in (
        {"threshold": 1e-3, "gate_learning_rate": 2e-4},
        {"threshold": 1.0, "threshold_times_rate": True},
    ):
        (note,) = sora(**hopeless).notes
        assert "all will be 0" in note


def test_two_decays_of_the_factors_are_refused() -> None:
    with pytest.raises(SpecError, match="leave one of them out") as caught:
        sora(weight_decay=0.1, factor_decay=0.2)
    assert caught.value.param == "adapter.factor_decay"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("threshold", -1),
        ("threshold", "much"),
        ("threshold_times_rate", True),
        ("gate_learning_rate", -0.1),
        ("gate_init", "zeros"),
        ("factor_decay", 2),
    ],
)
def test_values_that_make_no_sense_are_refused(option: str, value: object) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", adapter={"method": "sora", option: value})
    assert caught.value.param == f"adapter.{option}"
