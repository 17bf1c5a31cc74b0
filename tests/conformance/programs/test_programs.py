"""Programs that were written for OpenAI's fine-tuning API run here, with only `base_url` and key changed.

Each is a script, run as its user would run it in an environment of its own: its packages, pinned, and none of
the project's. `make test` has the first ones, `make test-programs` all.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from tests.api.serving import KEY, ROOT, service, worker

pytestmark = pytest.mark.timeout(1800)  # nearly all of it for an installation, the first time
HERE = Path(__file__).parent
CACHE = ROOT / ".venv" / "programs"
ROWS = {"train.jsonl": 12, "valid.jsonl": 6}

FIRST = {
    "dspy_finetune.py": "dspy.txt",
    "cookbook_supervised.py": "openai.txt",
    "cookbook_preferences.py": "openai.txt",
}
OTHERS = {
    "litellm_jobs.py": "litellm.txt",
    "wandb_logger.py": "wandb.txt",
    "llama_index_engine.py": "llama-index.txt",
    "openai_command.py": "openai-1.109.1.txt",
    "openai_module.py": "openai-0.28.1.txt",
    "openai_node.cjs": "openai-node.json",
}
PROGRAMS = FIRST | OTHERS if os.environ.get("OLORA_TEST_PROGRAMS") == "all" else FIRST
"""Each script, and what pins the packages of its environment."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A service that lets programs keep their model's name, and its worker."""
    home = tmp_path_factory.mktemp("service")
    with service(home, model_aliases="gpt-4o-mini*=olora-tiny") as api, worker(home):
        yield api.port


@pytest.mark.parametrize("script", PROGRAMS)
def test_a_program_runs_to_its_end(script: str, port: int, tmp_path: Path) -> None:
    if script.endswith(".cjs") and not shutil.which("npm"):
        pytest.skip("it needs node and npm")
    folder = installed(HERE / "requirements" / PROGRAMS[script])
    interpreter = "node" if script.endswith(".cjs") else str(folder / "bin" / "python")
    write_training_files(tmp_path)
    done = subprocess.run(
        [interpreter, str(HERE / script)],
        cwd=tmp_path,
        env={**environment(port, tmp_path), "NODE_PATH": str(folder / "node_modules")},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"


def installed(pins: Path) -> Path:
    """An environment with these packages, a virtual one or a folder of npm's, made once."""
    folder = CACHE / pins.stem
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f".{pins.stem}.lock"):
        complete = folder / "complete"
        if not complete.exists() or complete.read_text() != pins.read_text():
            shutil.rmtree(folder, ignore_errors=True)
            install = install_for_node if pins.suffix == ".json" else install_for_python
            install(pins, folder)
            shutil.copyfile(pins, complete)
    return folder


def install_for_python(pins: Path, folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    pip = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "install", "-q"]
    # Modules are compiled when they are imported, and most never are.
    subprocess.run([*pip, "--disable-pip-version-check", "--no-compile", "-r", str(pins)], check=True)


def install_for_node(pins: Path, folder: Path) -> None:
    folder.mkdir()
    shutil.copyfile(pins, folder / "package.json")
    npm = ["npm", "install", "--silent", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(npm, cwd=folder, check=True)


def write_training_files(folder: Path) -> None:
    """The first rows of the shipped example, enough for a few steps."""
    for name, rows in ROWS.items():
        lines = (ROOT / "examples" / "docstrings" / name).read_text().splitlines()[:rows]
        (folder / name).write_text("\n".join(lines) + "\n")


def environment(port: int, home: Path) -> dict[str, str]:
    """What a program's user sets: the service's address and a key. Its caches go to a home of its own."""
    others = ("OLORA_", "PYTHON", "OPENAI_", "WANDB_")
    url = f"http://127.0.0.1:{port}/v1"
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(others)},
        "HOME": str(home),
        "OPENAI_BASE_URL": url,
        "OPENAI_API_BASE": url,  # its name in older programs
        "OPENAI_API_KEY": KEY,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # or it downloads prices when it is imported
    }
