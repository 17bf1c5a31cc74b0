"""How a worker is started, and its trainer's environment."""

import os
from pathlib import Path

import pytest

from store.settings import read_settings
from worker.launch import devices_listed, visible_gpus, worker_command, worker_environment
from worker.protocol import FENCED, Ended
from worker.supervisor.trainer_process import trainer_environment

LISTING = """\
GPU 0: NVIDIA H200 (UUID: GPU-11111111-aaaa)
GPU 1: NVIDIA H200 (UUID: GPU-22222222-bbbb)
  MIG 3g.71gb     Device  0: (UUID: MIG-33333333-cccc)
  MIG 1g.18gb     Device  1: (UUID: MIG-44444444-dddd)
GPU 2: NVIDIA H200 (UUID: GPU-55555555-eeee)
"""


def test_a_divided_gpu_counts_as_its_instances() -> None:
    assert devices_listed(LISTING) == [
        "GPU-11111111-aaaa",
        "MIG-33333333-cccc",
        "MIG-44444444-dddd",
        "GPU-55555555-eeee",
    ]


def test_the_operators_choice_of_gpus_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-2, 0")
    assert visible_gpus() == ["GPU-2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert visible_gpus() == []


def test_a_machine_without_the_drivers_program_has_no_gpus(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert visible_gpus() == []


def test_the_drivers_program_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"\n')
    program.chmod(0o755)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert visible_gpus() == ["GPU-1"]


def test_a_worker_has_one_slot_and_a_name(tmp_path: Path) -> None:
    command = worker_command(read_settings(home=tmp_path, log_level="warning"), name="worker-1")
    assert command[1:6] == ["-m", "celery", "-A", "worker.main", "worker"]
    options = " ".join(command[6:])
    assert "-c 1" in options
    assert "-n worker-1@%h" in options
    assert "-l warning" in options


def test_a_worker_learns_its_device_and_its_parent() -> None:
    environment = worker_environment({"PATH": "/bin", "OLORA_PORT": "1"}, parent=17, gpus="GPU-1")
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert environment["OLORA_DIE_WITH_PARENT"] == "17"
    assert environment["OLORA_PORT"] == "1"


def test_a_trainer_knows_the_machine_and_none_of_the_services_addresses_and_keys() -> None:
    environment = trainer_environment(
        {
            "PATH": "/bin",
            "CUDA_VISIBLE_DEVICES": "GPU-1",
            "OMP_NUM_THREADS": "2",
            "OLORA_API_KEY": "canary",
            "OLORA_DATABASE_URL": "postgresql://olora:canary@host/olora",
            "OLORA_BROKER_URL": "redis://:canary@host",
            "HF_TOKEN": "canary",
            "AWS_SECRET_ACCESS_KEY": "canary",
        }
    )
    assert "canary" not in str(environment)
    assert environment["PATH"] == "/bin"
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert environment["OMP_NUM_THREADS"] == "2"
    assert environment["HF_HUB_OFFLINE"] == environment["TRANSFORMERS_OFFLINE"] == "1"


@pytest.mark.parametrize(
    ("code", "words"),
    [(-9, "out of memory"), (-11, "SIGSEGV"), (FENCED, "lease"), (3, "exit code 3")],
)
def test_the_end_of_a_trainer_is_a_sentence(code: int, words: str) -> None:
    assert words in Ended(code).sentence


def test_training_threads_sleep_while_they_wait_unless_the_machine_says_otherwise() -> None:
    assert trainer_environment({})["OMP_WAIT_POLICY"] == "PASSIVE"
    assert trainer_environment({"OMP_WAIT_POLICY": "ACTIVE"})["OMP_WAIT_POLICY"] == "ACTIVE"


def test_the_trainers_tokenizer_uses_the_cores_it_may_use() -> None:
    environment = trainer_environment({})
    assert environment["TOKENIZERS_PARALLELISM"] == "true"
    assert environment["RAYON_NUM_THREADS"] == str(min(32, len(os.sched_getaffinity(0))))
    assert trainer_environment({"RAYON_NUM_THREADS": "3"})["RAYON_NUM_THREADS"] == "3"
