"""The stream: what threads and processes make, how long a trainer waits, what a resume costs."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import script
from rich.table import Table
from stream_order import PACKS, balance, edges, epochs, lognormal, spent, stream_of, table

HELP = """\
Streams a prepared set of lognormal(6.1, 1.0) tokens a sample, in steps of 8 packs for one rank.

Rates: steps one after the other, as fast as they come; the peers are torch's DataLoader over the
same steps, whose processes send them back. Rounds are interleaved, figures are medians. All have to
give the same tokens, or nothing is printed.

Waiting: a trainer that takes so many tokens a second waits for what share of its time. It sleeps,
as one that waits for a GPU, or it computes in Python without a pause, the worst that can be: then
also how much longer it takes than without a stream.

Order, from lengths alone: the seconds to the first step, and to the step after a resume in the
middle of an epoch, with the bytes of the state there; the longest wait at the edge of an epoch or
of a window, packed when it is asked for or ahead of that; how even the ranks' micro-batches are.
"""
SIZES = (4096, 32768)
TOKENS_PER_SECOND = (100_000, 400_000, 1_600_000)
TURNS = 500_000  # of a loop in Python, to know how long one takes
STALLED = 0.02  # the most that a trainer may wait


def written(folder: Path, count: int, seed: int) -> Any:
    """A prepared set of random tokens, half of which are targets."""
    from varlen_sft.data.sample import Sample
    from varlen_sft.data.store import Store
    from varlen_sft.data.store_write import write_store

    draw = np.random.default_rng(seed)

    def sample(length: int) -> Sample:
        weights = (draw.random(length) < 0.5).astype(np.float32)
        ids = draw.integers(0, 100_000, length, dtype=np.int32)
        return Sample(ids, weights, np.zeros(length, np.uint8))

    write_store(folder / "set", map(sample, lognormal(6.1, 1.0, count, SIZES[0], seed).tolist()))
    return Store(folder / "set")


# ----------------------------------------------------------------------- rates


class Steps:
    """What a DataLoader asks for a step."""

    def __init__(self, source: Any, max_tokens: int) -> None:
        self.stream = stream_of(source, max_tokens)

    def __len__(self) -> int:
        return self.stream.steps_per_epoch

    def __getitem__(self, number: int) -> Any:
        return self.stream.step(number).batches


def threads(source: Any, max_tokens: int, workers: int) -> Iterator[Any]:
    for step in stream_of(source, max_tokens, workers=workers):
        yield step.batches


def processes(source: Any, max_tokens: int, workers: int) -> Iterator[Any]:
    from torch.utils.data import DataLoader

    steps = Steps(source, max_tokens)
    yield from DataLoader(
        steps, batch_size=None, num_workers=workers, multiprocessing_context="fork"
    )


CANDIDATES: dict[str, Callable[[Any, int], Iterator[Any]]] = {
    "no thread": lambda source, size: threads(source, size, 0),
    "1 thread": lambda source, size: threads(source, size, 1),
    "2 threads": lambda source, size: threads(source, size, 2),
    "DataLoader, 1 process": lambda source, size: processes(source, size, 1),
    "DataLoader, 2 processes": lambda source, size: processes(source, size, 2),
}


def rate(name: str, source: Any, size: int, steps: int) -> tuple[float, int]:
    """Tokens per second after the first step, and a sum of all tokens."""
    made = CANDIDATES[name](source, size)
    found = next(made)
    checked = sum(int(batch.input_ids.sum()) for batch in found)
    tokens, start = 0, time.perf_counter()
    for batches in islice(made, steps):
        tokens += sum(batch.input_ids.shape[0] for batch in batches)
        checked += sum(int(batch.input_ids.sum()) for batch in batches)
    return tokens / (time.perf_counter() - start), checked


def rates(source: Any, size: int, rounds: int) -> dict[str, list[float]]:
    names, found = list(CANDIDATES), {name: [] for name in CANDIDATES}
    steps = min(60, stream_of(source, size).steps_per_epoch - 1)
    sums = set()
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            per_second, checked = rate(name, source, size, steps)
            found[name].append(per_second)
            sums.add(checked)
    if len(sums) != 1:
        raise SystemExit("the candidates do not give the same tokens")
    return found


def rates_table(found: dict[str, list[float]], size: int) -> Table:
    shown = table(
        f"Steps as fast as they come: packs of {size:,}",
        "candidate",
        "Mtokens/s",
        "from",
        "to",
        "ms a pack",
    )
    for name, runs in found.items():
        middle = statistics.median(runs)
        values = (middle / 1e6, min(runs) / 1e6, max(runs) / 1e6, 1e3 * size / middle)
        shown.add_row(name, *(f"{value:.2f}" for value in values))
    return shown


# --------------------------------------------------------------------- waiting


def compute(turns: int) -> int:
    """Python without a pause: threads get the interpreter only when it is taken away."""
    total = 0
    for turn in range(turns):
        total += turn & 3
    return total


def waiting(source: Any, size: int, per_second: int, workers: int, busy: bool) -> dict[str, float]:
    """Share of waiting, and the trainer's own median time for a step over what it is alone."""
    seconds = PACKS * size / per_second
    steps = min(60, max(6, round(1.5 / seconds)))
    turns = round(seconds * TURNS / min(spent(lambda: compute(TURNS)) for _ in range(5)))
    work = (lambda: compute(turns)) if busy else (lambda: time.sleep(seconds))
    alone = [spent(work) for _ in range(steps // 2)]
    stream = stream_of(source, size, workers=workers)
    inside = [spent(work) for _ in islice(stream, steps)]
    alone += [spent(work) for _ in range(steps - steps // 2)]
    slower = statistics.median(inside) / statistics.median(alone) - 1
    return {"waited": stream.stall.share, "slower": slower}


def waits(source: Any) -> tuple[list[dict[str, Any]], Table]:
    title = f"A trainer that waits for steps of {PACKS} packs of {SIZES[0]:,}"
    shown = table(title, "trainer", "tokens/s", "threads", "waits", "own time")
    found = []
    for busy, per_second, workers in product((False, True), TOKENS_PER_SECOND, (0, 1, 2)):
        of = waiting(source, SIZES[0], per_second, workers, busy)
        kind = "in Python" if busy else "asleep"
        found.append({"trainer": kind, "per_second": per_second, "workers": workers} | of)
        waited, slower = f"{of['waited']:.2%}", f"{of['slower']:+.1%}"
        shown.add_row(kind, f"{per_second:,}", str(workers), waited, slower)
    one = [of for of in found if of["workers"] == 1 and of["trainer"] == "asleep"]
    worst = max(of["waited"] for of in one if of["per_second"] < max(TOKENS_PER_SECOND))
    said = f"with 1 thread {worst:.2%} at most, asleep and below 1.6M tokens/s"
    shown.caption = script.goal(worst <= STALLED, said)
    return found, shown


def main() -> int:
    parser = script.parser(HELP, __file__)
    parser.add_argument("--samples", type=int, default=20_000, help="(default: 20,000)")
    parser.add_argument("--rounds", type=int, default=5, help="(default: 5)")
    parser.add_argument("--order", type=int, default=1_000_000, help="samples (default: 1,000,000)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    from varlen_sft.tools.environment import environment

    stamped, results = environment(), {}
    console = script.console()
    with tempfile.TemporaryDirectory() as folder:
        source = written(Path(folder), args.samples, args.seed)
        for size in SIZES:
            results[f"rates {size}"] = found = rates(source, size, args.rounds)
            console.print(rates_table(found, size))
        results["waiting"], shown = waits(source)
        console.print(shown)
    for name, of in (("epochs", epochs), ("edges", edges), ("balance", balance)):
        count = args.order // 5 if name == "balance" else args.order
        results[name], shown = of(count, args.seed)
        console.print(shown)
    return script.finish(console, args.json, stamped, results)


if __name__ == "__main__":
    sys.exit(main())
