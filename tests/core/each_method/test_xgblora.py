"""XGBLoRA: what a round draws, keeps and leaves alone, and a single round as LoRA."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from olora_core.errors import SpecError
from olora_core.layers.adapter import Site
from olora_core.methods.rounds import RoundsAdapter
from olora_core.methods.xgblora import XGBLoRA
from olora_core.specs import read_spec
from olora_core.specs.methods.xgblora import XGBLoRASpec

from ..runs import chat_rows, losses, spec_for, train, write_rows

NAMES = [f"blocks.{i}.{name}" for i in range(6) for name in ("up", "down")]


def boosting(*, steps: int = 10, **options: Any) -> tuple[XGBLoRA, dict[str, RoundsAdapter]]:
    """Six blocks of two layers, 10 to 8 wide."""
    method = XGBLoRA(XGBLoRASpec(**options), seed=0, total_steps=steps, schedule=lambda i, n: 1.0)
    sites = [Site(name, int(name.split(".")[1]), 6, "linear", 8, 10) for name in NAMES]
    adapters = {site.name: method.adapter(torch.zeros(8, 10), site) for site in sites}
    method.on_attached(adapters)
    return method, adapters


def run(method: XGBLoRA, adapters: dict[str, RoundsAdapter]) -> list[dict[str, Any]]:
    """Trains every layer towards a random matrix; what each step left, before and after its hook."""
    optimizer = torch.optim.AdamW(method.param_groups(adapters), lr=0.05, fused=True)
    draw = torch.Generator().manual_seed(3)
    goals, seen = {name: torch.randn(8, 10, generator=draw) for name in NAMES}, []
    eye = torch.eye(10)

    def dense() -> dict[str, Tensor]:
        return {name: adapter.delta_weight().detach().clone() for name, adapter in adapters.items()}

    for step in range(1, method.total_steps + 1):
        start = dense()
        sum((a.delta(eye).T - goals[name]).square().sum() for name, a in adapters.items()).backward()
        factor = optimizer.param_groups[0]["lr_factor"]
        optimizer.step()
        moved = dense()
        method.after_step(step, optimizer)
        entry = {"start": start, "moved": moved, "after": dense(), "factor": factor}
        seen.append(entry | {"entries": len(optimizer.state)})
        optimizer.zero_grad()
    return seen


def test_a_round_moves_all_layers_of_its_blocks_and_no_other_bit_for_bit() -> None:
    method, adapters = boosting(steps_per_round=4)
    seen = run(method, adapters)
    rounds = []
    for first, last in ((0, 3), (4, 7), (8, 9)):
        start, end = seen[first]["start"], seen[last]["moved"]
        moved = [name for name in NAMES if not torch.equal(start[name], end[name])]
        blocks = {name.split(".")[1] for name in moved}
        assert len(blocks) == 2  # a third of six
        assert len(moved) == 4
        rounds.append(blocks)
    assert len({tuple(sorted(blocks)) for blocks in rounds}) > 1
    for name, adapter in adapters.items():
        drawn = sum(name.split(".")[1] in blocks for blocks in rounds)
        assert adapter.pair().rank == drawn
        assert torch.linalg.matrix_rank(adapter.delta_weight().double(), rtol=1e-6) <= drawn


def test_a_rounds_end_keeps_the_update_and_leaves_the_optimizer_nothing() -> None:
    for step, at in enumerate(run(*boosting(steps_per_round=4)), 1):
        assert (at["entries"] == 0) is (step in (4, 8, 10))
        for name in NAMES:
            torch.testing.assert_close(at["after"][name], at["moved"][name], rtol=0, atol=1e-6)


def test_without_a_boosting_rate_the_base_is_left() -> None:
    method, adapters = boosting(steps_per_round=4, boosting_rate=0.0)
    seen = run(method, adapters)
    assert any(change.any() for change in seen[-1]["moved"].values())
    assert not any(change.any() for change in seen[-1]["after"].values())


def test_later_rounds_raise_the_rate_again() -> None:
    seen = run(*boosting(steps_per_round=4, ramp_steps=2))
    assert [at["factor"] for at in seen] == [1, 1, 1, 1, 0.5, 1, 1, 1, 0.5, 1]


@pytest.mark.parametrize(("steps", "round_steps", "ramp"), [(10, 16, 1), (6400, 100, 10), (6500, 102, 10)])
def test_rounds_are_a_64th_of_the_job(steps: int, round_steps: int, ramp: int) -> None:
    method, _ = boosting(steps=steps)
    assert (method.round_steps, method.ramp_steps) == (round_steps, ramp)


def test_a_round_over_all_blocks_is_lora_bit_for_bit(llama, tmp_path: Path) -> None:
    """Also at the epoch's end, in the middle of the round."""
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    seen: list[Any] = []
    for method in ("lora", "xgblora"):
        spec = spec_for(method, adapter={"rank": 1, "dropout": 0.1})
        seen.append(losses(train(spec, llama, training, None, tmp_path / method)))
        seen.append((tmp_path / method / "adapter" / "adapter_model.safetensors").read_bytes())
    assert seen[:2] == seen[2:]


def test_the_export_is_certified_and_layers_never_drawn_are_zeros(llama, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    spec = spec_for("xgblora", adapter={"layers_per_round": 1})
    finished = list(train(spec, llama, training, None, tmp_path / "run"))[-1]
    assert finished.certificate["passed"] is True
    tensors = load_file(finished.folder / "adapter_model.safetensors")
    touched = {name.split(".layers.")[1][0] for name, tensor in tensors.items() if tensor.any()}
    assert len(touched) == 1
    assert len({name.split(".layers.")[1][0] for name in tensors}) == 2


def test_what_cannot_be_boosted_is_refused_by_name() -> None:
    with pytest.raises(SpecError, match="use at least 4") as caught:
        boosting(steps=1000, steps_per_round=3)
    assert caught.value.param == "adapter.steps_per_round"
    with pytest.raises(SpecError, match="servers load at most 512"):
        boosting(steps=100, steps_per_round=1, rank=8, layers_per_round=6)
    method, adapters = boosting()
    method.layer_of[NAMES[3]] = None
    with pytest.raises(SpecError, match=f"'{NAMES[3]}' is in none") as caught:
        method.on_attached(adapters)
    assert caught.value.param == "adapter.target_modules"
    with pytest.raises(SpecError, match="lora_plus_ratio"):
        read_spec(model="m", adapter={"method": "xgblora", "lora_plus_ratio": 2})


@pytest.mark.parametrize(("steps", "told"), [(999, True), (1000, False)])
def test_a_short_job_is_told_that_it_is_too_short(steps: int, told: bool) -> None:
    method, _ = boosting(steps=steps)
    assert any("this job has 999" in note for note in method.notes) is told
