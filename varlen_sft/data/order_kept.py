"""Things that are made once, kept a while, and made before they are asked for."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Generic, TypeVar

__all__ = ["Kept"]

Made = TypeVar("Made")


class Kept(Generic[Made]):
    """``make(number)`` by number, each made once, whoever asks. Two are kept: what was asked for
    last, and what was made last.

    Safe to use from several threads, of which one makes at a time, and after a fork.

    Args:
        make: also called in threads of its own, by ``begin``.
        name: of those threads.
    """

    def __init__(self, make: Callable[[int], Made], name: str) -> None:
        self._make, self._name = make, name
        self._anew()

    def get(self, number: int) -> Made:
        """Make it, or wait for who has begun to. Its exception is raised, and it is not kept."""
        result, mine = self._claimed(number, asked=True)
        if mine:
            self._work(number, result)
        return result.result()

    def begin(self, number: int, then: Callable[[Made], object] = lambda _: None) -> None:
        """Make it in a thread, unless it is there. A process that ends waits for that thread.

        Args:
            then: called in the thread with what was made. What fails in it is not told here: it
                fails again where it is asked for.
        """
        result, mine = self._claimed(number, asked=False)
        if mine:
            threading.Thread(
                target=self._begun, args=(number, result, then), name=self._name
            ).start()

    def _begun(self, number: int, result: Future[Made], then: Callable[[Made], object]) -> None:
        self._work(number, result)
        with suppress(Exception):
            then(result.result())

    def _anew(self) -> None:
        self._process = os.getpid()
        self._lock, self._making = threading.Lock(), threading.RLock()
        self._known: dict[int, Future[Made]] = {}
        self._asked: int | None = None

    def _claimed(self, number: int, *, asked: bool) -> tuple[Future[Made], bool]:
        if self._process != os.getpid():  # a fork copies locks as they are held, but no thread
            self._anew()
        with self._lock:
            mine = number not in self._known
            if mine:
                for old in self._known.keys() - {self._asked}:
                    del self._known[old]
                self._known[number] = Future()
            if asked:
                self._asked = number
            return self._known[number], mine

    def _work(self, number: int, result: Future[Made]) -> None:
        try:
            with self._making:
                made = self._make(number)
        except BaseException as error:  # KeyboardInterrupt, too: others wait for the result
            with self._lock:
                if self._known.get(number) is result:
                    del self._known[number]
            result.set_exception(error)
        else:
            result.set_result(made)
