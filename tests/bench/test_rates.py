"""The study of learning rates: its arithmetic, its data, and a whole sweep in small."""

import json
import math

import pytest

from bench.rates import tasks
from bench.rates.__main__ import main
from bench.rates.sweep import sweep
from bench.rates.table import best, lost, summary


def line_of(rates: list[float], loss, **values) -> dict:
    return {"base": "a", "losses": [(rate, loss(rate)) for rate in rates], **values}


def bowl(rate: float) -> float:
    """Lowest, at 2, where the rate is 1e-3."""
    return 2 + 0.3 * (math.log10(rate) + 3) ** 2


def test_the_best_rate_and_the_cost_of_another_are_those_of_the_parabola() -> None:
    line = line_of([3e-4, 6e-4, 1.2e-3, 2.4e-3], bowl)
    rate, loss = best(line)
    assert (rate, loss) == (pytest.approx(1e-3), pytest.approx(2))
    assert lost(line, 2e-3) == (pytest.approx(bowl(2e-3) - bowl(1.2e-3)), False)
    assert lost(line, 1e-2) == (pytest.approx(bowl(2.4e-3) - bowl(1.2e-3)), True)


def test_runs_that_diverge_count_for_nothing_but_the_edge() -> None:
    line = line_of([5e-4, 1e-3, 2e-3, 4e-3], lambda rate: bowl(rate) if rate < 4e-3 else math.inf)
    assert best(line)[0] == pytest.approx(1e-3)


def test_a_sweep_goes_on_until_the_best_rate_has_a_worse_one_on_each_side() -> None:
    losses = sweep(bowl, 1.6e-2)
    rates = sorted(losses, key=losses.__getitem__)
    assert min(losses) < rates[0] < max(losses)
    assert rates[0] == pytest.approx(1e-3)


def test_a_rule_is_judged_on_each_base_and_on_all() -> None:
    rates = [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    own = line_of(rates, bowl, measured=1e-5)
    others = [line_of(rates, bowl, measured=m) | {"base": "b"} for m in (6e-4, 1e-3, 1.9e-3)]
    rows = summary([own, *others], {"measured": lambda line: line["measured"]})
    assert rows[0].startswith("a ")
    assert "0 of   1 within a factor 2" in rows[0]
    assert "3 of   3 within a factor 2" in rows[1]
    assert rows[2].startswith("all")
    assert "3 of   4 within a factor 2" in rows[2]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_tasks_files_have_rows_that_training_does_not(task, tmp_path) -> None:
    rows = {}
    for role, count in tasks.ROWS.items():
        tasks.write(task, role, tmp_path / role)
        rows[role] = (tmp_path / role).read_text().splitlines()
        assert len(rows[role]) == count
        for row in rows[role]:
            messages = json.loads(row)["messages"]
            assert sum(len(message["content"]) for message in messages) <= tasks.LONGEST
            assert messages[-1]["role"] == "assistant"
    assert not set(rows["train"]) & set(rows["valid"])


def test_of_a_preference_the_rejected_answer_is_another_rows(tmp_path) -> None:
    tasks.write("orders", "train", tmp_path / "rows", preferences=True)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert len(rows) > 300
    answers = [row["preferred_output"] for row in rows]
    for row in rows:
        assert row["input"]["messages"][-1]["role"] == "user"
        assert row["non_preferred_output"] in answers
        assert row["non_preferred_output"] != row["preferred_output"]


def test_sweeps_of_preferences_and_on_quantised_bases_are_judged_apart(tmp_path) -> None:
    plain = line_of([5e-4, 1e-3, 2e-3], bowl, measured=1e-3)
    rows = summary(
        [plain, plain | {"type": "dpo"}, plain | {"quantization": "int8"}], {"r": lambda line: 1e-3}
    )
    assert [row.split(" r ")[0].strip() for row in rows] == ["a", "a dpo", "a int8", "all"]


def test_a_sweep_of_one_triple_prints_and_keeps_what_it_measured(tmp_path, capsys) -> None:
    out = tmp_path / "rates.jsonl"
    triple = ["--tasks", "keys", "--methods", "lora", "--ranks", "4", "--steps", "2"]
    places = ["--work", str(tmp_path), "--out", str(out)]
    for _ in range(2):  # the second has nothing left to do
        main(["sweep", *triple, "--curvature", "--seeds", "1", *places])
    (line,) = map(json.loads, out.read_text().splitlines())
    assert line["measured"] > 0
    assert line["curvature"] > 0
    assert len(line["others"]) == 1
    assert len(line["losses"]) >= 3
    assert f"  rate {line['losses'][0][0]:.2e}: {line['losses'][0][1]:.4f}\n" in capsys.readouterr().out
    main(["table", str(out)])
    table = capsys.readouterr().out
    assert table.splitlines()[0].startswith("shipped      keys       lora       4  best")
    assert "within a factor 2" in table
