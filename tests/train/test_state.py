from __future__ import annotations

from dataclasses import replace

import pytest

from varlen_sft.errors import InputError
from varlen_sft.train.state import StepRecord, TrainState

RECORD = StepRecord(
    step=1, loss=2.0, grad_norm=0.5, lr=1e-4, real_tokens=2000, supervised_tokens=800,
    fill=0.5, step_time_s=2.0, seconds_left=83.4, epoch=0,
)  # fmt: skip


def test_the_state_counts_what_its_records_say():
    state = TrainState()
    state.add(RECORD)
    state.add(replace(RECORD, step=2, epoch=1, real_tokens=10, supervised_tokens=0, updated=False))
    assert state == TrainState(
        step=2, epoch=1, real_tokens=2010, supervised_tokens=800, skipped_steps=1, seconds=4.0
    )
    assert (RECORD.real_tokens_per_s, RECORD.supervised_tokens_per_s) == (1000, 400)
    assert replace(RECORD, stall_s=0.5).stall == 0.25


def test_the_state_comes_back_as_it_was():
    state, other = TrainState(step=3, epoch=1, real_tokens=7, seconds=2.5), TrainState()
    other.load_state_dict(state.state_dict())
    assert other == state and type(other.state_dict()["step"]) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step of a run's state must be a int of at least 0, is -1"),
        ({"seconds": 3}, "seconds of a run's state must be a float of at least 0, is 3"),
        ({"steps": 3}, "must hold epoch, real_tokens, .*, holds epoch, .*steps"),
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(change, message):
    state = TrainState(step=4)
    with pytest.raises(InputError, match=message):
        state.load_state_dict({**TrainState(step=9).state_dict(), **change})
    assert state == TrainState(step=4)
