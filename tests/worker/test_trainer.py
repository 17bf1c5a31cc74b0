"""The trainer process: one job after another on a warm, pristine base."""

import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from olora_core.specs import read_spec
from tests.rows import chat_file
from worker.protocol import Ended, Order
from worker.supervisor.trainer_process import TrainerProcess

ANSWER_SECONDS = 60.0
FINAL = ("stopped", "failed", "crashed")


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    """Shared by all tests of this file, to test that it stays usable."""
    trainer = TrainerProcess("default")
    yield trainer
    trainer.close()


class Desk:
    """Sends orders and receives messages, as a supervisor does."""

    def __init__(self, trainer: TrainerProcess, base: Path, folder: Path) -> None:
        self.trainer = trainer
        self.base = base
        self.folder = folder
        self.orders = 0

    def order(
        self,
        *,
        data: bytes | None = None,
        resume: str | None = None,
        work: Path | None = None,
        tokens: Path | None = None,
        columns: dict[str, str] | None = None,
        **hyperparameters: Any,
    ) -> str:
        """Sends an order for a job. Returns the name of its run."""
        self.orders += 1
        run, training = f"{self.folder.name}-{self.orders}", self.folder / f"{self.orders}.jsonl"
        training.write_bytes(data or chat_file(32))
        if work is None:
            work = self.folder / f"work-{self.orders}"
            work.mkdir()
        spec = read_spec(
            model="tiny",
            hyperparameters={"batch_size": 4, "n_epochs": 2, "samples": 0, **hyperparameters},
            columns=columns,
        )
        order = Order(
            run=run,
            spec=spec.model_dump(mode="json"),
            base=str(self.base),
            training=str(training),
            validation=None,
            folder=str(work),
            resume=resume,
            checkpoint_seconds=3600,
            deadline=time.monotonic() + 300,
            tokens=str(tokens) if tokens else None,
        )
        self.trainer.send(order.as_message())
        return run

    def stop(self, run: str, request: str) -> None:
        self.trainer.send({"stop": {"run": run, "request": request}})

    def receive(self) -> dict[str, Any]:
        message = self.trainer.messages.get(timeout=ANSWER_SECONDS)
        assert not isinstance(message, Ended), message
        return message

    def receive_until_step(self, step: int) -> None:
        while self.receive().get("progress", {}).get("step") != step:
            pass

    def receive_all(self) -> list[dict[str, Any]]:
        """Everything up to the job's final message."""
        messages = []
        while True:
            messages.append(self.receive())
            kind = messages[-1].get("progress", {}).get("kind")
            if kind == "Finished" or any(name in messages[-1] for name in FINAL):
                return messages


@pytest.fixture
def base(models_dir: Path) -> Path:
    return models_dir / "tiny"


