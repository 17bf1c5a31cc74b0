"""How both models' sample answers are printed."""

import io

from rich.console import Console

from cli.samples import show_samples


def shown(samples: dict[str, object] | None) -> str:
    out = io.StringIO()
    show_samples(Console(file=out, width=40), samples)
    return out.getvalue()


def test_each_answer_has_a_line_of_its_own() -> None:
    row = {
        "line": 7,
        "prompt": "user\nTwo\nand two?",
        "reference": "Four.",
        "base": "[bold]",
        "tuned": "Four.",
    }
    assert shown({"file": "validation", "rows": [row]}).splitlines() == [
        "Sample answers to rows of the validation file:",
        "  line 7       user Two and two?",
        "  in the file  Four.",
        "  base         [bold]",
        "  tuned        Four.",
    ]


def test_long_texts_show_the_end_of_the_prompt_and_the_beginning_of_answers() -> None:
    row = {"line": 1, "prompt": "a" * 200 + "?", "reference": "b" * 200, "base": "", "tuned": ""}
    _, prompt, reference, *_ = shown({"file": "training", "rows": [row]}).splitlines()
    assert prompt == "  line 1       …" + "a" * 99 + "?"
    assert reference == "  in the file  " + "b" * 100 + "…"


def test_control_characters_are_replaced() -> None:
    row = {"line": 1, "prompt": "", "reference": "", "base": "\x1b[2J\x07\x9b", "tuned": "\u202eright"}
    printed = shown({"file": "training", "rows": [row]})
    assert "base         \ufffd[2J\ufffd\ufffd" in printed
    assert "\u202e" not in printed


def test_without_samples_nothing_is_printed() -> None:
    assert shown(None) == ""
