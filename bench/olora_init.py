"""Initialisation of OLoRA: PEFT's own against ours, on one linear layer after another.

    python bench/olora_init.py
    python bench/olora_init.py --shapes 768x768 --ranks 8 32 --repeats 3

PEFT's time is its `olora_init` on an existing LoRA layer; ours includes building the adapter. The runs
alternate, one of PEFT's on a fresh copy of the weight and five of ours; the table shows medians.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import torch
from peft import LoraConfig
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from olora_core.layers.adapter import Site
from olora_core.methods.olora import OLoRA, OLoRAAdapter
from olora_core.specs.methods.olora import OLoRASpec

SHAPES = ("768x768", "4096x4096", "11008x4096", "4096x11008")
RANKS = (8, 32, 64)
OURS_PER_PEFT = 5
"""Ours is short, so that other load on the machine disturbs a single run more."""
LARGE = 2**20
"""Weights with more entries get a third of the repeats."""


@dataclass(frozen=True)
class Row:
    shape: tuple[int, int]
    rank: int
    repeats: int
    peft_seconds: float
    our_seconds: float
    factor_difference: float
    product_difference: float

    @property
    def ratio(self) -> float:
        return self.peft_seconds / self.our_seconds


def measure(
    shape: tuple[int, int],
    rank: int,
    repeats: int,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Row:
    """Times both in turn on one Gaussian weight (out×in) and compares their factors."""
    random = torch.Generator(device).manual_seed(0)
    weight = (torch.randn(shape, generator=random, device=device) / shape[1] ** 0.5).to(dtype)
    theirs, ours = peft_init(weight.clone(), rank), our_init(weight, rank)
    theirs(), ours()  # the first call allocates memory and starts threads
    times: dict[str, list[float]] = {"peft": [], "ours": []}
    for _ in range(repeats):
        theirs = peft_init(weight.clone(), rank)
        seconds, (A, B) = timed(theirs, device)
        times["peft"].append(seconds)
        for _ in range(OURS_PER_PEFT):
            seconds, adapter = timed(ours, device)
            times["ours"].append(seconds)
    return Row(
        shape=shape,
        rank=rank,
        repeats=repeats,
        peft_seconds=statistics.median(times["peft"]),
        our_seconds=statistics.median(times["ours"]),
        factor_difference=max(float((adapter.A0 - A).abs().max()), float((adapter.B0 - B).abs().max())),
        product_difference=float((adapter.B0 @ adapter.A0 - B @ A).abs().max()),
    )


def peft_init(weight: Tensor, rank: int) -> Callable[[], tuple[Tensor, Tensor]]:
    """PEFT's initialisation, which modifies `weight` (out×in); the call returns A (r×in) and B (out×r)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights=False)
    wrapped = PeftLinear(layer, "default", config=config, r=rank, lora_alpha=rank)

    def run() -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            wrapped.olora_init("default")
        return wrapped.lora_A["default"].weight.detach(), wrapped.lora_B["default"].weight.detach()

    return run


def our_init(weight: Tensor, rank: int) -> Callable[[], OLoRAAdapter]:
    out_features, in_features = weight.shape
    site = Site("layer", None, 0, "linear", out_features, in_features)
    method = OLoRA(OLoRASpec(rank=rank), seed=0, total_steps=1, schedule=lambda i, n: 1.0)
    return lambda: method.adapter(weight, site)


def timed(run: Callable, device: str = "cpu") -> tuple[float, object]:
    """Seconds until the device has done it, and what it returned."""
    finish(device)
    start = time.perf_counter()
    result = run()
    finish(device)
    return time.perf_counter() - start, result


def finish(device: str) -> None:
    """Waits for what was asked of a device that works by itself."""
    if device != "cpu":
        torch.cuda.synchronize()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument(
        "--repeats", type=int, default=9, help="runs of a small shape; a large one gets a third"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args(arguments)
    torch.set_num_threads(asked.threads)
    print(
        f"OLoRA initialisation, PEFT {peft.__version__} against ours; torch {torch.__version__}, "
        f"{torch.get_num_threads()} CPU threads, fp32, medians\n"
    )
    print("| out×in | r | runs | PEFT, s | ours, s | PEFT / ours | max factor diff | max B0A0 diff |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for name in asked.shapes:
        out_features, in_features = (int(n) for n in name.split("x"))
        large = out_features * in_features > LARGE
        for rank in asked.ranks:
            row = measure(
                (out_features, in_features), rank, max(1, asked.repeats // 3 if large else asked.repeats)
            )
            print(
                f"| {out_features}×{in_features} | {row.rank} | {row.repeats} | {row.peft_seconds:.4f} | "
                f"{row.our_seconds:.5f} | {row.ratio:.0f} | {row.factor_difference:.1e} | "
                f"{row.product_difference:.1e} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
