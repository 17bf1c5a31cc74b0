"""Builds a stage of the Dockerfile in a folder and a clean virtual environment, without a container engine.

COPY, ENV, WORKDIR, `RUN pip …` and CMD are executed. Instructions that only make sense in an image (users,
ports) are skipped; any other is an error, so that the Dockerfile cannot diverge from this.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import venv
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ONLY_IN_AN_IMAGE = ("USER", "EXPOSE", "HEALTHCHECK")
INSTALL_SECONDS = 280


@dataclass
class Image:
    """A built stage: its folder, environment and start command."""

    app: Path
    environment: dict[str, str]
    command: list[str] = field(default_factory=list)

    def path_of(self, program: str) -> str:
        found = shutil.which(program, path=self.environment["PATH"])
        assert found, f"the image has no {program}"
        return found

    def python(self, code: str) -> str:
        return subprocess.run(
            [self.path_of("python"), "-c", code],
            cwd=self.app,
            env=self.environment,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()


def instructions(stage: str) -> list[tuple[str, str]]:
    """(instruction, rest) pairs of the stage and, before them, of the stages it is built from."""
    text = (ROOT / "Dockerfile").read_text()
    text = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    stages: dict[str, list[tuple[str, str]]] = {}
    current: list[tuple[str, str]] = []
    for line in filter(None, map(str.strip, text.splitlines())):
        word, rest = line.split(None, 1)
        if word == "FROM":
            source, _, name = rest.split()
            current = stages[name] = list(stages.get(source, []))
        elif stages:
            current.append((word, rest))
    return stages[stage]


def build(stage: str, folder: Path) -> Image:
    """Builds in `folder`, with the packages and pins of the Dockerfile."""
    venv.create(folder / "venv", with_pip=True)
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("OLORA_", "VIRTUAL_ENV", "PYTHON"))}
    image = Image(
        folder / "app", inherited | {"PATH": f"{folder / 'venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    )
    image.app.mkdir(parents=True)
    for word, rest in instructions(stage):
        _execute(image, word, rest)
    return image


def _execute(image: Image, word: str, rest: str) -> None:
    if word == "COPY":
        *sources, target = rest.split()
        for source in sources:
            _copy(ROOT / source, image.app / target)
    elif word in ("ENV", "ARG"):
        for pair in shlex.split(rest):
            name, _, value = pair.partition("=")
            image.environment.setdefault(name, value)
    elif word == "RUN":
        _run(image, re.sub(r"^--mount=\S+\s+", "", rest))
    elif word == "CMD":
        image.command = json.loads(rest)
    elif word == "WORKDIR":
        assert rest == "/app"
    else:
        assert word in ONLY_IN_AN_IMAGE, f"{word} {rest} is not known here"


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def _run(image: Image, command: str) -> None:
    if command.startswith("useradd "):
        return
    assert command.startswith("pip install "), f"RUN {command} is not known here"
    done = subprocess.run(
        command,
        shell=True,
        cwd=image.app,
        env=image.environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=INSTALL_SECONDS,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
