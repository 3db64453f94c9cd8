"""The stream across processes and threads: fork, spawn, threads that end, Ctrl-C, pickles."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import count, islice
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from tests.data.streams import Made, lengths, names, sequences, stream
from varlen_sft.data.prefetch import Prefetch
from varlen_sft.data.store import Store
from varlen_sft.data.store_write import write_store
from varlen_sft.errors import RunError

# Python 3.12 and newer warn of forks in a process with threads, which is what is tested here.
pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
ROOT = Path(__file__).parents[2]
ENDLESS = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # also where tests run in the background
from tests.data.streams import Made, lengths, stream
for step in stream(Made(lengths(90)), workers=2, depth=4):
    print("step", flush=True)
    time.sleep({seconds})
"""


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    made = Made(lengths(300))
    path = tmp_path_factory.mktemp("set") / "set"
    write_store(path, [made.sample(i) for i in range(300)])
    return path


def two_steps(found) -> list:
    """In another process: what comes next, as plain lists."""
    return [(names(step), sequences([step])) for step in islice(found, 2)]


def in_child(work) -> bytes:
    """What a forked child returns."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        signal.alarm(20)  # a child that hangs ends
        try:
            os.write(write, work())
        finally:
            os._exit(0)
    os.close(write)
    try:
        return os.read(read, 1 << 20)
    finally:
        os.close(read)
        os.waitpid(child, 0)


def test_another_process_goes_on_where_the_stream_is(prefix):
    order = {"method": "streaming"}
    found = stream(Store(prefix), order, workers=1)
    list(islice(found, 5))
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        there = pool.submit(two_steps, found).result(timeout=60)
    assert there == two_steps(found)
    assert found.state_dict()["step"] == 7


def test_a_pickle_has_the_prefix_and_not_the_tokens(prefix):
    store = Store(prefix)
    text = pickle.dumps(stream(store))
    assert len(text) < 2000 < prefix.with_suffix(".bin").stat().st_size
    again = pickle.loads(text)
    assert again.sources.fingerprint == store.fingerprint
    assert isinstance(again.sources.parts[0]._tokens.base, np.memmap)  # mapped, not copied


def test_threads_share_one_mapping(prefix):
    """No worker has tokens of its own: what is not collated stays in the file's pages."""
    store = Store(prefix)
    found = stream(store, workers=2)
    next(iter(found))
    assert found.sources.parts[0] is store
    assert isinstance(store._tokens.base, np.memmap) and not store._tokens.flags.writeable


def test_a_forked_child_begins_an_iteration_of_its_own(prefix):
    found = stream(Store(prefix), {"method": "streaming"}, workers=2)
    steps = iter(found)
    next(steps)
    expected = repr(two_steps(stream(Store(prefix), {"method": "streaming"}))).encode()
    fresh = stream(Store(prefix), {"method": "streaming"}, workers=2)
    fresh.order._epochs._lock.acquire()  # as it would be if a thread held it while forking
    assert in_child(lambda: repr(two_steps(fresh)).encode()) == expected
    steps.close()


def test_an_iteration_of_the_parent_is_an_error_in_the_child_not_a_hang(prefix):
    steps = iter(stream(Store(prefix), workers=2))
    next(steps)

    def child() -> bytes:
        try:
            next(steps)
        except RunError as error:
            return str(error).encode()
        return b"no error"

    said = in_child(child)
    assert f"made ahead in process {os.getpid()}, and asked for in its child".encode() in said
    next(steps)  # the parent's goes on
    steps.close()


@pytest.mark.parametrize("error", [MemoryError("full"), SystemExit(3), KeyboardInterrupt()])
def test_whatever_ends_a_step_is_raised_in_its_place(error):
    source = Made(lengths(90))
    read = source.sample

    def sample(i: int):
        if i == 33:
            raise error
        return read(i)

    source.sample = sample
    began = time.monotonic()
    with pytest.raises(type(error)):
        for _ in stream(source, workers=2):
            pass
    assert time.monotonic() - began < 5


def test_a_thread_that_dies_is_an_error_and_not_a_hang(monkeypatch):
    def die(self) -> None:
        raise MemoryError("no room for a future")

    monkeypatch.setattr(Prefetch, "_work", die)
    said: list[str] = []

    def ask() -> None:
        with pytest.raises(RunError) as caught:
            next(ahead)
        said.append(str(caught.value))

    with Prefetch(count(), str, workers=2) as ahead:
        asking = threading.Thread(target=ask, daemon=True)  # it may hang
        asking.start()
        asking.join(timeout=5)
    assert said == ["a thread that makes results ahead ended: MemoryError('no room for a future')"]


@pytest.mark.parametrize("seconds", [0, 60], ids=["waits for a step", "is in a step"])
def test_ctrl_c_ends_the_process_and_its_threads(seconds):
    """One process and its threads: when it is gone there is nothing that could be left."""
    run = subprocess.Popen(
        [sys.executable, "-c", ENDLESS.format(seconds=seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "step\n"
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children")
    assert not children.exists() or children.read_text() == ""
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=20)
    assert run.returncode == -signal.SIGINT and said.rstrip().endswith("KeyboardInterrupt")


def test_no_thread_is_left_when_an_iteration_ends():
    source = Made(lengths(400))
    for workers in (0, 1, 3):
        found = stream(source, {"method": "streaming"}, workers=workers)
        list(islice(found, 2 * found.steps_per_epoch))
        left = [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]
        assert left == []
    packers = [t for t in threading.enumerate() if t.name.startswith("pack ")]
    for thread in packers:  # nobody waits for them, but they come to an end
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in packers)


@pytest.mark.parametrize("workers, epochs", [(0, {0}), (1, {0, 1})])
def test_the_next_epoch_is_packed_ahead_where_there_are_threads(workers, epochs):
    found = stream(Made(lengths(200)), {"balance_steps": 100}, workers=workers)
    steps = iter(found)
    for _ in range(3):
        assert next(steps).epoch == 0
    assert found.order.epoch(0).count() > 10
    assert set(found.order._epochs._known) == epochs
    steps.close()
