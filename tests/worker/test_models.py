"""Checkpoints are models, and models are trained on: what a worker makes of them, and what is kept."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from sqlalchemy import select
from transformers import AutoModelForCausalLM

from store import checkpoints, fine_tuned
from store.errors import FileInUse
from store.files import get_file, purge_files
from store.models import Checkpoint, File, Job
from tests.worker.service import PROJECT, Service
from worker.supervisor.strays import remove_strays
from worker.supervisor.supervisor import Supervisor

# PEFT looks at a property that transformers has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TOKENS = torch.arange(4, 44).view(2, 20)


def kept(service: Service, job_id: str) -> list[Checkpoint]:
    """The checkpoints of a job that are models, oldest first."""
    with service.write() as session:
        rows = checkpoints.list_checkpoint_models(session, PROJECT)
    return [row for row in reversed(rows) if row.job_id == job_id]


def tidy(service: Service) -> None:
    """What the dispatcher does of it, to the end."""
    while checkpoints.finish_checkpoint(service.write, service.storage, service.settings.home):
        pass


def request_export(service: Service, checkpoint: Checkpoint) -> bool:
    with service.write.begin() as session:
        return checkpoints.request_export(session, checkpoint)


def unpacked(service: Service, file_id: str, folder: Path) -> Path:
    with service.write() as session:
        key = get_file(session, PROJECT, file_id).storage_key
    assert key is not None
    with service.storage.open(key) as stored, zipfile.ZipFile(io.BytesIO(stored.read())) as archive:
        archive.extractall(folder)
    return folder


def served(service: Service, adapter: Path) -> torch.Tensor:
    """Logits (2, 20, vocabulary) of an adapter on the tiny base, in PEFT."""
    base = AutoModelForCausalLM.from_pretrained(Path(service.settings.models_dir or "") / "tiny")
    with torch.no_grad():
        return PeftModel.from_pretrained(base.float(), adapter)(TOKENS).logits


def from_model(service: Service, job_id: str) -> dict[str, str]:
    job = service.job(job_id)
    return {"former_model": str(job.fine_tuned_model), "former_file": job.result_files[1]}


def test_the_last_epochs_are_models_whose_adapters_are_made_on_request(
    service: Service, supervisor: Supervisor, tmp_path: Path
) -> None:
    job_id = service.queue(rows=32, n_epochs=5)
    supervisor.run_until_idle()
    job = service.job(job_id)
    models = kept(service, job_id)
    assert [row.epoch for row in models] == [3, 4, 5]
    assert [row.model for row in models] == [
        f"{job.fine_tuned_model}:ckpt-step-{step}" for step in (24, 32, 40)
    ]
    before = sum(service.storage.size(key) for key in service.storage.list(f"jobs/{job_id}/checkpoints"))
    tidy(service)
    after = service.storage.list(f"jobs/{job_id}/checkpoints")
    assert sum(service.storage.size(key) for key in after) < 0.6 * before
    assert not any("optimizer" in key for key in after)
    assert [row.step for row in service.checkpoints(job_id)] == [40, 32, 24]

    last, middle = kept(service, job_id)[2], kept(service, job_id)[1]
    assert request_export(service, last)
    assert not request_export(service, last)
    assert request_export(service, middle)
    with service.write() as session:
        assert checkpoints.status_of(session, session.get_one(Checkpoint, last.seq))[0] == "exporting"
    supervisor.run_until_idle()
    for row in (last, middle):
        with service.write() as session:
            now = session.get_one(Checkpoint, row.seq)
            assert checkpoints.status_of(session, now) == ("ready", None)
        assert now.certificate is not None
        assert now.certificate["passed"] is True
        assert not request_export(service, now)
    with service.write() as session:
        files = [session.get_one(Checkpoint, row.seq).adapter_file for row in (last, middle)]
    of_last, of_middle = (unpacked(service, str(file), tmp_path / str(file)) for file in files)
    own = unpacked(service, job.result_files[1], tmp_path / "own")
    name = "adapter_model.safetensors"
    assert (of_last / name).read_bytes() == (own / name).read_bytes()
    assert not torch.equal(served(service, of_middle), served(service, own))
    assert service.warnings(job_id) == []


def test_two_dispatchers_that_reduce_a_checkpoint_at_once_lose_nothing(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = service.queue(rows=32, n_epochs=1)
    supervisor.run_until_idle()
    put, others = service.storage.put_folder, iter([True])

    def put_while_another_does_so(key: str, folder: Path) -> None:
        put(key, folder)
        if next(others, False):
            assert checkpoints.finish_checkpoint(service.write, service.storage, service.settings.home)

    monkeypatch.setattr(service.storage, "put_folder", put_while_another_does_so)
    tidy(service)
    (row,) = kept(service, job_id)
    stored = {key.rpartition("/")[0] for key in service.storage.list(f"jobs/{job_id}/checkpoints")}
    assert stored == {row.storage_key}
    remove_strays(service.write, service.storage, job_id)
    with service.write.begin() as session:
        assert checkpoints.request_export(session, row)
    supervisor.run_until_idle()
    with service.write() as session:
        assert checkpoints.status_of(session, session.get_one(Checkpoint, row.seq))[0] == "ready"


def test_a_folder_that_a_dispatcher_has_just_stored_is_no_stray(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32, max_steps=1)
    supervisor.run_until_idle()
    for name in ("9-a1-0123abcd-model", "9-a1"):
        with service.storage.writer(f"jobs/{job_id}/checkpoints/{name}/state.json") as writer:
            writer.write(b"{}")
    remove_strays(service.write, service.storage, job_id)
    left = [key for key in service.storage.list(f"jobs/{job_id}/checkpoints") if "/9-a1" in key]
    assert left == [f"jobs/{job_id}/checkpoints/9-a1-0123abcd-model/state.json"]


def test_a_setting_makes_them_at_the_end_of_each_epoch(
    service: Service, supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = service.settings.model_copy(update={"export_checkpoints": "at_epoch_end", "kept_epochs": 2})
    monkeypatch.setattr(supervisor, "settings", changed)
    job_id = service.queue(rows=32, n_epochs=3)
    supervisor.run_until_idle()
    assert [row.epoch for row in kept(service, job_id)] == [2, 3]
    with service.write() as session:
        assert [checkpoints.status_of(session, row)[0] for row in kept(service, job_id)] == ["ready"] * 2


def test_what_is_no_model_goes_with_the_end_of_its_job_and_the_rest_with_its_model(
    service: Service, supervisor: Supervisor
) -> None:
    job_id = service.queue(rows=32, n_epochs=2)
    supervisor.run_until_idle()
    for row in service.checkpoints(job_id):
        assert row.epoch is not None or row.model is None
    tidy(service)
    assert [row.epoch for row in service.checkpoints(job_id)] == [2, 1]
    request_export(service, kept(service, job_id)[0])
    supervisor.run_until_idle()
    name = str(service.job(job_id).fine_tuned_model)
    with service.write.begin() as session:
        fine_tuned.delete_model(session, PROJECT, name)
    assert kept(service, job_id) == []
    tidy(service)
    purge_files(service.write, service.storage)
    assert service.storage.list(f"jobs/{job_id}/checkpoints") == []
    with service.write() as session:
        export = session.scalars(select(Job).where(Job.kind == "export").order_by(Job.seq.desc())).first()
    assert export is not None
    assert not [key for key in service.storage.list(f"jobs/{export.id}") if "adapter.zip" in key]


def test_a_model_is_trained_on_and_cannot_be_deleted_meanwhile(
    service: Service, supervisor: Supervisor, tmp_path: Path
) -> None:
    first = service.queue(rows=32, n_epochs=1)
    supervisor.run_until_idle()
    former = from_model(service, first)
    second = service.queue(rows=32, n_epochs=1, former=former)
    with service.write.begin() as session, pytest.raises(FileInUse, match=second):
        fine_tuned.delete_model(session, PROJECT, former["former_model"])
    supervisor.run_until_idle()
    job = service.job(second)
    assert (job.status, job.error) == ("succeeded", None)
    [note] = [event for event in service.events(second) if "former model" in event.message]
    assert note.data == {"exported_rank": 16, "goes_on": True}
    assert job.fine_tuned_model == f"ft:tiny:olora::{second[-8:]}"
    manifest = json.loads(service.adapter(second)["manifest.json"])
    assert manifest["trained_on_from"]
    third = service.queue(
        rows=32, n_epochs=1, former=from_model(service, second), adapter={"method": "lora", "rank": 4}
    )
    supervisor.run_until_idle()
    config = json.loads(service.adapter(third)["adapter_config.json"])
    assert config["r"] == 20
    with service.write.begin() as session:
        fine_tuned.delete_model(session, PROJECT, former["former_model"])


def test_a_checkpoint_is_trained_on(service: Service, supervisor: Supervisor) -> None:
    first = service.queue(rows=32, n_epochs=3)
    supervisor.run_until_idle()
    tidy(service)
    row = kept(service, first)[0]
    former = {"former_model": str(row.model), "former_checkpoint": row.id}
    second = service.queue(rows=32, n_epochs=1, former=former, adapter={"method": "lora"})
    supervisor.run_until_idle()
    job = service.job(second)
    assert (job.status, job.error) == ("succeeded", None)
    links = json.loads(service.adapter(second)["manifest.json"])["links"]
    assert [link["adapter"]["method"] for link in links] == ["olora", "lora"]


@pytest.mark.parametrize("uneven", [False, True])
def test_an_adapter_of_peft_is_trained_on_as_plain_lora(
    service: Service, supervisor: Supervisor, tmp_path: Path, uneven: bool
) -> None:
    torch.manual_seed(1)
    base = AutoModelForCausalLM.from_pretrained(Path(service.settings.models_dir or "") / "tiny").float()
    patterns = {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"q_proj": 5}} if uneven else {}
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "down_proj"], **patterns)
    model = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    with torch.no_grad():
        wanted = model.eval()(TOKENS).logits
    model.save_pretrained(tmp_path / "peft")
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for path in (tmp_path / "peft").iterdir():
            archive.write(path, f"my-adapter/{path.name}")
    file_id = service.upload(packed.getvalue(), purpose="fine-tune-adapter")
    # A rate of nearly 0: what is exported is what it started from.
    job_id = service.queue(
        rows=32,
        max_steps=1,
        learning_rate=1e-12,
        former={"former_model": file_id, "former_file": file_id},
        adapter={"method": "lora", "rank": 2},
    )
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert (job.status, job.error) == ("succeeded", None)
    own = unpacked(service, job.result_files[1], tmp_path / "own")
    torch.testing.assert_close(served(service, own), wanted, atol=1e-5, rtol=1e-5)
    assert json.loads((own / "adapter_config.json").read_text())["r"] == 8
    assert job.fine_tuned_model == f"ft:tiny:olora::{job_id[-8:]}"


def zip_of(**files: bytes) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "."), content)
    return packed.getvalue()


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"no zip", "zip cannot be used"),
        (zip_of(**{"../outside": b"x"}), "would lie outside of its folder"),
        (zip_of(a=b"\0" * (150 * 2**20)), "unpacked it has more than"),
        (zip_of(adapter_config__json=b"{}", adapter_model__safetensors=b""), "cannot be used"),
        (
            zip_of(adapter_config__json=b'{"peft_type": "IA3"}', adapter_model__safetensors=b"x"),
            "cannot be used",
        ),
    ],
    ids=["text", "outside", "bomb", "empty", "list"],
)
def test_an_adapter_that_cannot_be_used_fails_the_job_with_a_sentence(
    service: Service, supervisor: Supervisor, data: bytes, problem: str
) -> None:
    file_id = service.upload(data, purpose="fine-tune-adapter")
    job_id = service.queue(rows=32, former={"former_model": file_id, "former_file": file_id})
    supervisor.run_until_idle()
    job = service.job(job_id)
    assert job.status == "failed"
    assert job.error is not None
    assert problem in job.error["message"]
    assert job.error["param"] == "model"


def rows_of(service: Service, kind: Any) -> list[Any]:
    with service.write() as session:
        return list(session.scalars(select(kind)))


def test_exports_are_no_jobs_and_their_files_are_the_checkpoints(service: Service) -> None:
    exports = [job for job in rows_of(service, Job) if job.kind == "export"]
    assert exports
    named = {row.adapter_file for row in rows_of(service, Checkpoint)}
    for job in exports:
        assert set(job.result_files) <= named
    assert all(file.purpose != "fine-tune" for file in rows_of(service, File) if file.id in named)
