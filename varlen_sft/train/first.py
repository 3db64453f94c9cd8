"""What one rank makes and all need; and what is said when a disk does not take what is written."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.errors import RunError
from varlen_sft.train.distributed import RankLost, World

if TYPE_CHECKING:
    from torch.distributed import Store

__all__ = ["from_first", "naming_disk_errors"]

_TELLING_S = 5.0  # rank 0 has failed: so long it waits until the others have heard why
_POLL_S = 0.05


def from_first(here: World, name: str, make: Callable[[], Any]) -> Any:
    """What rank 0 makes, however long that takes, on all ranks.

    Args:
        here: the ranks.
        name: of what is made, once per run.
        make: called on rank 0; what it gives has to fit JSON.

    Raises:
        RankLost: on other ranks, if rank 0 could not make it; rank 0 raises its own error.
    """
    if here.store is None:
        return make()
    if here.is_first:
        return _told_to_all(make, here.store, name, here.size - 1)
    while not here.store.check([name]):
        if here.store.check(["rank 0"]):  # its note, see World.naming_lost_ranks
            raise RankLost(f"rank 0 {here.store.get('rank 0').decode()}")
        time.sleep(_POLL_S)
    told = json.loads(here.store.get(name))
    here.store.add(f"{name} heard", 1)
    if "error" in told:
        raise RankLost(f"rank 0 ended with {told['error']}")
    return told["made"]


def _told_to_all(make: Callable[[], Any], store: Store, name: str, others: int) -> Any:
    """What was made, or what went wrong, which others have to read: the store may end with us."""
    told: dict[str, Any] = {"error": "nothing, it was stopped"}
    try:
        told = {"made": make()}
    except Exception as error:
        told = {"error": f"{type(error).__name__}: {error}"}
        raise
    finally:
        store.set(name, json.dumps(told))
        until = time.monotonic() + _TELLING_S
        while (heard := store.add(f"{name} heard", 0)) < others and time.monotonic() < until:
            time.sleep(_POLL_S)
        if heard == others:  # the store may outlive this run, and serve the next
            store.delete_key(name)
            store.delete_key(f"{name} heard")
    return told["made"]


@contextmanager
def naming_disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the system says of files into RunError: a full disk, a quota.

    Args:
        folder: of the run, named where the system names no file.
    """
    try:
        yield
    except OSError as error:
        raise RunError(f"{error.filename or folder}: {error.strerror or error}") from error
    except Exception as error:
        # Of safetensors, whose errors are no OSErrors, whatever the system said.
        if type(error).__name__ != "SafetensorError":
            raise
        raise RunError(f"{folder}: {error}") from error
