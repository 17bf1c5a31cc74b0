"""LoRA+ against AdamW written out in float64, one learning rate for A and another for B."""

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from olora_core import methods
from olora_core.errors import SpecError
from olora_core.methods.lora import LoRA
from olora_core.methods.olora import OLoRA
from olora_core.specs import read_spec

from ..runs import chat_rows, losses, spec_for, train, write_rows

PEAK, DECAY = 5e-3, 0.1
Record = dict[str, list[torch.Tensor]]


class Watching:
    """What a run's factors were at the start and end of each step, and the gradients it moved them by."""

    records: ClassVar[list[Record]] = []

    def on_attached(self, adapters: Any) -> None:
        self.adapter = next(iter(adapters.values()))

    def after_backward(self, step: int) -> None:
        factors = {"A": self.adapter.A, "B": self.adapter.B}
        taken = {name: [p.detach().clone(), p.grad.clone()] for name, p in factors.items()}
        self.records.append(taken)

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        super().after_step(step, optimizer)
        for name in ("A", "B"):
            self.records[-1][name].append(getattr(self.adapter, name).detach().clone())


class WatchedLoRA(Watching, LoRA):
    pass


class WatchedOLoRA(Watching, OLoRA):
    pass


def adamw(records: list[list[torch.Tensor]], rates: list[float]) -> torch.Tensor:
    """The factor after all steps by Loshchilov and Hutter's algorithm 2, in float64."""
    value = records[0][0].double()
    m = v = torch.zeros_like(value)
    for t, ((_, gradient, _), rate) in enumerate(zip(records, rates, strict=True), 1):
        g = gradient.double()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        value = value - rate * DECAY * value
        value = value - rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
    return value


@pytest.mark.parametrize(("method", "watched"), [("lora", WatchedLoRA), ("olora", WatchedOLoRA)])
@pytest.mark.parametrize("ratio", [1.0, 8.0])
def test_b_moves_at_a_multiple_of_as_rate(llama, tmp_path: Path, monkeypatch, method, watched, ratio) -> None:
    monkeypatch.setitem(methods.METHODS, method, watched)
    monkeypatch.setattr(Watching, "records", [])
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    options = {"schedule": "cosine", "warmup_ratio": 0.0, "learning_rate": PEAK, "weight_decay": DECAY}
    spec = spec_for(method, adapter={"lora_plus_ratio": ratio}, **options)
    list(train(spec, llama, training, None, tmp_path / "run"))
    assert len(Watching.records) == 6
    rates = [PEAK * (1 + math.cos(math.pi * i / 6)) / 2 for i in range(6)]
    for name, factor in (("A", 1.0), ("B", ratio)):
        records = [record[name] for record in Watching.records]
        expected = adamw(records, [factor * rate for rate in rates])
        moved = (expected - records[0][0]).abs().max()
        assert (records[-1][2] - expected).abs().max() < 1e-4 * moved


def test_a_ratio_of_one_is_the_plain_method(llama, tmp_path: Path) -> None:
    training = write_rows(tmp_path / "training.jsonl", chat_rows())
    plain = losses(train(spec_for(), llama, training, None, tmp_path / "plain"))
    spec = spec_for(adapter={"lora_plus_ratio": 1})
    assert losses(train(spec, llama, training, None, tmp_path / "one")) == plain
    spec = spec_for(adapter={"lora_plus_ratio": 4})
    assert losses(train(spec, llama, training, None, tmp_path / "four")) != plain


@pytest.mark.parametrize("ratio", [0, -1, 2000, "much"])
def test_a_ratio_that_makes_no_sense_is_refused(ratio) -> None:
    with pytest.raises(SpecError) as caught:
        read_spec(model="m", adapter={"lora_plus_ratio": ratio})
    assert caught.value.param == "adapter.lora_plus_ratio"
