"""A state as a file: small, whole or not there, and taken up by other ranks."""

from __future__ import annotations

import json
import os
from itertools import islice

import pytest

from tests.data.streams import Made, lengths, names, sequences, stream
from varlen_sft.data.stream_state import load_state, save_state
from varlen_sft.errors import InputError


@pytest.mark.parametrize("window", [1, 64, 1000])
def test_a_state_is_small_whatever_the_set(window):
    """Some 600 bytes, and a position of at most 10 digits for each sample of the window."""
    source = Made(lengths(3000))
    source.fingerprint = 64 * "f"  # as a prepared set's
    found = stream(source, {"method": "streaming", "window": window})
    list(islice(found, 40))
    assert len(found.state_dict()["window"]["window"]) == window
    assert len(json.dumps(found.state_dict())) < 600 + 12 * window
    planned = stream(source)
    planned.load_state_dict(planned.state_dict() | {"epoch": 10**9, "step": 100})
    assert len(json.dumps(planned.state_dict())) < 600


def test_a_state_in_a_file_is_gone_on_with(tmp_path):
    source, order = Made(lengths(200)), {"method": "streaming", "weights": (1.5,), "window": 6}
    found = stream(source, order)
    list(islice(found, 7))
    file = tmp_path / "stream.json"
    save_state(file, found.state_dict())
    expected = [(names(step), sequences([step])) for step in islice(found, 9)]
    parts = []
    for rank in range(2):
        again = stream(source, order, ranks=2, rank=rank, workers=rank)
        assert again.load_state_dict(load_state(file)) == []
        parts.append(list(islice(again, 9)))
    got = [(names(step), sequences([step, other])) for step, other in zip(*parts, strict=True)]
    assert got == expected


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    found = stream(Made(lengths(90)))
    file = tmp_path / "stream.json"
    save_state(file, found.state_dict())
    before = file.read_bytes()
    list(islice(found, 3))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patched:
            patched.setattr(os, name, full)
            with pytest.raises(OSError, match="No space left"):
                save_state(file, found.state_dict())
        assert file.read_bytes() == before
        assert [path.name for path in tmp_path.iterdir()] == ["stream.json"]
    save_state(file, found.state_dict())
    assert load_state(file) == json.loads(json.dumps(found.state_dict()))
    assert [path.name for path in tmp_path.iterdir()] == ["stream.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "stream.json: cannot be read: .*No such file"),
        ("{", "stream.json: cannot be read: "),
        ("[]", "stream.json: the stream's state must be what state_dict.. gave"),
        ('{"version": 7}', "stream.json: the stream's state must be of version 1, is of 7"),
    ],
)
def test_a_file_that_is_no_state_is_named(tmp_path, text, message):
    if text is not None:
        (tmp_path / "stream.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load_state(tmp_path / "stream.json")


def test_a_state_of_a_half_of_the_ranks_is_the_same(tmp_path):
    """Every rank may write it, or one alone."""
    source = Made(lengths(90))
    states = []
    for ranks in (1, 2, 4):
        for rank in range(ranks):
            found = stream(source, ranks=ranks, rank=rank, workers=rank % 2)
            list(islice(found, 30))
            states.append(found.state_dict())
    assert all(state == states[0] for state in states)
