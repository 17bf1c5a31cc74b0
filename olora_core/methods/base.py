"""The interface of a method: one required hook, `adapter`, and optional ones that a training run calls.

Two class methods answer before any run: how many parameters the method trains, and how large its rank can be.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..data.batches import MicroBatch
from ..devices import SINGLE, Devices, full_tensor, is_dtensor
from ..errors import SpecError
from ..layers.adapter import Adapter, Site, attach, site_weight
from ..progress import Phase, result_of
from ..seeds import seed_of
from ..specs import AdapterSpec, check_export

SpecT = TypeVar("SpecT", bound=AdapterSpec)
AdapterT = TypeVar("AdapterT", bound=Adapter)
Schedule = Callable[[int, int], float]
"""`schedule(i, n)`: the job's learning-rate multiplier at step i = 1…n of n, warm-up included."""

SMALL_WEIGHT = 2**18
"""Up to this many entries, the decomposition of a weight gains nothing from threads."""


@dataclass(frozen=True)
class Outputs:
    """The results of one micro-batch's forward."""

    logits: Tensor | None
    """(rows, length, vocabulary); None unless the method has `needs_logits`."""
    labels: Tensor
    """(rows, length) int64, IGNORED where a token is not trained."""
    loss: Tensor
    """Scalar: the (weighted) mean over the trained tokens, or over the pairs, of this micro-batch."""
    repeated: bool = False
    """True for a pass that only keeps step with other devices, and must not be counted."""


class Method(Generic[SpecT, AdapterT]):
    """One object per run. Steps are optimizer steps, counted from 1."""

    can_go_on: ClassVar[bool] = True
    """Whether another run can train a finished adapter's tensors further. Not if the method has a plan for
    its whole run: rounds, a falling budget, masks."""
    needs_logits: bool = False
    """Whether `penalty` reads the logits, which the loss otherwise need not build."""
    penalty_copies: int = 0
    """For the memory estimate: how many tensors as large as the logits `penalty` and its backward hold."""

    def __init__(
        self,
        spec: SpecT,
        *,
        seed: int,
        total_steps: int,
        schedule: Schedule,
        weight_decay: float = 0.0,
        devices: Devices = SINGLE,
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
        """Warnings for the job's owner."""

    @classmethod
    def trainable_parameters(cls, spec: SpecT, sites: Sequence[Site], total_steps: int) -> int:
        """Trainable parameters of a run of `total_steps` in all of these layers, over all rounds."""
        return sum(spec.rank * (site.in_features + site.out_features) for site in sites)

    @classmethod
    def widest_rank(cls, spec: SpecT, sites: Sequence[Site], total_steps: int) -> int:
        """The largest rank that all of these layers allow."""
        return min(min(site.in_features, site.out_features) for site in sites)

    def adapter(self, weight: Tensor, site: Site) -> AdapterT:
        """Builds the adapter of one layer. `weight` is W (out×in) in the base's dtype, and must not be
        written.

        Raises SpecError, naming the layer, when the spec is invalid for it.
        """
        raise NotImplementedError

    def on_attached(self, adapters: Mapping[str, AdapterT]) -> None:
        """Called once all adapters are attached; `adapters` are by site name, in model order."""

    def before_pass(self, batch: MicroBatch) -> None:
        """Called before the forward of each micro-batch of a step."""

    def penalty(self, outputs: Outputs, reference: Callable[[], Tensor]) -> Tensor | None:
        """A scalar to add to the loss, or None; a step averages it over its micro-batches.

        `reference()` computes the base's logits (rows, length, vocabulary), at the cost of another forward.
        """
        return None

    def after_pass(self, outputs: Outputs) -> None:
        """Called after a micro-batch's forward and `penalty`, before its backward."""

    def on_step_retry(self) -> None:
        """Called when memory ran out and the step is repeated: discard what its passes have collected."""

    def after_backward(self, step: int) -> None:
        """Called before the update, with gradients accumulated, summed over the devices and clipped."""

    def after_step(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Called after the update, while the gradients are still there. Overrides must call this one."""
        self.finished_steps = step

    def param_groups(self, adapters: Mapping[str, AdapterT]) -> list[dict[str, Any]]:
        """The optimizer's parameter groups, see `group`.

        Before each step the loop sets a group's rate to job's peak rate × `lr_multiplier` × schedule ×
        `lr_factor`. With `lr_by: "method"` the schedule is left out; `lr_peak` replaces the job's peak rate.
        """
        return [self.group(p for adapter in adapters.values() for p in adapter.parameters())]

    def group(self, params: Any, **changes: Any) -> dict[str, Any]:
        """A parameter group with the defaults of all methods, updated by `changes`."""
        return {
            "params": [p for p in params if p.requires_grad],
            "weight_decay": self.weight_decay,
            "lr_multiplier": 1.0,
            "lr_factor": 1.0,
            "lr_by": "job",
        } | changes

    def state_dict(self) -> dict[str, Any]:
        """What resuming takes beside the adapters' tensors, as JSON."""
        return {"finished_steps": self.finished_steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.finished_steps = int(state["finished_steps"])

    def check_rank(self, site: Site) -> None:
        """Raises SpecError for a rank above the layer's own, which would waste parameters.

        PEFT lowers such a rank without saying so.
        """
        limit = min(site.out_features, site.in_features)
        if self.spec.rank > limit:
            raise SpecError(
                f"adapter.rank = {self.spec.rank} is more than layer '{site.name}' "
                f"({site.out_features}×{site.in_features}) can hold; use at most {limit}, or leave that "
                "layer out of adapter.target_modules.",
                param="adapter.rank",
            )


def build_adapters(method: Method[Any, AdapterT], model: nn.Module, sites: list[Site]) -> dict[str, AdapterT]:
    """Builds and attaches an adapter for every site; returns them by site name, in model order."""
    return result_of(build_adapters_with_progress(method, model, sites))


def build_adapters_with_progress(
    method: Method[Any, AdapterT], model: nn.Module, sites: list[Site], devices: Devices = SINGLE
) -> Generator[Phase, None, dict[str, AdapterT]]:
    """`build_adapters`, yielding progress after each adapter: those of a large model take a while."""
    adapters: dict[str, AdapterT] = {}
    for built, site in enumerate(sites, 1):
        weight = site_weight(model.get_submodule(site.name))
        if is_dtensor(weight):
            devices.barrier()
            weight = full_tensor(weight)
        with _threads_for(weight):
            adapters[site.name] = method.adapter(weight, site).to(weight.device)
        yield Phase("starting", built, len(sites))
    attach(model, adapters)
    method.on_attached(adapters)
    return adapters


@contextmanager
def _threads_for(weight: Tensor) -> Iterator[None]:
    """Inside, torch has one thread if the weight is small.

    On shared cores, threads that wait for each other in so short a decomposition make it a hundred times
    slower.
    """
    threads = torch.get_num_threads()
    if weight.numel() <= SMALL_WEIGHT:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def generator(seed: int, step: int, name: str) -> torch.Generator:
    """A new CPU generator for one draw, the same in every process and in a resumed run."""
    return torch.Generator().manual_seed(seed_of(f"{seed}/{step}/{name}"))
