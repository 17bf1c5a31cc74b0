"""Runs on the tiny Llama, each in a folder of its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_core.bases.loading import Base
from olora_core.progress import Progress
from olora_core.specs import TrainSpec
from olora_core.training.train import train


@pytest.fixture
def run(llama: Base, training: Path, tmp_path: Path) -> Callable[..., list[Progress]]:
    """Trains on the file's own `training` rows, unless told otherwise, and returns all updates."""

    def run_it(spec: TrainSpec, **options: Any) -> list[Progress]:
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        arguments = {"base": llama, "training": training, "validation": None, "folder": folder} | options
        return list(train(spec, **arguments))

    return run_it
