"""The real model, and runs on it. `make test-real` says where it is; without it these tests do not exist."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from examples import quickstart_real
from olora_core.bases.loading import Base, load_base
from olora_core.bases.precision import DTYPES

from .runs import ROWS, Run, run_of, spec_for

FOLDER = os.environ.get("OLORA_TEST_REAL_MODEL")
collect_ignore_glob = [] if FOLDER else ["test_*"]


@pytest.fixture(scope="session", autouse=True)
def _all_cores() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder() -> Path:
    return Path(FOLDER or "")


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first orders."""
    path = tmp_path_factory.mktemp("rows") / "training.jsonl"
    lines = quickstart_real.TRAINING.read_text().splitlines(keepends=True)[:ROWS]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="session")
def say() -> Callable[[str], None]:
    """Prints what a test has measured beside its name; pytest is run with `--capture=no`."""
    return lambda sentence: print(f"  {sentence} ", end="", flush=True)  # noqa: T201


@pytest.fixture(scope="module", params=list(DTYPES))
def base(request: pytest.FixtureRequest, folder: Path) -> Base:
    """The model, loaded once in each dtype."""
    return load_base(folder, name="real", dtype=DTYPES[request.param])


@pytest.fixture(scope="module")
def dtype(base: Base) -> str:
    return str(base.dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def run(base: Base, dtype: str, training: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return run_of(base, spec_for(dtype), training, tmp_path_factory.mktemp("run"))
