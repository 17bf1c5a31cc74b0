"""The compared methods: at which rank each is trained, which runs it still has to make, and their results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..bases.loading import Base
from ..bases.sites import target_sites
from ..errors import SpecError
from ..layers.adapter import Site
from ..progress import Stage
from ..specs import AdapterSpec, ComparisonSpec, learning_rate_for
from ..specs.compared_methods import ComparedMethod
from .budget import trainable_parameters, within_budget
from .runs import PlannedRun, RunResult
from .search import Grid, Rung, grid_around, halving

OF_THE_SCALE = ("rank", "alpha", "rslora")


@dataclass(frozen=True)
class Trial:
    """One learning rate in one rung of a search."""

    learning_rate: float
    steps: int
    loss: float | None
    """None if the run failed."""


@dataclass
class Entrant:
    """One compared method: how it is trained, and its results so far."""

    label: str
    asked: ComparedMethod
    """As the spec has it, before the budget."""
    adapter: AdapterSpec
    """At the rank that meets the budget."""
    sites: list[Site] = field(default_factory=list)
    trainable_parameters: int | None = None
    """None for a method that cannot be trained here."""
    default_rate: float | None = None
    """The method's default learning rate; None for a method that cannot be trained here."""
    grid: Grid = field(default_factory=Grid)
    planned_steps: list[int] = field(default_factory=list)
    """Steps of each run still to be made, by the present plan."""
    trials: list[Trial] = field(default_factory=list)
    best_rate: float | None = None
    finals: list[RunResult] = field(default_factory=list)
    problem: str | None = None
    """Why there is no result: the method cannot be trained here, or a run of it failed."""

    @property
    def can_train(self) -> bool:
        """Whether the method can be trained here; if not, `problem` says why."""
        return self.trainable_parameters is not None

    @property
    def options(self) -> dict[str, Any]:
        """The adapter's JSON: options that are not defaults, with method and rank in any case."""
        chosen = self.adapter.model_dump(mode="json", exclude_defaults=True)
        return chosen | {"method": self.adapter.method, "rank": self.adapter.rank}

    def take_default_rate(self, rate: float, spec: ComparisonSpec) -> None:
        """Searches around this rate instead, unless the spec names the rates to try."""
        if spec.learning_rates == "auto":
            self.default_rate, self.grid = rate, grid_around(rate)

    def run(self, stage: Stage, learning_rate: float, seed: int, steps: int) -> PlannedRun:
        """One run of a method that can be trained."""
        own = self.label, self.adapter, self.sites, self.default_rate
        return PlannedRun(*own, stage, learning_rate, seed, steps)


def enter(spec: ComparisonSpec, base: Base, total_steps: int) -> tuple[int, list[Entrant]]:
    """The budget in parameters, and the methods, in the spec's order, at the ranks that meet it."""
    lora = spec.training.adapter
    sites = target_sites(base.model, lora.target_modules)
    budget = trainable_parameters(lora, sites, total_steps) if spec.budget == "auto" else spec.budget
    entrants = [_entrant(spec, i, base, budget, total_steps) for i in range(len(spec.methods))]
    for entrant in entrants:
        entrant.label = _label(entrant, entrants)
    return budget, entrants


def _entrant(spec: ComparisonSpec, i: int, base: Base, budget: int, total_steps: int) -> Entrant:
    adapter = spec.methods[i].adapter
    try:
        sites = target_sites(base.model, adapter.target_modules)
        if spec.methods[i].match_budget:
            adapter = within_budget(adapter, budget, sites, total_steps)
    except SpecError as error:
        return untrainable(spec.labels[i], spec.methods[i], error.message)
    rate = default_rate(adapter, base)
    grid = grid_around(rate) if spec.learning_rates == "auto" else Grid(spec.learning_rates)
    numbers = trainable_parameters(adapter, sites, total_steps)
    planned = first_plan(grid, total_steps, spec.seeds)
    return Entrant(spec.labels[i], spec.methods[i], adapter, sites, numbers, rate, grid, planned)


def untrainable(label: str, asked: ComparedMethod, problem: str) -> Entrant:
    """A method, as asked for, that cannot be trained here."""
    return Entrant(label, asked, asked.adapter, problem=problem)


def _label(entrant: Entrant, entrants: Sequence[Entrant]) -> str:
    """The method's name; if it occurs more than once, with the options that are not defaults, and with those
    of the scale where another one's are not: `olora (rank 8 by budget, alpha 16)` beside `olora (rank 8,
    alpha 4)`.
    """
    name = entrant.adapter.method
    namesakes = [each.asked for each in entrants if each.adapter.method == name]
    if len(namesakes) == 1:
        return name
    scaling = {option for asked in namesakes for option in asked.options if option in OF_THE_SCALE}
    shown = scaling | set(entrant.asked.options)
    told = [_told(entrant, option) for option in type(entrant.adapter).model_fields if option in shown]
    return f"{name} ({', '.join(told)})" if told else name


def _told(entrant: Entrant, option: str) -> str:
    value = getattr(entrant.adapter, option)
    if option == "rank" and entrant.asked.match_budget:
        return f"rank {value} by budget" if entrant.can_train else "rank by budget"
    if isinstance(value, tuple):
        return f"{option} [{', '.join(map(str, value))}]"
    return f"{option} {value:g}" if isinstance(value, float) else f"{option} {value}"


def default_rate(adapter: AdapterSpec, base: Base) -> float:
    """The method's default learning rate for a base of this width."""
    return learning_rate_for(adapter, base.width)


def first_plan(grid: Grid, total_steps: int, seeds: int) -> list[int]:
    """Steps of every run of a method, before any is made."""
    rung = next(halving(grid, total_steps), None)
    finals = [total_steps] * seeds
    return finals if rung is None else plan_from(rung, finals)


def plan_from(rung: Rung, finals: list[int]) -> list[int]:
    """Steps of that rung's runs and of all runs after them."""
    return [rung.steps] * len(rung.rates) + [*rung.ahead, *finals]
