"""The benchmark of the initialisation runs, and its two sides make the same factors."""

import pytest

from bench.olora_init import main


def test_the_benchmark_prints_one_row_a_shape_and_rank_with_equal_factors(
    capsys: pytest.CaptureFixture[str],
) -> None:
    main(["--threads", "1", "--shapes", "96x64", "--ranks", "4", "8", "--repeats", "1"])
    printed = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| 96")]
    assert [row[:3] for row in rows] == [["96×64", "4", "1"], ["96×64", "8", "1"]]
    for row in rows:
        peft_seconds, our_seconds, _, factors, product = (float(number) for number in row[3:])
        assert peft_seconds > 0
        assert our_seconds > 0
        assert factors < 1e-5
        assert product < 1e-5
    assert "1 CPU threads" in printed
