"""Worker processes, and chunks dealt to them in order."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait

from varlen_sft.data.prepare_worker import Chunk, Job, Outcome
from varlen_sft.errors import RunError

_ENVIRONMENT = {
    # A process is one thread wide: there are as many as are asked for.
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    # glibc: what loading a tokenizer takes for a moment goes back, instead of staying in holes.
    "MALLOC_ARENA_MAX": "2",
    "MALLOC_TRIM_THRESHOLD_": "131072",
    "MALLOC_MMAP_THRESHOLD_": "131072",
}


_PROGRAM = "from varlen_sft.data.prepare_worker import main; main()"


class WorkerPool:
    """Up to so many worker processes, started as they are needed; a context manager."""

    def __init__(self, job: Job, workers: int) -> None:
        self._job, self._workers = job, workers
        self._processes: dict[Connection, subprocess.Popen] = {}
        self._busy: dict[Connection, Chunk] = {}

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *error: object) -> None:
        for connection, process in self._processes.items():
            connection.close()
            if error[0] is not None:
                process.terminate()
        for process in self._processes.values():
            process.wait()

    def outcomes(self, chunks: Iterable[Chunk]) -> Iterator[Outcome]:
        """The outcome of each chunk, as they come. A worker has one chunk at a time.

        Chunks are taken in order, the next one only when a worker is free for the one before it.

        Raises:
            RunError: a worker died.
        """
        for chunk in chunks:
            connection = self._idle()
            while connection is None:
                yield from self._finished()
                connection = self._idle()
            self._busy[connection] = chunk
            try:
                connection.send(chunk)
            except ConnectionError:
                raise self._died(connection) from None
        while self._busy:
            yield from self._finished()

    def _idle(self) -> Connection | None:
        for connection in self._processes:
            if connection not in self._busy:
                return connection
        return self._start() if len(self._processes) < self._workers else None

    def _start(self) -> Connection:
        here, there = Pipe()
        # The same modules as here are found there: -P keeps the current folder out, unless it
        # stands in sys.path.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(there.fileno()), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            pass_fds=[there.fileno()],
            env={**os.environ, **_ENVIRONMENT, "PYTHONPATH": path},
        )
        there.close()
        self._processes[here] = process
        here.send(self._job)
        return here

    def _finished(self) -> Iterator[Outcome]:
        for connection in wait(list(self._busy)):
            assert isinstance(connection, Connection)
            try:
                outcome = connection.recv()
            except (EOFError, ConnectionError):
                raise self._died(connection) from None
            del self._busy[connection]
            yield outcome

    def _died(self, connection: Connection) -> RunError:
        status, chunk = self._processes[connection].wait(), self._busy[connection]
        how = f"was killed by signal {-status} (too little memory?)" if status < 0 else "failed"
        first, last = chunk.rows[0][0], chunk.rows[-1][0]
        return RunError(
            f"a worker {how} at chunk {chunk.number}, rows {first} to {last} of {chunk.name}; what "
            "is finished is kept: run the same again to go on"
        )
