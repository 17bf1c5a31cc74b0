"""The methods of a comparison, and how untyped input is read into them."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

from pydantic import Field

from ..errors import SpecError
from .adapters import ADAPTER_SPECS, AnyAdapterSpec
from .base import Spec, nearest
from .methods.lora import LoRASpec
from .training import ADAPTER_ALIASES, read_spec

EVERY_METHOD = "all"


class ComparedMethod(Spec):
    """One method of a comparison."""

    adapter: AnyAdapterSpec
    match_budget: bool = Field(
        default=True,
        description="Choose the rank that comes closest to the budget, instead of the adapter's.",
    )

    @property
    def is_plain_lora(self) -> bool:
        """Whether this is LoRA as in its paper, of any rank: the baseline."""
        adapter = self.adapter
        return isinstance(adapter, LoRASpec) and adapter.lora_plus_ratio == 1 and not adapter.rslora

    @property
    def options(self) -> dict[str, Any]:
        """The options that differ from the method's defaults; and the rank, if it was given."""
        chosen = self.adapter.model_dump(exclude_defaults=True, exclude={"method"})
        return chosen if self.match_budget else {"rank": self.adapter.rank} | chosen


def label_of(compared: ComparedMethod) -> str:
    """The method's name, with the options that differ from its defaults."""
    options = ", ".join(f"{name} {value}" for name, value in compared.options.items())
    return f"{compared.adapter.method} ({options})" if options else compared.adapter.method


def read_methods(
    methods: Sequence[str | Mapping[str, Any]] | str, model: str, type: str
) -> tuple[ComparedMethod, ...]:
    """The methods in the request's order, each once, with plain LoRA appended if it is missing."""
    asked = [methods] if isinstance(methods, str) else methods
    if not isinstance(asked, Sequence) or not asked:
        raise SpecError(
            f'methods must be "{EVERY_METHOD}", or a list of names and adapter objects.', param="methods"
        )
    found: list[ComparedMethod] = []
    for i, method in enumerate(asked):
        place = f"methods[{i}]"
        if method == EVERY_METHOD:
            named = {compared.adapter.method for compared in found}
            found += [_method(name, place, model, type) for name in ADAPTER_SPECS if name not in named]
            continue
        compared = _method(method, place, model, type)
        if compared in found:
            raise SpecError(
                f"{place} repeats an earlier method ({label_of(compared)}); leave it out, or change its "
                "options.",
                param=place,
            )
        found.append(compared)
    if not any(compared.is_plain_lora for compared in found):
        targets = {compared.adapter.target_modules for compared in found}
        of = targets.pop() if len(targets) == 1 else "auto"
        found.append(ComparedMethod(adapter=LoRASpec(target_modules=of)))
    return tuple(found)


def _method(method: Any, place: str, model: str, type: str) -> ComparedMethod:
    """Reads one method. Raises SpecError, naming the place."""
    values = {"method": method} if isinstance(method, str) else method
    if not isinstance(values, Mapping) or "method" not in values:
        raise SpecError(f"{place} must be a method's name, or an adapter object with a method.", param=place)
    name = values["method"]
    if not isinstance(name, str) or name not in ADAPTER_SPECS:
        raise SpecError(
            f"{place}: method {name!r} is unknown{nearest(str(name), ADAPTER_SPECS)}. "
            f"Available: {', '.join(ADAPTER_SPECS)}.",
            param=place,
        )
    if values.get("export_rank") is not None:
        raise SpecError(
            f"{place}.export_rank: a comparison exports no adapter; leave it out.",
            param=f"{place}.export_rank",
        )
    try:
        adapter = read_spec(model=model, type=type, adapter=values).adapter
    except SpecError as error:
        inner = (error.param or "").removeprefix("adapter.")
        raise SpecError(f"{place}: {error.message}", param=f"{place}.{inner}") from None
    if adapter.export == "merged" and adapter.has_pair:
        raise SpecError(
            f"{place}.export: a comparison exports no model; leave it out.", param=f"{place}.export"
        )
    gives_rank = any(ADAPTER_ALIASES.get(option, option) == "rank" for option in values)
    return ComparedMethod(adapter=cast(AnyAdapterSpec, adapter), match_budget=not gives_rank)