@pytest.fixture
def desk(trainer: TrainerProcess, base: Path, tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(trainer, base, tmp_path)
    yield desk
    with pytest.raises(queue.Empty):
        trainer.messages.get(timeout=0.1)


def kinds(messages: list[dict[str, Any]]) -> list[str]:
    return [message["progress"]["kind"] for message in messages if "progress" in message]


def phases(messages: list[dict[str, Any]]) -> set[str]:
    return {m["progress"]["name"] for m in messages if m.get("progress", {}).get("kind") == "Phase"}


def tensors(messages: list[dict[str, Any]]) -> bytes:
    finished = messages[-1]["progress"]
    return (Path(finished["folder"]) / "adapter_model.safetensors").read_bytes()


def test_a_job_is_reported_from_beginning_to_end(desk: Desk) -> None:
    run = desk.order()
    messages = desk.receive_all()
    assert list(messages[0]) == ["ready"]
    assert messages[1] == {"accepted": {"run": run}}
    assert "loading" in phases(messages)
    items = kinds(messages)
    assert items.index("Resolved") < items.index("Step")
    assert items.count("Step") == 16
    assert items[-1] == "Finished"
    assert messages[-1]["progress"]["certificate"]["passed"] is True


def test_the_next_job_finds_the_base_loaded_and_pristine(desk: Desk) -> None:
    desk.order()
    first = desk.receive_all()
    desk.order(learning_rate=1e-2, n_epochs=1)
    desk.receive_all()
    desk.order()
    third = desk.receive_all()
    assert "loading" not in phases(first) | phases(third)
    assert tensors(first) == tensors(third)


def test_the_next_job_on_the_same_data_starts_without_tokenising(desk: Desk, tmp_path: Path) -> None:
    desk.order(tokens=tmp_path / "tokens")
    first = desk.receive_all()
    desk.order(tokens=tmp_path / "tokens")
    again = desk.receive_all()
    assert "tokenising" in phases(first)
    assert "tokenising" not in phases(again)
    assert tensors(again) == tensors(first)


def test_a_replaced_base_is_loaded_again(desk: Desk, base: Path) -> None:
    stat = (base / "model.safetensors").stat()
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    desk.order(n_epochs=1)
    assert "loading" in phases(desk.receive_all())


def test_a_base_with_another_quantisation_is_loaded_again(desk: Desk) -> None:
    runs = []
    for quantization in ("none", "torchao-int8", "torchao-int8", "none"):
        desk.order(n_epochs=1, quantization=quantization)
        runs.append(desk.receive_all())
    assert ["loading" in phases(messages) for messages in runs[1:]] == [True, False, True]
    assert tensors(runs[0]) == tensors(runs[3])
    assert tensors(runs[1]) == tensors(runs[2]) != tensors(runs[0])


def test_a_cancel_stops_at_the_next_step(desk: Desk) -> None:
    run = desk.order(n_epochs=50)
    desk.receive_until_step(3)
    desk.stop(run, "cancel")
    began = time.monotonic()
    messages = desk.receive_all()
    assert messages[-1] == {"stopped": {"request": "cancel"}}
    assert "Saved" not in kinds(messages)
    assert time.monotonic() - began < 3


def test_a_released_job_resumes_elsewhere_to_the_same_bytes(desk: Desk) -> None:
    job = {"data": chat_file(128), "n_epochs": 2}
    desk.order(**job)
    uninterrupted = desk.receive_all()
    run = desk.order(**job)
    desk.receive_until_step(5)
    desk.stop(run, "release")
    messages = desk.receive_all()
    assert messages[-1] == {"stopped": {"request": "release"}}
    saved = messages[-2]["progress"]
    assert saved["kind"] == "Saved"
    assert 5 <= saved["step"] < 32, "not at once, but at the epoch's end"
    desk.order(**job, resume=saved["folder"])
    resumed = desk.receive_all()
    assert kinds(resumed).count("Step") == 64 - saved["step"]
    assert tensors(resumed) == tensors(uninterrupted)


def test_a_stop_request_for_an_earlier_job_is_ignored(desk: Desk) -> None:
    desk.order(n_epochs=1)
    desk.stop("an-earlier-job", "cancel")
    assert kinds(desk.receive_all())[-1] == "Finished"


def test_a_file_that_cannot_be_trained_on_is_a_sentence_with_its_line(desk: Desk) -> None:
    desk.order(data=chat_file(3) + b'{"messages": []}\n')
    failed = desk.receive_all()[-1]["failed"]
    assert failed["code"] == "invalid_training_file"
    assert "4" in failed["message"]
    assert "Traceback" not in failed["message"]


def test_a_mapping_is_checked_where_the_file_is_read(desk: Desk) -> None:
    data = b"question,answer\n" + b"".join(b"%d?,%d\n" % (n, n) for n in range(12))
    desk.order(data=data, columns={"prompt": "question", "completion": "reply"})
    failed = desk.receive_all()[-1]["failed"]
    assert failed["code"] == "invalid_training_file"
    assert "no column 'reply'" in failed["message"]
    desk.order(data=data, columns={"prompt": "question", "completion": "answer"}, n_epochs=1)
    assert kinds(desk.receive_all())[-1] == "Finished"


def test_a_folder_that_is_no_base_model_is_a_sentence(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    desk.base = tmp_path / "empty"
    desk.order()
    failed = desk.receive_all()[-1]["failed"]
    assert failed["code"] == "model_not_available"
    assert "config.json" in failed["message"]


def test_an_unexpected_error_is_a_short_sentence_and_the_end_of_the_process(
    base: Path, tmp_path: Path, trainer: TrainerProcess
) -> None:
    """Last, for it ends the trainer: its working folder is no folder."""
    desk = Desk(trainer, base, tmp_path)
    (tmp_path / "work").touch()
    desk.order(work=tmp_path / "work")
    crashed = desk.receive_all()[-1]["crashed"]["message"]
    assert "NotADirectoryError" in crashed
    assert "\n" not in crashed
    assert trainer.messages.get(timeout=10) == Ended(1)
