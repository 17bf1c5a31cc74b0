"""Base models: the shipped one, the operator's folders, the added ones, and the allowed Hugging Face ids."""

import os
import re
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

from olora_core.errors import ModelError
from olora_core.specs import nearest

from .settings import Settings

SHIPPED_ID = "olora-tiny"
SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "examples" / "base"
HUB_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.jinja",
)
"""The files fetched from the hub: safetensors weights, configuration, tokenizer. Never code."""
_MAX_ID = 256
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class BaseModelRef:
    """A base model that can be trained. `folder` is None if it must be fetched from the hub."""

    id: str
    kind: Literal["shipped", "folder", "added", "hub"]
    """`folder`: in OLORA_MODELS_DIR; `added`: in the home, by `olora models add`."""
    folder: Path | None
    created: int


def base_models(settings: Settings) -> list[BaseModelRef]:
    """The base models on this machine, and the allowed hub ids that are not patterns."""
    refs: dict[str, BaseModelRef] = {}
    for ref in _on_disk(settings):
        refs.setdefault(ref.id, ref)
    for pattern in settings.allowed_hub_models:
        if _HUB_ID.fullmatch(pattern):
            refs.setdefault(pattern, BaseModelRef(pattern, "hub", None, 0))
    return list(refs.values())


def find_base(settings: Settings, model_id: str) -> BaseModelRef:
    """The base model with this id.

    Raises ModelError, with the nearest id or the reason why the folder cannot be used.
    """
    for ref in base_models(settings):
        if ref.id == model_id:
            return ref
    for _, folder in _folders(settings):
        if folder.name == model_id:
            problem = what_is_missing(folder)
            raise ModelError(f"Base model {model_id!r} cannot be used: {problem}", param="model")
    if _HUB_ID.fullmatch(model_id) and any(fnmatchcase(model_id, p) for p in settings.allowed_hub_models):
        return BaseModelRef(model_id, "hub", None, 0)
    known = [ref.id for ref in base_models(settings)]
    raise ModelError(
        f"Base model {model_id[:200]!r} is not available{nearest(model_id[:200], known)}. "
        f"Available: {', '.join(known)}. The operator adds folders with OLORA_MODELS_DIR, "
        "Hugging Face ids with OLORA_ALLOWED_HUB_MODELS, and both with `olora models add`.",
        param="model",
    )


def fetch_base(ref: BaseModelRef, settings: Settings) -> Path:
    """The local folder of a base model, fetched from the hub if necessary. Raises ModelError."""
    return fetch_from_hub(ref.id) if ref.folder is None else ref.folder


def fetch_from_hub(model_id: str) -> Path:
    """The folder of a hub model in the hub's cache, named by its commit. Raises ModelError."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"Base model {model_id!r} is on the Hugging Face hub; install huggingface-hub to fetch it."
        ) from None
    try:
        folder = Path(snapshot_download(model_id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises many types, all with a readable message
        raise ModelError(
            f"Base model {model_id!r} could not be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    if problem := what_is_missing(folder):
        raise ModelError(f"Base model {model_id!r} cannot be used: {problem}", param="model")
    return folder


def check_new_name(settings: Settings, name: str) -> None:
    """Raises ModelError unless a base model can be added under this name."""
    if "/" in name or not name or not can_be_id(name):
        raise ModelError(
            f"{name[:200]!r} cannot be the name of a base model: it is the name of a folder, of at most "
            f"{_MAX_ID} characters and not hidden; choose another one with --name."
        )
    for kind, folder in _folders(settings):
        if folder.name == name:
            where = "in OLORA_MODELS_DIR" if kind == "folder" else "in the home"
            raise ModelError(
                f"There is a base model {name!r} {where} already; choose another name with --name, or remove "
                f"{folder} first."
            )
    if name == SHIPPED_ID:
        raise ModelError(f"{name!r} is the shipped base model; choose another name with --name.")


def what_is_missing(folder: Path) -> str | None:
    """Why a folder cannot be used as a base model, with the remedy; None if it can."""
    if not os.access(folder, os.R_OK | os.X_OK):
        return "its folder cannot be read by the service; make it readable for the service's user."
    if not (folder / "config.json").is_file():
        return "its folder has no config.json; save it with `model.save_pretrained(folder)`."
    if not any(folder.glob("*.safetensors")):
        return (
            "its folder has no *.safetensors file, the only weight format that is supported; "
            "convert them with `model.save_pretrained(folder, safe_serialization=True)`."
        )
    return None


def _on_disk(settings: Settings) -> list[BaseModelRef]:
    refs = []
    if what_is_missing(SHIPPED_FOLDER) is None:
        refs.append(_ref(SHIPPED_ID, "shipped", SHIPPED_FOLDER))
    for kind, folder in _folders(settings):
        taken = folder.name == SHIPPED_ID and refs
        if not taken and what_is_missing(folder) is None:
            refs.append(_ref(folder.name, kind, folder))
    return refs


def _folders(settings: Settings) -> Iterator[tuple[Literal["folder", "added"], Path]]:
    """The folders whose names can be ids, the operator's first. An id is never used as a path."""
    if settings.models_dir is not None:
        yield from (("folder", folder) for folder in _inside(settings.models_dir))
    yield from (("added", folder) for folder in _inside(settings.added_models_folder))


def _inside(parent: Path) -> list[Path]:
    found = sorted(parent.iterdir()) if parent.is_dir() else []
    return [folder for folder in found if can_be_id(folder.name) and folder.is_dir()]


def can_be_id(name: str) -> bool:
    """Any name without control characters, unless it is hidden or begins with `ft:` (a fine-tuned model)."""
    broken = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    return len(name) <= _MAX_ID and not broken and not name.startswith((".", "ft:"))


def _ref(model_id: str, kind: Literal["shipped", "folder", "added"], folder: Path) -> BaseModelRef:
    return BaseModelRef(model_id, kind, folder, int((folder / "config.json").stat().st_mtime))
