"""A disk that is too small: a tmpfs that only the started command sees, in a mount namespace of its own."""

import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NAMESPACE = ("unshare", "--map-root-user", "--mount", "sh", "-c")
MOUNT = 'mount -t tmpfs -o size="$1" tmpfs "$2" && cd "$3" && shift 3 && exec "$@"'


def run(
    folder: Path,
    size_bytes: int,
    command: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
) -> "subprocess.CompletedProcess[str]":
    """Runs a command for which `folder`, an existing one, is an empty disk of that size."""
    if subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system does not allow mount namespaces")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [*NAMESPACE, MOUNT, "sh", str(size_bytes), str(folder), str(cwd), *map(str, command)],
        env={**(os.environ if env is None else env), "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
    )
