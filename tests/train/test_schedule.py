from __future__ import annotations

import pytest

from varlen_sft.train.options import TrainOptions
from varlen_sft.train.schedule import Schedule


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("cosine", [0.01, 0.5, 1.0, 0.2 + 0.8 * 0.8535533905932737, 0.6, 0.2]),
        ("linear", [0.01, 0.5, 1.0, 0.8, 0.6, 0.2]),
        ("constant", [0.01, 0.5, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_it_rises_over_the_warm_up_and_falls_to_the_floor(kind, expected):
    schedule = Schedule(kind=kind, warmup=0.2, floor=0.2)
    factors = [schedule(progress) for progress in (0.0, 0.1, 0.2, 0.4, 0.6, 1.0)]
    assert factors == pytest.approx(expected, abs=1e-12)


def test_without_warm_up_it_begins_at_the_peak():
    assert Schedule(warmup=0.0)(0.0) == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "step"}, "kind must be one of cosine, linear, constant, got 'step'"),
        ({"warmup": 1.0}, r"warmup must be in \[0, 1\), got 1.0"),
        ({"floor": -0.1}, r"floor must be in \[0, 1\], got -0.1"),
    ],
)
def test_what_it_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        Schedule(**change)


def test_rate_and_time_left_of_a_run():
    options = TrainOptions(max_steps=10, lr=2.0, schedule=Schedule(kind="linear", floor=0.0))
    assert options.rate(options.progress(5, 0.0)) == pytest.approx(2.0 * (1 - 0.4 / 0.9))
    assert options.seconds_left(4, 100.0, 3.0) == 18.0
    assert TrainOptions(max_seconds=110.0).seconds_left(4, 100.0, 3.0) == 10.0
    assert TrainOptions(max_steps=10, max_seconds=50.0).seconds_left(4, 100.0, 3.0) == 0.0
