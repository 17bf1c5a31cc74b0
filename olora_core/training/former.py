"""The model that a run trains on from: a base with the adapters that earlier runs have trained.

Its adapters are links of a chain, one for each method that trained. If the run's method and options are the
last link's, the run goes on in that link's own tensors; else it adds a link, and all others stay frozen.
Either way the first step begins at the former model, bit for bit, and the base is never written.
"""

import hashlib
import json
import re
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..bases.loading import Base
from ..bases.sites import target_sites
from ..devices import SINGLE, Devices
from ..errors import ModelError
from ..export.adapter import CONFIG, TENSORS
from ..export.manifest import MANIFEST, NATIVE, Link
from ..layers.adapter import AdaptedLinear, Adapter, Site, attach, detach, is_linear, load_adapter_tensors
from ..layers.stack import Stack
from ..methods import METHODS
from ..methods.base import build_adapters_with_progress
from ..progress import Phase
from ..specs import TrainSpec
from .checkpoint import STATE
from .peft_files import read_peft

FREE = {"dropout", "lora_plus_ratio", "export", "export_rank", "target_modules"}
"""Options that may change while a method goes on: they leave the tensors' names, shapes and meaning."""
SAVED = ("adapter.safetensors", "frozen.safetensors")
"""A checkpoint's files with the tensors of its run's own adapter, and of the adapters under it."""
_OF_A_LINK = re.compile(r"(.+)\.links\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Former:
    """What a folder with an exported adapter says of the model that it makes."""

    links: Sequence[Link]
    tensors: Mapping[int, Mapping[str, Tensor]]
    """By link and `<site>.<tensor>`."""
    fingerprint: str | None
    """Of the base that it was trained on; None if the folder does not tell."""
    digest: str
    """SHA-256 over links and tensors: a checkpoint's run goes on from the same."""


@dataclass
class Chain:
    """The frozen adapters of a run that trains on, by site and link."""

    links: Sequence[Link] = ()
    """Of the former model's links, those that stay frozen."""
    frozen: dict[str, dict[int, Adapter]] = field(default_factory=dict)
    goes_on: bool = False
    """Whether the run trains the former model's last link, and not one of its own."""

    def under(self) -> dict[str, Adapter]:
        """The frozen adapters alone, by site."""
        return {name: Stack(links) for name, links in self.frozen.items()}

    def exported(self, own: Mapping[str, Adapter]) -> dict[str, Adapter]:
        """The whole update of every layer, given the run's own adapters."""
        if not self.links:
            return dict(own)
        number = len(self.links)
        names = [*self.frozen, *(name for name in own if name not in self.frozen)]
        mine = {name: {number: own[name]} if name in own else {} for name in names}
        return {name: Stack({**self.frozen.get(name, {}), **mine[name]}) for name in names}


def read_former(folder: Path) -> Former:
    """The adapter in a folder that was exported here, in a checkpoint, or in PEFT's format.

    Raises ModelError.
    """
    if not (folder / STATE).exists() and not (folder / MANIFEST).exists() and (folder / CONFIG).exists():
        link, tensors_of_link = read_peft(folder)
        return Former([link], {0: tensors_of_link}, None, _digest([link], [folder / TENSORS]))
    try:
        if (folder / STATE).exists():
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            links, fingerprint = state["record"]["links"], state["base_model"]
            files = [path for name in SAVED if (path := folder / name).exists()]
        else:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            links, fingerprint = _links_of(manifest), manifest["base_model"].get("fingerprint")
            files = [folder / NATIVE]
        read = [Link.from_json(link) for link in links]
        flat = [entry for file in files for entry in load_file(file).items()]
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ModelError(f"The adapter to train on from cannot be read: {error}.", param="model") from None
    tensors: dict[int, dict[str, Tensor]] = {number: {} for number in range(len(read))}
    for name, tensor in flat:
        match = _OF_A_LINK.fullmatch(name)
        last = len(read) - 1 if len(files) > 1 else 0  # a checkpoint names the tensors of its own run plainly
        number, name = (int(match[2]), f"{match[1]}.{match[3]}") if match else (last, name)
        tensors[number][name] = tensor
    return Former(read, tensors, fingerprint, _digest(read, files))


def _digest(links: Sequence[Link], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(json.dumps([link.as_json() for link in links], sort_keys=True).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _links_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Manifests of earlier versions tell of one link, which is the run's."""
    resolved = manifest["spec"]["resolved"]
    alone = {
        "adapter": resolved["adapter"],
        "seed": resolved["seed"],
        "total_steps": manifest["metrics"].get("steps", 1),
    }
    return list(manifest.get("links") or [alone])


def build_former(
    former: Former, base: Base, devices: Devices = SINGLE
) -> Generator[Phase, None, dict[str, dict[int, Adapter]]]:
    """The former model's adapters by site and link, frozen. The base has no adapters, before and after.

    Raises ModelError if the adapter belongs to another base.
    """
    if former.fingerprint not in (None, base.fingerprint):
        raise ModelError(
            f"The model to train on from was trained on another base than '{base.name}'; train on from it "
            "with the base that its manifest names.",
            param="model",
        )
    built: dict[str, dict[int, Adapter]] = {}
    for number, link in enumerate(former.links):
        tensors = former.tensors[number]
        adapters = yield from _build_link(link, tensors, base, devices)
        for name, adapter in adapters.items():
            built.setdefault(name, {})[number] = adapter.eval().requires_grad_(False)
    return built


def _build_link(
    link: Link, tensors: Mapping[str, Tensor], base: Base, devices: Devices
) -> Generator[Phase, None, dict[str, Adapter]]:
    names = sites_in(tensors, base.model)
    method = METHODS[link.spec.method](
        link.spec.model_copy(update={"dropout": 0.0}),
        seed=link.seed,
        total_steps=link.total_steps,
        schedule=lambda step, steps: 1.0,
        devices=devices,
    )
    try:
        adapters = yield from build_adapters_with_progress(
            method, base.model, target_sites(base.model, names), devices
        )
        load_adapter_tensors(adapters, tensors)
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"The model to train on from does not fit base model '{base.name}': {error}.", param="model"
        ) from None
    finally:
        detach(base.model)
    return adapters


def sites_in(tensors: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """The layers that the tensors `<site>.<tensor>` belong to. Raises ModelError for an unknown one."""
    layers = {name for name, module in model.named_modules() if is_linear(module)}
    names: dict[str, None] = {}
    for tensor in tensors:
        parts = tensor.split(".")
        heads = (".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1))
        name = next((head for head in heads if head in layers), None)
        if name is None:
            raise ModelError(f"The model to train on from has '{tensor}', and the base no such layer.")
        names[name] = None
    return list(names)


def whole(built: Mapping[str, Mapping[int, Adapter]], links: Sequence[Link]) -> dict[str, Adapter]:
    """The update of every layer that `build_former` has built, by site."""
    if len(links) == 1:
        return {name: of_site[0] for name, of_site in built.items()}
    return {name: Stack(of_site) for name, of_site in built.items()}


def goes_on(former: Former, spec: TrainSpec, sites: Sequence[Site], model: nn.Module) -> bool:
    """Whether a run with this resolved spec trains the last link's own tensors."""
    last = former.links[-1].spec
    if not METHODS[last.method].can_go_on:
        return False
    same = last.model_dump(exclude=FREE) == spec.adapter.model_dump(exclude=FREE)
    return same and set(sites_in(former.tensors[len(former.links) - 1], model)) == {s.name for s in sites}


def put_under(
    model: nn.Module,
    former: Former,
    built: Mapping[str, Mapping[int, Adapter]],
    own: Mapping[str, Adapter],
    *,
    going_on: bool,
) -> Chain:
    """Puts the former model's adapters under the attached ones, whose start is then the former model."""
    kept = len(former.links) - going_on
    if going_on:
        load_adapter_tensors(own, former.tensors[kept])
    attach(model, {name: Stack(links) for name, links in built.items() if name not in own})
    frozen: dict[str, dict[int, Adapter]] = {}
    for name, links in built.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, AdaptedLinear)
        under = {number: adapter for number, adapter in links.items() if number < kept}
        layer.reference = Stack(links) if name in own else layer.adapter
        if name in own:
            layer.under = Stack(under) if under else None
        if under:
            frozen[name] = under
        layer.train(layer.training)
    return Chain(former.links[:kept], frozen, goes_on=going_on)
