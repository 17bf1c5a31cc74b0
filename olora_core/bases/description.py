"""What a base model's files say of it, read without torch."""

import json
from math import prod
from pathlib import Path

LONGEST_HEADER = 100 * 2**20


def architecture(folder: Path) -> str | None:
    """`model_type` in config.json; None if it cannot be read."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, str) else None


def parameters(folder: Path) -> int | None:
    """Number of values in the folder's safetensors files; None if one cannot be read."""
    try:
        return sum(_values(path) for path in folder.glob("*.safetensors"))
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None


def size_bytes(folder: Path) -> int:
    """Size of the folder's safetensors files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _values(path: Path) -> int:
    """From a safetensors file's header: 8 bytes for its length, then JSON with each tensor's shape."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST_HEADER:
            raise ValueError("this is not the length of a header")
        header = json.loads(file.read(length))
    return sum(prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
