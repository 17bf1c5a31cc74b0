"""Two processes that train together, and what each of them says. Also a program: one of the two.

`python -m tests.core.pair RANK MEETING_FILE PATIENCE` takes cases as JSON from standard input, one a line,
and answers each with a line.
"""

import hashlib
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from olora_core.bases.loading import Base, load_base
from olora_core.bases.sharding import own_part, shard
from olora_core.devices import SINGLE, Devices, join
from olora_core.errors import OloraError
from olora_core.layers.adapter import Site, adapters_off, attached
from olora_core.methods import METHODS, Outputs
from olora_core.methods.lora import LoRA, LoRAAdapter
from olora_core.progress import Evaluated, Finished, Note, Resolved, Saved, Step
from olora_core.specs import TrainSpec
from olora_core.training import measured_rate
from olora_core.training.train import train
from tests.core.loaded_bases import fresh_base

ROOT = Path(__file__).parents[2]


class Penalised(LoRA):
    """Plain LoRA with an extra loss of each micro-batch, and a statistic over all of them."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.seen = torch.zeros(())
        self.seen_by_step: list[float] = []

    def penalty(self, outputs: Outputs, reference: Any) -> Tensor:
        if not outputs.repeated:
            self.seen = self.seen + outputs.loss.detach()
        return outputs.loss.square()

    def after_backward(self, step: int) -> None:
        self.seen_by_step.append(float(self.devices.sum(self.seen)))
        self.seen = torch.zeros(())


class Idle(LoRA):
    """Plain LoRA with a tensor in each adapter that nothing uses, so that it never has a gradient."""

    def adapter(self, weight: Tensor, site: Site) -> LoRAAdapter:
        adapter = super().adapter(weight, site)
        adapter.idle = nn.Parameter(torch.ones(3))
        return adapter


class Short(LoRA):
    """Plain LoRA; memory runs out once, at this pass of the second step, if it comes to that."""

    fails_at = 2

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.passes = 0

    def penalty(self, outputs: Outputs, reference: Any) -> None:
        self.passes += self.finished_steps == 1
        if self.finished_steps == 1 and self.passes == self.fails_at:
            raise MemoryError


class ShortFollower(Short):
    """The second of two devices, which computes the second pass as its first."""

    fails_at = 1


def _method(case: dict[str, Any], devices: Devices) -> type[LoRA]:
    if case.get("penalised"):
        return Penalised
    if case.get("idle"):
        return Idle
    if case.get("short"):
        return Short if devices.count == 1 else LoRA if devices.is_main else ShortFollower
    return LoRA


def run_case(case: dict[str, Any], devices: Devices = SINGLE) -> dict[str, Any]:
    """Trains one case and returns what there is to compare; with `stop_after` only to a checkpoint there."""
    spec = TrainSpec.model_validate(case["spec"])
    base = fresh_base(Path(case["base"]))
    if case.get("sharding") == "full" and devices.count > 1:
        shard(base, "cpu", devices)
    result: dict[str, Any] = {"steps": [], "margins": [], "evaluated": [], "digests": [], "saved": None}
    made: list[LoRA] = []
    patch = pytest.MonkeyPatch()
    if case.get("measured"):  # on as few rows as there are
        patch.setattr(measured_rate, "FEWEST_RUN_STEPS", 1)
        patch.setattr(measured_rate, "STEPS", 1)
        patch.setattr(measured_rate, "JUDGED_ROWS", 5)
    patch.setitem(METHODS, "lora", lambda *a, **b: made.append(_method(case, devices)(*a, **b)) or made[-1])
    progress = train(
        *(spec, base, Path(case["training"]), Path(case["validation"]), Path(case["folder"])),
        resume=Path(case["resume"]) if case.get("resume") else None,
        cache=Path(case["cache"]) if case.get("cache") else None,
        devices=devices,
    )
    try:
        for update in progress:
            match update:
                case Resolved():
                    result["why"] = update.why
                case Step():
                    result["steps"].append([update.step, update.loss, update.grad_norm, update.valid_loss])
                    result["margins"].append(update.reward_margin)
                    result["digests"].append(_digest(base))
                    result["off"] = _off(base, devices)
                    result["idle"] = [
                        layer.adapter.idle.tolist() for layer in attached(base.model) if case.get("idle")
                    ]
                    if update.step == case.get("stop_after"):
                        if devices.is_main:
                            saved = progress.send("save")
                            assert isinstance(saved, Saved)
                            result["saved"] = str(saved.folder)
                            progress.close()
                            break
                case Note() if "ran out of memory" in update.message:
                    result["short"] = True
                case Evaluated():
                    result["evaluated"].append([update.step, update.loss, update.accuracy])
                case Finished():
                    result["certified"] = update.certificate["passed"]
                    result["trained_tokens"], result["tokens"] = (
                        update.trained_tokens,
                        update.metrics["tokens"],
                    )
                    (tensors,) = update.folder.glob("*model.safetensors")
                    result["exported"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
    except OloraError as error:
        result["error"] = [error.code, error.message]
    finally:
        patch.undo()
    result["statistic"] = made[0].seen_by_step if made and case.get("penalised") else None  # type: ignore
    result["wrote"] = Path(case["folder"]).exists()
    return result


def _digest(base: Base) -> str:
    digest = hashlib.sha256()
    for layer in attached(base.model):
        for tensor in layer.adapter.state_dict().values():
            digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def _off(base: Base, devices: Devices) -> bool:
    """Whether the base holds its files' values, and with its adapters off gives their logits."""
    fresh = _read_again(base.folder)
    originals = dict(fresh.model.named_parameters())
    for name, parameter in base.model.named_parameters():
        if name.replace(".base.", ".") in originals:
            original, mine = own_part(originals[name.replace(".base.", ".")], parameter)
            if not torch.equal(original, mine):
                return False
    ids = torch.arange(3, 19)[None]
    with torch.no_grad(), adapters_off(base.model):
        return torch.equal(base.model(ids).logits, fresh.model(ids).logits)


