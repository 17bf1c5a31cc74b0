"""Base models: the shipped one, the operator's folders, and the Hugging Face ids that the operator allows."""

import os
import re
import unicodedata
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
    kind: Literal["shipped", "folder", "hub"]
    folder: Path | None
    created: int


def base_models(settings: Settings) -> list[BaseModelRef]:
    """The base models on this machine, and the allowed hub ids that are not patterns."""
    refs = {ref.id: ref for ref in _on_disk(settings)}
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
    for folder in _folders(settings):
        if folder.name == model_id:
            problem = what_is_missing(folder)
            raise ModelError(f"Base model {model_id!r} cannot be used: {problem}", param="model")
    if _HUB_ID.fullmatch(model_id) and any(fnmatchcase(model_id, p) for p in settings.allowed_hub_models):
        return BaseModelRef(model_id, "hub", None, 0)
    known = [ref.id for ref in base_models(settings)]
    raise ModelError(
        f"Base model {model_id[:200]!r} is not available{nearest(model_id[:200], known)}. "
        f"Available: {', '.join(known)}. The operator adds folders with OLORA_MODELS_DIR "
        "and Hugging Face ids with OLORA_ALLOWED_HUB_MODELS.",
        param="model",
    )


def fetch_base(ref: BaseModelRef, settings: Settings) -> Path:
    """The local folder of a base model, fetched from the hub if necessary. Raises ModelError."""
    if ref.folder is not None:
        return ref.folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"Base model {ref.id!r} is on the Hugging Face hub; install huggingface-hub to fetch it."
        ) from None
    try:
        folder = Path(snapshot_download(ref.id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises many types, all with a readable message
        raise ModelError(
            f"Base model {ref.id!r} could not be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    if problem := what_is_missing(folder):
        raise ModelError(f"Base model {ref.id!r} cannot be used: {problem}", param="model")
    return folder


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
    for folder in _folders(settings):
        taken = folder.name == SHIPPED_ID and refs
        if not taken and what_is_missing(folder) is None:
            refs.append(_ref(folder.name, "folder", folder))
    return refs


def _folders(settings: Settings) -> list[Path]:
    """The operator's folders whose names can be ids. An id is compared with names, never used as a path."""
    if settings.models_dir is None or not settings.models_dir.is_dir():
        return []
    found = sorted(settings.models_dir.iterdir())
    return [folder for folder in found if _can_be_id(folder.name) and folder.is_dir()]


def _can_be_id(name: str) -> bool:
    """Any name without control characters, unless it is hidden or begins with `ft:` (a fine-tuned model)."""
    broken = any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    return len(name) <= _MAX_ID and not broken and not name.startswith((".", "ft:"))


def _ref(model_id: str, kind: Literal["shipped", "folder"], folder: Path) -> BaseModelRef:
    return BaseModelRef(model_id, kind, folder, int((folder / "config.json").stat().st_mtime))
