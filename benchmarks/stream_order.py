"""The order of a stream, from lengths alone: what epochs and resumes cost, how even ranks are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from typing import Any

import numpy as np
from rich.table import Table
from script import goal

SIZE, PACKS = 4096, 8
LATE = 7  # an epoch to resume in
STEP = 0.02  # seconds of a trainer's step at an edge of epochs
AROUND = 40  # steps before and after it
EVEN = 1.02  # the most over the mean of a micro-batch


class Lengths:
    """A source that is asked for lengths alone."""

    fingerprint = "lengths"

    def __init__(self, lengths: np.ndarray) -> None:
        self.lengths = self.supervised = lengths


def lognormal(mean: float, sigma: float, count: int, most: int, seed: int) -> np.ndarray:
    drawn = np.random.default_rng(seed).lognormal(mean, sigma, count).astype(np.int32)
    return np.clip(drawn, 2, most + 1)


def stream_of(source: Any, max_tokens: int, *, workers: int = 0, **order: Any) -> Any:
    from varlen_sft.data.stream import OrderOptions, PackStream, StreamOptions

    options = OrderOptions(**{"max_tokens": max_tokens, "packs_per_step": PACKS} | order)
    return PackStream([source], options, StreamOptions(workers=workers))


def table(title: str, name: str, *figures: str) -> Table:
    shown = Table(name, title=title, title_justify="left", caption_justify="left")
    for figure in figures:
        shown.add_column(figure, justify="right")
    return shown


def spent(work: Callable[[], Any], times: int = 1) -> float:
    start = time.perf_counter()
    for _ in range(times):
        work()
    return time.perf_counter() - start


# ---------------------------------------------------------------------- epochs


def epochs(count: int, seed: int) -> tuple[dict[str, Any], Table]:
    """Seconds to the first step of a run, an epoch and a resume, and the bytes of a state."""
    title = f"Epochs and resumes: {count:,} samples, packs of {SIZE:,}"
    figures = ("first step s", "resume in epoch 0 s", f"in epoch {LATE} s", "state bytes")
    shown, found = table(title, "packs", *figures), {}
    source = Lengths(lognormal(6.1, 1.0, count, SIZE, seed))
    for method in ("planned", "streaming"):
        first = spent(lambda m=method: stream_of(source, SIZE, method=m).order.step(0, 0))
        of = {"first": first}
        for epoch in (0, LATE):
            text = _state(stream_of(source, SIZE, method=method), epoch)
            of[f"resume in epoch {epoch}"] = spent(lambda m=method, t=text: _resumed(source, m, t))
        found[method] = of | {"bytes": len(text)}
        shown.add_row(method, *(f"{seconds:.2f}" for seconds in of.values()), str(len(text)))
    return found, shown


def _state(stream: Any, epoch: int) -> str:
    """In the middle of an epoch."""
    middle = stream.order.step(epoch, stream.order.steps(epoch) // 2)
    at = {"epoch": epoch, "step": middle.step, "window": middle.start}
    return json.dumps(stream.state_dict() | at)


def _resumed(source: Any, method: str, text: str) -> None:
    stream_of(source, SIZE, method=method).load_state_dict(json.loads(text))


# ----------------------------------------------------------------------- edges


def edges(count: int, seed: int) -> tuple[dict[str, Any], Table]:
    """The longest that a trainer waits for a step where an epoch, or a window of it, ends."""
    title = f"Longest wait of a trainer with steps of {STEP * 1e3:.0f} ms: {count:,} samples"
    shown = table(title, "where", "packed when asked for ms", "ahead, in a thread ms")
    source, found = Lengths(lognormal(6.1, 1.0, count, SIZE, seed)), {}
    for method, place in (("planned", "epoch"), ("streaming", "epoch"), ("streaming", "window")):
        name = f"{method}, next {place}"
        found[name] = waits = {
            ahead: _longest(source, method, place, ahead) for ahead in (False, True)
        }
        shown.add_row(name, *(f"{1e3 * wait:.1f}" for wait in waits.values()))
    worst = max(waits[True] for waits in found.values())
    shown.caption = goal(worst < STEP, "ahead, no wait is as long as a step")
    return {name: list(waits.values()) for name, waits in found.items()}, shown


def _longest(source: Any, method: str, place: str, ahead: bool) -> float:
    from varlen_sft.data.prefetch import Prefetch

    order = stream_of(source, SIZE, method=method).order
    edge = order.steps(0)
    if place == "window":
        edge = order.epoch(0).options.balance_steps
    steps = order.walk(0, max(0, edge - AROUND), ahead=ahead)
    longest = 0.0
    with Prefetch(steps, lambda step: step, workers=1) as made:
        next(made)
        for _ in range(2 * AROUND):
            time.sleep(STEP)
            longest = max(longest, spent(lambda: next(made)))
    return longest


# --------------------------------------------------------------------- balance


def balance(count: int, seed: int) -> tuple[dict[str, Any], Table]:
    """Most over mean cost of the ranks' micro-batches, all but those of the epoch's last step."""
    size, ranks, accumulate, a = 32768, 8, 4, 29697
    title = (
        f"Balance: most over mean cost of {ranks} ranks, {accumulate} micro-batches each, "
        f"packs of {size:,}, {count:,} lengths lognormal(7.2, 1.3)"
    )
    shown, found = table(title, "packs", "balance", "mean", "99 %", "most", "over 1.02"), {}
    source = Lengths(lognormal(7.2, 1.3, count, size, seed))
    for method, kind in product(("planned", "streaming"), ("window", "step", "none")):
        options = {"packs_per_step": ranks * accumulate, "cost_a": a, "seed": seed}
        order = stream_of(source, size, method=method, balance=kind, **options).order
        uneven = np.concatenate(list(_uneven(order, ranks, accumulate, kind)))
        of = {
            "mean": float(uneven.mean()),
            "p99": float(np.quantile(uneven, 0.99)),
            "most": float(uneven.max()),
            "over": int((uneven > EVEN).sum()),
        }
        found[f"{method}, {kind}"] = of | {"micro_batches": uneven.size}
        values = (of["mean"], of["p99"], of["most"])
        over = f"{of['over']:,} of {uneven.size:,}"
        shown.add_row(method, kind, *(f"{value:.4f}" for value in values), over)
    worst = max(of["most"] for name, of in found.items() if name.endswith("window"))
    said = f"with window {worst:.4f} at most. Left out: the epoch's last step, which has the rest"
    shown.caption = goal(worst <= EVEN, said)
    return found, shown


def _uneven(order: Any, ranks: int, accumulate: int, kind: str) -> Iterator[np.ndarray]:
    from varlen_sft.data.balance import deal, imbalance

    for step in islice(order.walk(), order.steps(0) - 1):
        cells = deal(step.costs, ranks, accumulate, balance=kind)
        yield imbalance(step.costs, cells)
