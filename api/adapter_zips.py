"""An uploaded adapter: a zip with a LoRA in PEFT's format. The worker that uses it checks its tensors."""

import json
import zipfile
from pathlib import PurePosixPath
from typing import BinaryIO

from .errors import BadRequest

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
CONFIG_BYTES = 100_000


def base_of_adapter(stream: BinaryIO) -> str | None:
    """The base model that the adapter's configuration names, or None. Raises BadRequest for no such zip."""
    try:
        with zipfile.ZipFile(stream) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            config = _only(entries, CONFIG)
            beside = str(PurePosixPath(config).with_name(TENSORS))
            if beside not in entries:
                raise _unusable(f"it has no {TENSORS}; save the adapter as safetensors")
            if entries[config].file_size > CONFIG_BYTES:
                raise _unusable(f"its {CONFIG} is larger than {CONFIG_BYTES} bytes")
            values = json.loads(archive.read(config))
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, ValueError) as error:
        raise _unusable(str(error)[:200]) from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise _unusable(f"its {CONFIG} does not say peft_type LORA, the only kind that can be trained on")
    name = values.get("base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def _only(entries: dict[str, zipfile.ZipInfo], name: str) -> str:
    found = [entry for entry in entries if PurePosixPath(entry).name == name]
    if len(found) != 1:
        raise _unusable(f"it holds {len(found)} files {name} instead of one")
    return found[0]


def _unusable(problem: str) -> BadRequest:
    return BadRequest(
        f"The file is not a zip with a LoRA adapter in PEFT's format: {problem}.",
        param="file",
        code="invalid_adapter",
    )
