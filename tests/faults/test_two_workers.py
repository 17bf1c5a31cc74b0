"""PostgreSQL, Redis and two workers: each job once, also when one of the two is killed."""

import io
import signal
import time
import zipfile
from pathlib import Path

from openai import OpenAI
from sqlalchemy import func, select

from store.models import Attempt, Model
from tests.cli.running import serving
from tests.faults.fleet import Fleet, settings_environment
from tests.rows import chat_file

JOB = {"rows": 64, "n_epochs": 6}


def test_four_jobs_are_each_done_once_although_a_worker_is_killed(production: Fleet) -> None:
    service = production.service
    production.keep(2)
    jobs = [service.submit(**JOB) for _ in range(4)]
    service.wait_for_checkpoint(jobs[0])
    victim = production.holder(jobs[0])
    victim.send(signal.SIGKILL)
    victim.process.wait()
    for job_id in jobs:
        assert service.wait_for_end(job_id).status == "succeeded"

    assert len({service.tensors(job_id) for job_id in jobs}) == 1
    assert len({tuple(service.losses(job_id)) for job_id in jobs}) == 1
    assert sorted(service.job(job_id).attempt for job_id in jobs) == [1, 1, 1, 2]
    with service.write() as session:
        assert session.scalar(select(func.count()).select_from(Model)) == 4
        assert session.scalar(select(func.count()).select_from(Attempt)) == 5


def test_the_whole_service_runs_on_them_behind_the_official_client(production: Fleet) -> None:
    variables = settings_environment(production.service.settings)
    settings = {name.removeprefix("OLORA_").lower(): value for name, value in variables.items()}
    home = Path(settings.pop("home"))
    with serving(home, "--no-worker", api_key="sk-of-this-test", **settings) as up:
        production.keep(2)
        client = OpenAI(base_url=up.url, api_key="sk-of-this-test")
        file = client.files.create(file=("train.jsonl", chat_file(64)), purpose="fine-tune")
        jobs = [
            client.fine_tuning.jobs.create(
                model="tiny",
                training_file=file.id,
                seed=7,
                hyperparameters={"n_epochs": 4, "batch_size": 4},
            )
            for _ in range(4)
        ]
        until = time.monotonic() + 120
        while any(job.finished_at is None for job in jobs) and time.monotonic() < until:
            time.sleep(0.5)
            jobs = [client.fine_tuning.jobs.retrieve(job.id) for job in jobs]
        assert [job.status for job in jobs] == ["succeeded"] * 4, up.log.read_text()
        adapters = [client.files.content(job.result_files[1]).read() for job in jobs]
    files = [zipfile.ZipFile(io.BytesIO(adapter)).read("adapter_model.safetensors") for adapter in adapters]
    assert len(set(files)) == 1
    owners = {attempt.owner for job in jobs for attempt in production.service.attempts(job.id)}
    assert len(owners) == 2
