"""`examples/methods/` has a file for each method; the command line reads it and the service trains it."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from cli.train import read_run
from olora_core.specs import ADAPTER_SPECS, read_spec
from tests.cli.running import ROOT, ROWS, Serving, serving, wait_for

FOLDER = ROOT / "examples" / "methods"
METHODS = list(ADAPTER_SPECS)
SHORT = {"n_epochs": 1, "batch_size": 4, "max_steps": 3, "samples": 0, "dtype": "float32"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    with serving(tmp_path_factory.mktemp("service") / "home") as service:
        yield service


@pytest.fixture(scope="module")
def client(service: Serving) -> Iterator[OpenAI]:
    key = (service.home / "api_key").read_text().strip()
    with OpenAI(base_url=service.url, api_key=key) as client:
        yield client


@pytest.fixture(scope="module")
def training_file(client: OpenAI) -> str:
    rows = "".join(ROWS.read_text().splitlines(keepends=True)[:12]).encode()
    return client.files.create(file=("rows.jsonl", rows), purpose="fine-tune").id


def test_every_method_has_a_file() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(METHODS)


@pytest.mark.parametrize("method", METHODS)
def test_the_command_line_reads_it(method: str) -> None:
    run = read_run(FOLDER / f"{method}.yaml")
    assert (FOLDER / run.training_file).is_file()
    assert run.validation_file is not None
    assert (FOLDER / run.validation_file).is_file()
    assert read_spec(model=run.model, adapter=run.adapter, hyperparameters=run.hyperparameters)
    assert run.adapter["method"] == method
    assert (FOLDER / f"{method}.yaml").read_text().count(ADAPTER_SPECS[method].paper) == 1


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_service_trains_it_and_hands_out_its_certified_adapter(
    client: OpenAI, training_file: str, method: str
) -> None:
    job = client.fine_tuning.jobs.create(
        model="olora-tiny",
        training_file=training_file,
        seed=1,
        extra_body={"adapter": read_run(FOLDER / f"{method}.yaml").adapter, "hyperparameters": SHORT},
    )

    def ended() -> bool:
        return client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled")

    wait_for(ended, what=f"the end of the {method} job")
    job = client.fine_tuning.jobs.retrieve(job.id)
    assert job.status == "succeeded", job.error
    adapter = client.files.content(job.result_files[1])
    with zipfile.ZipFile(io.BytesIO(adapter.read())) as archive:
        names = {Path(name).name: name for name in archive.namelist()}
        manifest = json.loads(archive.read(names["manifest.json"]))
        config = json.loads(archive.read(names["adapter_config.json"]))
    assert manifest["spec"]["resolved"]["adapter"]["method"] == method
    assert manifest["certificate"]["passed"]
    assert config["peft_type"] == "LORA"
