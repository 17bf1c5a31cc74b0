"""Everything that must be seen on a GPU, in one command of eight minutes.

    python -m bench.gpu
    python -m bench.gpu --wheels wheels --out gpu.jsonl --budget-seconds 480
    python -m bench.gpu --sections speed,start
    python -m bench.gpu --tiny --device cpu        # smoke test: every path, in small

The sections run one after another, the most valuable first, each in a process of its own with a limit of its
own: a crash or a hang costs one section. What a section does not use goes to those after it. Every result is
printed and appended to --out as it comes, so a run that is cut off keeps what it has. A table ends the run.
The exit status is 1 when a promise was broken or a section did not end by itself.

Nothing needs to be installed: the children's path begins with the checkout and the wheels of --wheels
(`bench/gpu_wheels.sh` collects them), unpacked into a temporary folder.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .report import ROOT, append, line_of

SECTIONS = {"promises": 100, "speed": 200, "quantised": 40, "start": 40, "service": 60, "memory": 40}
"""Their limits in seconds, for a budget of the sum."""
GRACE_SECONDS = 5.0
"""A section keeps to its limit by itself; it is killed so much later."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "torchao", "flash-attn")


def run_section(name: str, seconds: float, asked: argparse.Namespace, environment: dict[str, str]) -> None:
    """Runs one section to its end or its limit; a crash or a hang becomes a record of its own."""
    command = [sys.executable, "-m", f"bench.gpu.{name}", "--device", asked.device, "--out", str(asked.out)]
    # Its own imports count too, hence a time and not a duration.
    command += ["--until", str(time.monotonic() + seconds), *(["--tiny"] if asked.tiny else [])]
    print(f"\n== {name} ({seconds:.0f} s at most)", flush=True)
    before = len(records(asked.out))
    # In a session of its own, so that whatever it starts ends with it.
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        status: int | None = process.wait(seconds + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        status = None
    finally:
        end_group(process)
    has_failed = any(record.get("passed") is False for record in records(asked.out)[before:])
    if status == 0 or (status == 1 and has_failed):
        return
    why = f"exit status {status}" if status is not None else f"killed at its limit of {seconds:.0f} s"
    record = {"section": name, "name": "the section itself", "passed": False, "figures": {"why": why}}
    print(f"  {line_of(record)}", flush=True)
    append(asked.out, record)


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Kills the process and all that it left in its session."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


def records(out: Path) -> list[dict[str, Any]]:
    """All records of a file; a line that a kill cut short is left out."""
    found = []
    for line in out.read_text().splitlines() if out.exists() else ():
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def unpack(wheels: Path, folder: Path) -> None:
    """Installs every wheel below `wheels` into `folder`. Raises SystemExit when pip cannot."""
    files = sorted(map(str, wheels.glob("*.whl")))
    if not files:
        raise SystemExit(f"--wheels {wheels} holds no wheel: collect them with bench/gpu_wheels.sh {wheels}.")
    options = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(folder), *files]
    if subprocess.run(command).returncode:
        raise SystemExit(f"The wheels of {wheels} could not be unpacked; pip says why above.")


def environment_of(packages: Path | None) -> dict[str, str]:
    """The children's: the checkout and the unpacked wheels on their path, no hub, no `OLORA_` settings."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("OLORA_")}
    paths = [str(ROOT), *([str(packages)] if packages else []), inherited.get("PYTHONPATH", "")]
    return {
        "OMP_WAIT_POLICY": "PASSIVE",  # as the service starts its trainer
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **inherited,
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PYTHONUNBUFFERED": "1",
    }


def machine(asked: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to. In a process of its own: this one starts no CUDA context."""
    card = "CPU"
    if asked.device == "cuda":
        code = (
            "import torch; p = torch.cuda.get_device_properties(0); "
            "print(p.name, f'{p.total_memory / 2**30:.0f} GiB, CUDA', torch.version.cuda)"
        )
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if found.returncode:
            last = (found.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise SystemExit(f"No GPU is to be had ({last}). Say --device cpu --tiny for a smoke test.")
        card = found.stdout.strip()
    return {
        "card": card,
        "cores": os.cpu_count(),
        "python": sys.version.split()[0],
        **{name: found for name in PACKAGES if (found := installed(name))},
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "command": f"python -m bench.gpu {' '.join(sys.argv[1:])}".rstrip(),
    }


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def table(found: Iterable[dict[str, Any]]) -> str:
    """One line a record, section by section, and how many promises were kept."""
    found = list(found)
    lines = ["", "| section | result |", "|---|---|"]
    lines += [f"| {record['section']} | {line_of(record).replace('|', '/')} |" for record in found]
    kept = sum(record.get("passed") is True for record in found)
    broken = sum(record.get("passed") is False for record in found)
    skipped = sum("skipped" in record for record in found)
    return "\n".join([*lines, "", f"{kept} checks passed, {broken} failed, {skipped} skipped"])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--sections", default=",".join(SECTIONS), help="names with commas; default: all")
    parser.add_argument("--budget-seconds", type=float, default=float(sum(SECTIONS.values())))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smoke test with the smallest shapes")
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what this machine lacks")
    parser.add_argument("--out", type=Path, default=Path("gpu.jsonl"), help="file to append JSON lines to")
    asked = parser.parse_args(arguments)
    asked.out = asked.out.resolve()
    names = [name for name in asked.sections.split(",") if name]
    if unknown := [name for name in names if name not in SECTIONS]:
        parser.error(f"--sections: no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    before = len(records(asked.out))
    until = time.monotonic() + asked.budget_seconds
    with tempfile.TemporaryDirectory(prefix="bench-gpu-wheels-") as folder:
        if asked.wheels:
            unpack(asked.wheels, Path(folder))
        environment = environment_of(Path(folder) if asked.wheels else None)
        header = {"section": "machine", "name": "this machine", "figures": machine(asked)}
        print(line_of(header), flush=True)
        append(asked.out, header)
        for i, name in enumerate(names):
            # Each has its share of what is left, by the limits above.
            share = SECTIONS[name] / sum(SECTIONS[later] for later in names[i:])
            run_section(name, max(1.0, share * (until - time.monotonic())), asked, environment)
    found = records(asked.out)[before:]
    print(table(found), flush=True)
    raise SystemExit(1 if any(record.get("passed") is False for record in found) else 0)


if __name__ == "__main__":
    main()
