"""How a worker process is started: its command line, its environment and the GPUs it may use."""

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from store.queue import QUEUE
from store.settings import Settings

from .parent_death import die_with_parent

ROOT = Path(__file__).resolve().parent.parent
MACHINE = ("PATH", "HOME", "LANG", "TZ", "TMPDIR", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "PYTHONPATH")
_PARENT = "OLORA_DIE_WITH_PARENT"
_DEVICE = re.compile(r"^(?P<indent>\s*)(?:GPU|MIG)\b.*\(UUID: (?P<uuid>[^)]+)\)")


def worker_command(settings: Settings, *, name: str = "worker") -> list[str]:
    """The command line of one worker. Workers on one machine need different names.

    A worker drives one job at a time, so it has one slot. The slot is a thread, so that the main thread
    can answer `celery inspect ping` and signals meanwhile.
    """
    return [
        *(sys.executable, "-m", "celery", "-A", "worker.main", "worker"),
        *("-P", "threads", "-c", "1", "--without-gossip", "--without-mingle"),
        *("-Q", QUEUE, "-n", f"{name}@%h", "-l", settings.log_level),
    ]


def worker_environment(
    environment: Mapping[str, str], *, parent: int | None = None, gpus: str | None = None
) -> dict[str, str]:
    """A worker's environment: the given one, with what the options add.

    With `parent`, a pid, the worker ends when that process does. With `gpus`, comma-separated UUIDs, it
    sees only those.
    """
    chosen = dict(environment)
    # Celery imports `worker.main` by name, whatever the current folder is.
    chosen["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [environment.get("PYTHONPATH")])])
    if parent is not None:
        chosen[_PARENT] = str(parent)
    if gpus is not None:
        chosen["CUDA_VISIBLE_DEVICES"] = gpus
    return chosen


def follow_parent() -> None:
    """Ends this worker with its parent, if it was started with `parent`."""
    parent = os.environ.pop(_PARENT, None)
    if parent is not None:
        die_with_parent(int(parent))


def visible_gpus() -> list[str]:
    """UUIDs (or indices) of the GPUs available to this process; empty without any.

    Respects CUDA_VISIBLE_DEVICES. A GPU that is divided into MIG instances is listed as its instances.
    """
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return [device.strip() for device in chosen.split(",") if device.strip() not in ("", "-1")]
    try:
        listing = subprocess.run(
            ["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return devices_listed(listing)


def devices_listed(listing: str) -> list[str]:
    """The UUIDs in the output of `nvidia-smi -L`; a divided GPU is replaced by its instances."""
    devices: list[str] = []
    whole: str | None = None
    for match in filter(None, map(_DEVICE.match, listing.splitlines())):
        if match["indent"] and whole in devices:
            devices.remove(str(whole))
        if not match["indent"]:
            whole = match["uuid"]
        devices.append(match["uuid"])
    return devices


def inherited(
    environment: Mapping[str, str], names: tuple[str, ...], prefixes: tuple[str, ...]
) -> dict[str, str]:
    """The variables with these names or prefixes, and a PYTHONPATH that finds this project's modules."""
    chosen = {
        name: value for name, value in environment.items() if name in names or name.startswith(prefixes)
    }
    chosen["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [chosen.get("PYTHONPATH")])])
    return chosen
