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
LAST_WORDS = ("stopped", "failed", "crashed")


@pytest.fixture(scope="module")
def trainer() -> Iterator[TrainerProcess]:
    """One for all tests of this file, which is the point of it."""
    trainer = TrainerProcess("default")
    yield trainer
    trainer.close()


class Desk:
    """Gives out orders in a folder and collects what comes back."""

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
        **hyperparameters: Any,
    ) -> str:
        """Has a job trained. Returns the name of its run."""
        self.orders += 1
        run, training = f"{self.folder.name}-{self.orders}", self.folder / f"{self.orders}.jsonl"
        training.write_bytes(data or chat_file(32))
        if work is None:
            work = self.folder / f"work-{self.orders}"
            work.mkdir()
        spec = read_spec(
            model="tiny", hyperparameters={"batch_size": 4, "n_epochs": 2, "samples": 0, **hyperparameters}
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
        self.trainer.say(order.as_message())
        return run

    def wish(self, run: str, what: str) -> None:
        self.trainer.say({"wish": {"run": run, "what": what}})

    def hear(self) -> dict[str, Any]:
        message = self.trainer.messages.get(timeout=ANSWER_SECONDS)
        assert not isinstance(message, Ended), message
        return message

    def hear_step(self, step: int) -> None:
        while self.hear().get("progress", {}).get("step") != step:
            pass

    def hear_all(self) -> list[dict[str, Any]]:
        """Up to and with the last word."""
        messages = []
        while True:
            messages.append(self.hear())
            kind = messages[-1].get("progress", {}).get("kind")
            if kind == "Finished" or any(word in messages[-1] for word in LAST_WORDS):
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


def test_a_job_is_told_from_its_beginning_to_its_end(desk: Desk) -> None:
    run = desk.order()
    messages = desk.hear_all()
    assert list(messages[0]) == ["ready"]
    assert messages[1] == {"accepted": {"run": run}}
    assert "loading" in phases(messages)
    told = kinds(messages)
    assert told.index("Resolved") < told.index("Step")
    assert told.count("Step") == 16
    assert told[-1] == "Finished"
    assert messages[-1]["progress"]["certificate"]["passed"] is True


def test_the_next_job_finds_the_base_loaded_and_pristine(desk: Desk) -> None:
    desk.order()
    first = desk.hear_all()
    desk.order(learning_rate=1e-2, n_epochs=1)
    desk.hear_all()
    desk.order()
    third = desk.hear_all()
    assert "loading" not in phases(first) | phases(third)
    assert tensors(first) == tensors(third)


def test_the_next_job_on_the_same_data_starts_without_tokenising(desk: Desk, tmp_path: Path) -> None:
    desk.order(tokens=tmp_path / "tokens")
    first = desk.hear_all()
    desk.order(tokens=tmp_path / "tokens")
    again = desk.hear_all()
    assert "tokenising" in phases(first)
    assert "tokenising" not in phases(again)
    assert tensors(again) == tensors(first)


def test_an_exchanged_base_is_loaded_anew(desk: Desk, base: Path) -> None:
    stat = (base / "model.safetensors").stat()
    os.utime(base / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    desk.order(n_epochs=1)
    assert "loading" in phases(desk.hear_all())


def test_a_base_that_is_quantised_otherwise_is_loaded_anew(desk: Desk) -> None:
    told = []
    for quantization in ("none", "torchao-int8", "torchao-int8", "none"):
        desk.order(n_epochs=1, quantization=quantization)
        told.append(desk.hear_all())
    assert ["loading" in phases(messages) for messages in told[1:]] == [True, False, True]
    assert tensors(told[0]) == tensors(told[3])
    assert tensors(told[1]) == tensors(told[2]) != tensors(told[0])


def test_a_cancel_stops_at_the_next_step(desk: Desk) -> None:
    run = desk.order(n_epochs=50)
    desk.hear_step(3)
    desk.wish(run, "cancel")
    began = time.monotonic()
    messages = desk.hear_all()
    assert messages[-1] == {"stopped": {"wish": "cancel"}}
    assert "Saved" not in kinds(messages)
    assert time.monotonic() - began < 3


def test_a_released_job_goes_on_elsewhere_to_the_same_bytes(desk: Desk) -> None:
    job = {"data": chat_file(128), "n_epochs": 2}
    desk.order(**job)
    uninterrupted = desk.hear_all()
    run = desk.order(**job)
    desk.hear_step(5)
    desk.wish(run, "release")
    messages = desk.hear_all()
    assert messages[-1] == {"stopped": {"wish": "release"}}
    saved = messages[-2]["progress"]
    assert saved["kind"] == "Saved"
    assert 5 <= saved["step"] < 32, "not at once, but at the epoch's end"
    desk.order(**job, resume=saved["folder"])
    resumed = desk.hear_all()
    assert kinds(resumed).count("Step") == 64 - saved["step"]
    assert tensors(resumed) == tensors(uninterrupted)


def test_a_wish_about_an_earlier_job_is_not_heard(desk: Desk) -> None:
    desk.order(n_epochs=1)
    desk.wish("an-earlier-job", "cancel")
    assert kinds(desk.hear_all())[-1] == "Finished"


def test_a_file_that_cannot_be_trained_on_is_a_sentence_with_its_line(desk: Desk) -> None:
    desk.order(data=chat_file(3) + b'{"messages": []}\n')
    failed = desk.hear_all()[-1]["failed"]
    assert failed["code"] == "invalid_training_file"
    assert "4" in failed["message"]
    assert "Traceback" not in failed["message"]


def test_a_folder_that_is_no_base_model_is_a_sentence(desk: Desk, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    desk.base = tmp_path / "empty"
    desk.order()
    failed = desk.hear_all()[-1]["failed"]
    assert failed["code"] == "model_not_available"
    assert "config.json" in failed["message"]


def test_an_unexpected_error_is_a_short_sentence_and_the_end_of_the_process(
    base: Path, tmp_path: Path, trainer: TrainerProcess
) -> None:
    """Last, for it ends the trainer: its working folder is no folder."""
    desk = Desk(trainer, base, tmp_path)
    (tmp_path / "work").touch()
    desk.order(work=tmp_path / "work")
    crashed = desk.hear_all()[-1]["crashed"]["message"]
    assert "NotADirectoryError" in crashed
    assert "\n" not in crashed
    assert trainer.messages.get(timeout=10) == Ended(1)
