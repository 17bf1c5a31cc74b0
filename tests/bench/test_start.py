"""The benchmark of the start: it runs jobs on a real service, and tells cold from warm."""

import pytest

from bench.start import main, row


@pytest.mark.slow
def test_one_round_with_one_warm_job(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    main(["--models", "tiny", "--rounds", "1", "--warm", "1", "--rows", "12", "--validation"])
    (printed,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| tiny"))
    cold, warm = (float(printed.split(" | ")[i].split()[0]) for i in (1, 2))
    assert cold > warm > 0


def test_a_row_shows_medians_with_and_without_the_step() -> None:
    shown = row("base", [(9.0, 1.0), (11.0, 1.0), (30.0, 5.0)], [(2.0, 1.0)])
    until = ["10.00 (8.00–25.00)", "1.00 (1.00–1.00)", "10.0"]
    included = ["11.00 (9.00–30.00)", "2.00 (2.00–2.00)", "5.5"]
    assert shown.strip("| ").split(" | ") == ["base", *until, *included]
