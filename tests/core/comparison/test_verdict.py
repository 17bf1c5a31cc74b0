"""What losses over a few seeds allow to be said."""

import math

import pytest

from olora_core.comparison.verdict import STUDENT_95, difference, judge, steps_to

LORA = [1.30, 1.31, 1.29]


def student_95(freedom: int) -> float:
    """By integrating the density with Simpson's rule, and bisection."""
    scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)

    def within(t: float, parts: int = 20_000) -> float:
        width = t / parts
        weights = (1 if i in (0, parts) else 4 if i % 2 else 2 for i in range(parts + 1))
        density = ((1 + (i * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for i in range(parts + 1))
        return 2 * scale * width / 3 * sum(w * d for w, d in zip(weights, density, strict=True))

    low, high = 1.0, 20.0
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < 0.95 else (low, middle)
    return low


@pytest.mark.parametrize("freedom", [1, 2, 3, 7, 19])
def test_the_critical_values_are_students(freedom: int) -> None:
    assert STUDENT_95[freedom - 1] == pytest.approx(student_95(freedom), abs=6e-4)
    assert len(STUDENT_95) == 19, "as many as twenty seeds need"


def test_the_interval_is_that_of_the_paired_differences() -> None:
    found = difference([1.0, 1.2, 1.1, 1.4], [1.1, 1.25, 1.3, 1.4])
    pairs = [0.1, 0.05, 0.2, 0.0]
    mean = sum(pairs) / 4
    deviation = math.sqrt(sum((pair - mean) ** 2 for pair in pairs) / 3)
    assert found.mean == pytest.approx(mean)
    assert found.half_width == pytest.approx(student_95(3) * deviation / 2, rel=1e-3)
    assert not found.is_beyond


def test_a_difference_that_every_seed_shares_is_beyond_however_far_the_seeds_lie_apart() -> None:
    assert difference([1.0, 2.0, 3.0], [1.11, 2.10, 3.09]).is_beyond


def test_one_seed_tells_nothing_of_the_spread() -> None:
    found = difference([1.0], [2.0])
    assert found.bounds is None
    assert not found.is_beyond


@pytest.mark.parametrize(
    ("loss", "steps"),
    [(3.0, 0.0), (2.0, 10.0), (1.5, 15.0), (1.0, 20.0), (0.75, 25.0), (0.4, None)],
)
def test_the_steps_to_a_loss_lie_on_straight_lines_and_count_from_the_first_crossing(
    loss: float, steps: float | None
) -> None:
    curve = [(0, 3.0), (10, 2.0), (20, 1.0), (30, 0.5), (40, 2.5)]
    assert steps_to(curve, loss) == (None if steps is None else pytest.approx(steps))


def test_a_method_beyond_the_spread_is_the_one_to_take() -> None:
    found = judge({"lora": LORA, "olora": [1.20, 1.22, 1.19]}, "lora", "nats a token")
    assert found.take == found.best == "olora"
    assert found.sentence.startswith(
        "Take olora: its final validation loss, 1.2033 nats a token, is 0.0967 below"
    )
    assert "beyond the seeds' spread" in found.sentence


def test_a_method_within_the_spread_is_no_reason_to_leave_lora() -> None:
    found = judge({"lora": LORA, "olora": [1.20, 1.40, 1.28]}, "lora", "nats a token")
    assert (found.best, found.take) == ("olora", "lora")
    assert found.sentence.startswith("The difference is within the seeds' spread")


def test_the_runner_up_is_told_where_it_is_not_lora() -> None:
    losses = {"lora": LORA, "pissa": [1.201, 1.219, 1.192], "olora": [1.20, 1.22, 1.19]}
    found = judge(losses, "lora", "nats a token")
    assert found.runner_up == "pissa"
    assert "the runner-up, pissa, is 0.0007 behind, within the seeds' spread" in found.sentence


def test_lora_is_taken_where_it_is_the_best() -> None:
    found = judge({"lora": LORA, "olora": [1.40, 1.41, 1.39]}, "lora", "nats a token")
    assert found.take == "lora"
    assert "olora's is 0.1000 higher, beyond the seeds' spread" in found.sentence


def test_with_one_seed_the_sentence_says_so() -> None:
    sentence = judge({"lora": [1.3], "olora": [1.2]}, "lora", "nats a token").sentence
    assert "one seed tells nothing of the spread" in sentence


def test_without_lora_the_best_is_compared_with_the_next() -> None:
    found = judge({"pissa": [1.3, 1.31], "olora": [1.2, 1.21]}, "lora", "nats a token")
    assert found.against_baseline is None
    assert found.sentence.startswith("Take olora")
    assert judge({"olora": [1.2, 1.3]}, "lora", "nats").sentence.startswith("Take olora: no other method")
