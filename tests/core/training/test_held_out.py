"""A run with a validation share is the run whose two files hold the same rows."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from olora_core.bases.loading import Base
from olora_core.errors import DataError, SpecError
from olora_core.progress import Evaluated, Finished, Note, Progress, Samples, Saved, Step, result_of
from olora_core.specs import TrainSpec, check_validation
from olora_core.specs.identity import identity_text
from olora_core.training.data import Data, read_data
from olora_core.training.train import train

from ..runs import chat_rows, one, spec_for, write_rows

ROWS = [row | {"user": f"u{i % 7}"} for i, row in enumerate(chat_rows(24))]


def with_share(spec: TrainSpec, share: float = 0.25, group_by: str | None = None) -> TrainSpec:
    return spec.model_copy(update={"validation_share": share, "group_by": group_by})


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture
def cut(llama: Base, training: Path) -> Callable[..., Data]:
    def read(**options: Any) -> Data:
        return result_of(read_data(with_share(spec_for(), **options), llama, training, None))

    return read


@pytest.mark.parametrize("group_by", [None, "user"])
def test_it_is_the_run_with_two_files_of_the_same_rows(llama, training, tmp_path, cut, group_by) -> None:
    data = cut(group_by=group_by)
    files = [
        write_rows(tmp_path / f"{role}.jsonl", [ROWS[line - 1] for line in examples.lines])
        for role, examples in (("training", data.training), ("validation", data.validation))
    ]
    spec = spec_for(eval_steps=2, early_stopping_patience=9)
    apart = list(train(spec, llama, *files, tmp_path / "apart"))
    together = list(train(with_share(spec, group_by=group_by), llama, training, None, tmp_path / "together"))
    assert told(together) == told(apart)
    assert one(Finished, together).metrics["valid_loss_after"] is not None
    names = ("adapter_model.safetensors",)
    for name in names:
        written = [(one(Finished, updates).folder / name).read_bytes() for updates in (together, apart)]
        assert written[0] == written[1]


def told(updates: list[Progress]) -> list[tuple[Any, ...]]:
    """Every loss and evaluation."""
    steps = [(u.step, u.loss, u.grad_norm, u.valid_loss) for u in updates if isinstance(u, Step)]
    return [*steps, *[(u.step, u.loss, u.accuracy) for u in updates if isinstance(u, Evaluated)]]


def test_rows_of_one_user_are_on_one_side(cut) -> None:
    data = cut(group_by="user")
    users = [{ROWS[i - 1]["user"] for i in part.lines} for part in (data.training, data.validation)]
    assert not users[0] & users[1]
    assert users[0] | users[1] == {f"u{i}" for i in range(7)}


def test_event_manifest_and_card_say_what_was_held_out(llama, training, tmp_path) -> None:
    spec = with_share(spec_for(max_steps=1, samples=2), group_by="user")
    updates = list(train(spec, llama, training, None, tmp_path / "run"))
    said = next(u for u in updates if isinstance(u, Note) and "held out" in u.message)
    held_out = {"share": 0.25, "seed": 5, "group_by": "user", "examples": said.data["examples"], "of": 24}
    assert said.data == {"groups": 7} | held_out
    assert said.message == (
        f"{said.data['examples']} of 24 examples of the training file are held out for validation: a share "
        "of 0.25, drawn by seed 5 from 7 groups, by 'user' and equal tokens."
    )
    folder = one(Finished, updates).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["data"]["validation"] == {"held_out": held_out}
    assert manifest["spec"]["asked"]["validation_share"] == 0.25
    card = (folder / "README.md").read_text()
    assert f"| validation | {said.data['examples']} of 24 examples of the training file, held out" in card
    assert "on held-out rows of the training file" in card
    samples = one(Samples, updates)
    assert (samples.file, samples.held_out) == ("training", True)
    trained_on = result_of(read_data(spec, llama, training, None)).training.lines
    assert not {row["line"] for row in samples.rows} & set(trained_on.tolist())


def test_without_a_share_nothing_is_said_of_one(llama, training, tmp_path) -> None:
    updates = list(train(spec_for(max_steps=1), llama, training, None, tmp_path / "run"))
    folder = one(Finished, updates).folder
    assert set(json.loads((folder / "manifest.json").read_text())["data"]) == {"training"}
    assert "held out" not in (folder / "README.md").read_text()


def test_a_resumed_run_holds_out_the_same_rows(llama, training, tmp_path) -> None:
    spec = with_share(spec_for())
    whole = list(train(spec, llama, training, None, tmp_path / "whole"))
    going = train(spec, llama, training, None, tmp_path / "broken")
    update = next(going)
    while not isinstance(update, Saved):
        update = going.send("save" if isinstance(update, Step) and update.step == 2 else None)
    going.close()
    rest = list(train(spec, llama, training, None, tmp_path / "broken", resume=update.folder))
    steps = [[u.loss for u in updates if isinstance(u, Step)] for updates in (whole, rest)]
    assert steps[1] == steps[0][2:]
    metrics = [one(Finished, updates).metrics for updates in (whole, rest)]
    assert metrics[0]["valid_loss_after"] == metrics[1]["valid_loss_after"]


def test_a_spec_without_them_is_the_spec_of_before() -> None:
    """A checkpoint's identity is this text; those from before the options existed must stay valid."""
    assert not {"validation_share", "group_by"} & set(json.loads(identity_text(spec_for())))
    assert json.loads(identity_text(with_share(spec_for())))["validation_share"] == 0.25


def test_options_that_contradict_each_other_are_refused(llama, training, tmp_path) -> None:
    both = train(with_share(spec_for()), llama, training, training, tmp_path / "run")
    with pytest.raises(SpecError, match="validation_share and a validation_file exclude each other") as error:
        next(both)
    assert error.value.param == "validation_share"
    alone = spec_for().model_copy(update={"group_by": "user"})
    with pytest.raises(SpecError, match=r"group_by says which rows olora\.validation_share keeps") as error:
        check_validation(alone, given=False, place="olora.")
    assert error.value.param == "olora.group_by"
    with pytest.raises(DataError, match=r"group_by = 'usre'.*did you mean 'user'"):
        list(train(with_share(spec_for(), group_by="usre"), llama, training, None, tmp_path / "run"))
