"""Makes things ahead of their consumer, in threads, and tells how long the consumer waited.

Threads, not processes: a pack of 4096 tokens takes a fraction of a millisecond to read and collate,
numpy and torch give up the interpreter for the copies, and nothing has to be sent from one process
to another. What is made comes out in the order of the items, whatever finished first.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from varlen_sft.errors import RunError

__all__ = ["Prefetch", "Stall"]

Item = TypeVar("Item")
Made = TypeVar("Made")


@dataclass
class Stall:
    """How the consumer's time was spent, in seconds. The first result, which nothing can be made
    ahead of, is counted apart."""

    first_s: float = 0.0
    waited_s: float = 0.0  # for all others
    elapsed_s: float = 0.0  # from the first result to the latest
    results: int = 0

    @property
    def share(self) -> float:
        """Of the elapsed time, waited."""
        return self.waited_s / self.elapsed_s if self.elapsed_s else 0.0


class Prefetch(Iterator[Made], Generic[Item, Made]):
    """``make(item)`` of each item, in order. A context manager: leaving it ends the threads.

    An exception of ``make`` or of the items is raised where their result would have come. A thread
    that cannot even hand over its error ends the iteration with RunError, and so does a fork, whose
    child has none of the threads: nobody waits for a result that nobody makes.

    Args:
        items: drawn in the workers, one at a time; may be endless.
        make: called in the workers, of several items at a time.
        workers: threads; 0 draws and makes each result when it is asked for.
        depth: results that are made or being made at a time; two per worker if None.
        stall: where the waiting is added up.

    Raises:
        ValueError: workers below 0, or a depth below 1.
    """

    def __init__(
        self,
        items: Iterable[Item],
        make: Callable[[Item], Made],
        *,
        workers: int = 1,
        depth: int | None = None,
        stall: Stall | None = None,
    ) -> None:
        depth = 2 * max(workers, 1) if depth is None else depth
        if workers < 0 or depth < 1:
            raise ValueError(
                f"workers must be at least 0 and depth at least 1, got {workers} and {depth}"
            )
        self.stall = stall or Stall()
        self._make, self._items = make, iter(items)
        self._began = 0.0
        self._closed = False
        self._process = os.getpid()
        self._drawing = threading.Lock()
        self._made: SimpleQueue[Future[Made] | RunError] = SimpleQueue()  # as the items
        self._pool = ThreadPoolExecutor(workers, "prefetch") if workers else None
        if self._pool is not None:
            for _ in range(depth):
                self._begin(self._pool)

    def __next__(self) -> Made:
        asked = time.perf_counter()
        try:
            made = self._here() if self._pool is None else self._taken(self._pool)
        except BaseException:
            self.close()
            raise
        self._count(asked, time.perf_counter())
        return made

    def __enter__(self) -> Prefetch[Item, Made]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads; what is being made is finished and thrown away."""
        self._closed = True
        if self._pool is not None and self._process == os.getpid():
            self._pool.shutdown(cancel_futures=True)

    def _here(self) -> Made:
        if self._closed:
            raise StopIteration
        return self._make(next(self._items))

    def _taken(self, pool: ThreadPoolExecutor) -> Made:
        if self._closed:
            raise StopIteration
        if self._process != os.getpid():
            raise RunError(
                f"results are made ahead in process {self._process}, and asked for in its child "
                f"{os.getpid()}, which has no threads: begin the iteration there"
            )
        next_one = self._made.get()
        if isinstance(next_one, RunError):
            raise next_one
        made = next_one.result()
        self._begin(pool)
        return made

    def _begin(self, pool: ThreadPoolExecutor) -> None:
        pool.submit(self._work).add_done_callback(self._ended)

    def _ended(self, work: Future[None]) -> None:
        """Hand over what ``_work`` could not."""
        error = None if work.cancelled() else work.exception()
        if error is not None:
            # No Future: where there was no room for one there may be none again.
            self._made.put(RunError(f"a thread that makes results ahead ended: {error!r}"))

    def _work(self) -> None:
        """Draw one item and make it; its result is waited for where it was drawn."""
        result: Future[Made] = Future()
        try:
            with self._drawing:
                if self._closed:
                    return
                self._made.put(result)
                item = next(self._items)
            result.set_result(self._make(item))
        except BaseException as error:  # StopIteration too: the consumer's business
            result.set_exception(error)

    def _count(self, asked: float, got: float) -> None:
        if not self.stall.results:
            self.stall.first_s, self._began = got - asked, got
        else:
            self.stall.waited_s += got - asked
            self.stall.elapsed_s = got - self._began
        self.stall.results += 1
