"""`make quickstart-real`: how it judges answers, and its whole path on a model too small for the task."""

import json
from pathlib import Path
from typing import Any

import pytest

from examples import quickstart_real, smollm2
from examples.quickstart_real import Answered, judge, order_in
from examples.service import QuickstartError
from store.settings import get_settings, read_settings

ORDER = {"item": "green tents", "quantity": 12, "city": "Oslo", "day": None}
TEXT = json.dumps(ORDER)
ROW = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": TEXT}]}


@pytest.mark.parametrize(
    ("answer", "complete", "right"),
    [
        (TEXT, True, True),
        (f"Sure, here it is: ```json {TEXT} ``` Anything else?", True, True),
        (json.dumps(dict(reversed(ORDER.items())), indent=2), True, True),
        (TEXT.replace("12", "11"), True, False),
        (TEXT.replace("12", '"12"'), True, False),
        (TEXT.replace("null", '"Monday"'), True, False),
        (json.dumps(ORDER | {"price": 3}), False, False),
        (json.dumps({"item": "green tents"}), False, False),
        (TEXT[:-1], False, False),
        (f"{TEXT} and {{", True, True),
        ("} and {", False, False),
        ("12 green tents to Oslo.", False, False),
        ("", False, False),
    ],
)
def test_an_answer_is_complete_with_four_fields_and_right_with_their_values(
    answer: str, complete: bool, right: bool
) -> None:
    answered = Answered(1.0, [ROW], [answer])
    assert (answered.complete, answered.right) == (complete, right)


def test_an_answer_that_is_no_object_has_no_order() -> None:
    assert order_in("[1, 2]") is None
    assert order_in("{1, 2}") is None


@pytest.mark.parametrize(("loss", "right", "learned"), [(0.4, 6, True), (0.6, 6, False), (0.4, 4, False)])
def test_both_the_loss_and_the_answers_must_be_better(loss: float, right: int, learned: bool) -> None:
    before = Answered(1.0, [ROW] * 10, [""] * 10)
    after = Answered(loss, [ROW] * 10, [TEXT] * right + [""] * (10 - right))
    if learned:
        judge(before, after)
    else:
        with pytest.raises(QuickstartError, match=r"loss of at most 0\.500 and 5 right answers"):
            judge(before, after)


def test_a_model_that_is_there_is_not_added_again(
    tmp_path: Path, base_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_process(*_: Any, **__: Any) -> None:
        raise AssertionError("it was added again")

    monkeypatch.setattr(smollm2.subprocess, "run", no_process)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / smollm2.MODEL).symlink_to(base_folders["llama"])
    found = smollm2.folder(read_settings(models_dir=tmp_path / "models"))
    assert (found / "config.json").is_file()


def test_it_walks_its_path_and_says_that_a_model_of_3_million_parameters_has_not_learned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(smollm2, "MODEL", "olora-tiny")
    monkeypatch.setattr(quickstart_real, "ASKED", 2)
    monkeypatch.setattr(quickstart_real, "STEPS", 2)
    monkeypatch.setenv("OLORA_PORT", "0")
    get_settings.cache_clear()
    for name, count in (("TRAINING", 16), ("VALIDATION", 4)):
        path = tmp_path / f"{name.lower()}.jsonl"
        lines = getattr(quickstart_real, name).read_text().splitlines(keepends=True)[:count]
        path.write_text("".join(lines))
        monkeypatch.setattr(quickstart_real, name, path)
    assert quickstart_real.main() == 1
    shown = capsys.readouterr().out
    assert "step 2/2" in shown
    assert "Checked here in PEFT" in shown
    assert "0 of 2" in shown
    assert "The model has not learned the task" in shown
    assert len(list((get_settings().home / "quickstart").glob("*/adapter/adapter_model.safetensors"))) == 1