@cache
def _read_again(folder: Path) -> Base:
    """A base that no run has."""
    return load_base(folder, name="tiny")


class Pair:
    """The two processes, from the outside."""

    def __init__(self, folder: Path, timeout_seconds: float = 60.0) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "GLOO_SOCKET_IFNAME": "lo",
        }
        arguments = [sys.executable, "-W", "error::UserWarning", "-m", "tests.core.pair"]
        logs = [(folder / f"{rank}.log").open("wb") for rank in (0, 1)]
        self.processes = [
            subprocess.Popen(
                [*arguments, str(rank), str(folder / "meeting"), str(timeout_seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
            for rank, log in enumerate(logs)
        ]
        for log in logs:
            log.close()
        self.folder = folder

    def begin(self, case: dict[str, Any]) -> None:
        for rank, process in enumerate(self.processes):
            assert process.stdin is not None
            mine = case | {"folder": f"{case['folder']}-{rank}"}
            process.stdin.write(json.dumps(mine) + "\n")
            process.stdin.flush()

    def answer(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout is not None
        line = stdout.readline()
        assert line, (self.folder / f"{rank}.log").read_text()[-3000:]
        return json.loads(line)  # type: ignore[no-any-return]

    def close(self) -> list[int]:
        """Exit codes of both."""
        for process in self.processes:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.close()
        codes = []
        for process in self.processes:
            try:
                codes.append(process.wait(30))
            except subprocess.TimeoutExpired:
                process.kill()
                codes.append(process.wait())
            process.stdout.close()  # type: ignore[union-attr]
        return codes


def main() -> None:
    rank, rendezvous_file, patience = sys.argv[1:]
    torch.set_num_threads(1)
    with join(
        "cpu", rank=int(rank), count=2, rendezvous_file=Path(rendezvous_file), timeout_seconds=float(patience)
    ) as devices:
        for line in sys.stdin:
            sys.stdout.write(json.dumps(run_case(json.loads(line), devices)) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
