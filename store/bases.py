"""Base models: the shipped one, folders of the operator, and Hugging Face ids on the operator's list."""

import re
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
"""What is fetched of a hub model: weights in safetensors, configuration, tokenizer. Never code."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


@dataclass(frozen=True)
class BaseModelRef:
    """A base model that may be trained. `folder` is None for one that must be fetched from the hub."""

    id: str
    kind: Literal["shipped", "folder", "hub"]
    folder: Path | None
    created: int


def base_models(settings: Settings) -> list[BaseModelRef]:
    """The base models on this machine, and the hub ids that are named without a pattern."""
    refs = {ref.id: ref for ref in _on_disk(settings)}
    for pattern in settings.allowed_hub_models:
        if _HUB_ID.fullmatch(pattern):
            refs.setdefault(pattern, BaseModelRef(pattern, "hub", None, 0))
    return list(refs.values())


def find_base(settings: Settings, model_id: str) -> BaseModelRef:
    """The base model of this id.

    Raises ModelError, which names the nearest id, or what keeps a folder from being a base model.
    """
    for ref in base_models(settings):
        if ref.id == model_id:
            return ref
    if _NAME.fullmatch(model_id) and settings.models_dir and (settings.models_dir / model_id).is_dir():
        problem = what_is_missing(settings.models_dir / model_id)
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
    """The folder of a base model on this machine, fetched from the hub when it must be."""
    if ref.folder is not None:
        return ref.folder
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(
            f"Base model {ref.id!r} comes from the hub, for which huggingface-hub must be installed."
        ) from None
    try:
        folder = Path(snapshot_download(ref.id, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub's client raises many kinds, all of them with a sentence
        raise ModelError(
            f"Base model {ref.id!r} could not be fetched from the hub: {str(error).splitlines()[0]}"
        ) from error
    if problem := what_is_missing(folder):
        raise ModelError(f"Base model {ref.id!r} cannot be used: {problem}", param="model")
    return folder


def what_is_missing(folder: Path) -> str | None:
    """What keeps a folder from being a base model, with the remedy; None when nothing does."""
    if not (folder / "config.json").is_file():
        return "its folder has no config.json; save it with `model.save_pretrained(folder)`."
    if not any(folder.glob("*.safetensors")):
        return (
            "its folder has no *.safetensors, the only kind of weights that is read; "
            "convert them with `model.save_pretrained(folder, safe_serialization=True)`."
        )
    return None


def _on_disk(settings: Settings) -> list[BaseModelRef]:
    refs = []
    if what_is_missing(SHIPPED_FOLDER) is None:
        refs.append(_ref(SHIPPED_ID, "shipped", SHIPPED_FOLDER))
    if settings.models_dir is not None and settings.models_dir.is_dir():
        for folder in sorted(settings.models_dir.iterdir()):
            taken = folder.name == SHIPPED_ID and refs
            if not taken and _NAME.fullmatch(folder.name) and what_is_missing(folder) is None:
                refs.append(_ref(folder.name, "folder", folder))
    return refs


def _ref(model_id: str, kind: Literal["shipped", "folder"], folder: Path) -> BaseModelRef:
    return BaseModelRef(model_id, kind, folder, int((folder / "config.json").stat().st_mtime))
