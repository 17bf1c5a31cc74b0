"""What a method may do to a training run: one required hook, and nine that do nothing unless defined.

Beside them, what it says of itself before any run: how many numbers it trains, and how wide it can be.
"""

import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data.batches import MicroBatch
from ..devices import ALONE, Devices, is_part, whole
from ..errors import SpecError
from ..layers.adapter import Adapter, Site, attach, site_weight
from ..progress import Phase, result_of
from ..specs import AdapterSpec, check_export

SpecT = TypeVar("SpecT", bound=AdapterSpec)
AdapterT = TypeVar("AdapterT", bound=Adapter)
Schedule = Callable[[int, int], float]
"""`schedule(i, n)`: the job's learning-rate multiplier at step i = 1…n of n, warm-up included."""

SMALL_WEIGHT = 2**18
"""Numbers in a weight whose decomposition gains nothing from threads."""


@dataclass(frozen=True)
class Outputs:
    """One micro-batch's forward. `logits` is None when a chunked loss never built them."""

    logits: Tensor | None
    labels: Tensor
    loss: Tensor
    repeated: bool = False
    """Whether this pass only keeps step with other devices; nothing of it is counted."""


class Method(Generic[SpecT, AdapterT]):
    """One object per run. Steps are optimizer steps, counted from 1."""

    needs_logits: bool = False
    """Whether `penalty` reads the logits, so that a loss that never builds them cannot be used."""
    penalty_copies: int = 0
    """For the memory estimate: tensors of the logits' size that `penalty` and its backward hold at once."""

    def __init__(
        self,
        spec: SpecT,
        *,
        seed: int,
        total_steps: int,
        schedule: Schedule,
        weight_decay: float = 0.0,
        devices: Devices = ALONE,
    ) -> None:
        check_export(spec)
        self.spec = spec
        self.seed = seed
        self.total_steps = total_steps
        self.schedule = schedule
        self.weight_decay = weight_decay
        self.devices = devices
        """A process sees its own micro-batches only; `devices.sum` makes a statistic over them one over the
        whole optimizer batch. All processes must call it, so only in `after_backward` or `after_step`."""
        self.finished_steps = 0
        self.notes: list[str] = []
        """Sentences the job's owner should read."""

    @classmethod
    def trainable_parameters(cls, spec: SpecT, sites: Sequence[Site], total_steps: int) -> int:
        """How many a run of `total_steps` steps has in these layers, those of all its rounds together."""
        return sum(spec.rank * (site.in_features + site.out_features) for site in sites)

    @classmethod
    def widest_rank(cls, spec: SpecT, sites: Sequence[Site], total_steps: int) -> int:
        """The largest rank at which every one of these layers holds its adapter."""
        return min(min(site.in_features, site.out_features) for site in sites)

    def adapter(self, weight: Tensor, site: Site) -> AdapterT:
        """Builds the adapter of one layer. `weight` is W as out×in, in the base's dtype; read only.

        Raises SpecError, naming the layer, when the spec does not fit it.
        """
        raise NotImplementedError

    def placed(self, adapters: Mapping[str, AdapterT]) -> None:
        """All adapters exist, in model order, by site name."""

    def before_pass(self, batch: MicroBatch) -> None:
        """Called before the forward of each micro-batch of a step."""

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        """A scalar added to this micro-batch's loss. `reference()` gives the base's logits for the batch."""
        return None

    def after_pass(self, outputs: Outputs) -> None:
        """Called after a micro-batch's forward and `penalty`, before its backward."""

    def step_again(self) -> None:
        """The device ran out of memory: what this step's passes told so far is to be forgotten."""

    def after_backward(self, step: int) -> None:
        """Gradients are complete (accumulated, reduced, clipped); weights have not moved."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Weights have moved, gradients are still there. A method that defines this calls it here too."""
        self.finished_steps = step

    def param_groups(self, adapters: Mapping[str, AdapterT]) -> list[dict[str, Any]]:
        """Optimizer groups: `params`, `weight_decay`, and how the loop writes their rate before each step:
        base rate × `lr_multiplier` × schedule × `lr_factor`; with `lr_by: "method"` the schedule is left out.
        Where a group has `lr_peak`, that stands in for the job's base rate.
        """
        return [self.group(p for adapter in adapters.values() for p in adapter.parameters())]

    def group(self, params: Any, **changes: Any) -> dict[str, Any]:
        """One optimizer group with the defaults of all methods."""
        return {
            "params": [p for p in params if p.requires_grad],
            "weight_decay": self.weight_decay,
            "lr_multiplier": 1.0,
            "lr_factor": 1.0,
            "lr_by": "job",
        } | changes

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the adapters' own tensors. JSON-able."""
        return {"finished_steps": self.finished_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.finished_steps = int(state["finished_steps"])

    def check_rank(self, site: Site) -> None:
        """A factor wider than its layer only wastes parameters (and PEFT would silently shrink it)."""
        limit = min(site.out_features, site.in_features)
        if self.spec.rank > limit:
            raise SpecError(
                f"adapter.rank = {self.spec.rank} is more than layer '{site.name}' "
                f"({site.out_features}×{site.in_features}) can hold; use at most {limit}, or leave that "
                "layer out of adapter.target_modules.",
                param="adapter.rank",
            )


def place(method: Method[Any, AdapterT], model: nn.Module, sites: list[Site]) -> dict[str, AdapterT]:
    """Builds an adapter for every site, attaches them all, and returns them by site name in model order."""
    return result_of(placing(method, model, sites))


def placing(
    method: Method[Any, AdapterT], model: nn.Module, sites: list[Site], devices: Devices = ALONE
) -> Generator[Phase, None, dict[str, AdapterT]]:
    """`place`, saying after each adapter how many are built: a large model's take a while."""
    adapters: dict[str, AdapterT] = {}
    for built, site in enumerate(sites, 1):
        weight = site_weight(model.get_submodule(site.name))
        if is_part(weight):
            devices.meet()
            weight = whole(weight)
        with _threads_for(weight):
            adapters[site.name] = method.adapter(weight, site).to(weight.device)
        yield Phase("starting", built, len(sites))
    attach(model, adapters)
    method.placed(adapters)
    return adapters


@contextmanager
def _threads_for(weight: Tensor) -> Iterator[None]:
    """Inside, a small weight has one thread: on shared cores, threads that wait for each other inside a
    decomposition this short make it a hundred times slower.
    """
    threads = torch.get_num_threads()
    if weight.numel() <= SMALL_WEIGHT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A fresh CPU generator for one draw: the same in every process and every resumed run."""
    digest = hashlib.sha256(f"{seed}/{step}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
