"""The folder in which parts are made, and the plan that says of what they are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from varlen_sft.data.files import write_whole
from varlen_sft.data.prepare_lock import empty
from varlen_sft.data.prepare_parts import part_numbers, part_path
from varlen_sft.data.prepare_plan import Plan, differences
from varlen_sft.errors import InputError, RunError

PARTS = ".parts"
_PLAN, _TOTAL = "plan.json", "total.json"


def open_parts(folder: Path, plan: Plan, force: bool) -> None:
    """Take up what an earlier run left, or begin.

    Raises:
        InputError: work on another plan is in the way, and ``force`` is not given.
        RunError: nothing can be written there.
    """
    if (folder / _PLAN).is_file():
        old = read_plan(folder)
        same = old.work == plan.work
        if same and old.names == plan.names:
            return
        if not same and not force and next(part_numbers(folder), None) is not None:
            raise InputError(
                "unfinished work of another fingerprint is in the way (it differs in "
                f"{differences(old.content, plan.content)}); --force removes it",
                file=folder,
            )
        if not same:
            empty(folder)
    _write(folder / _PLAN, plan.as_json())


def gather(folders: Sequence[Path]) -> list[Path]:
    """The parts of all chunks, in order; InputError if some are missing."""
    totals = [_read(f / _TOTAL)["chunks"] for f in folders if (f / _TOTAL).is_file()]
    if not totals:
        raise InputError("no shard has been finished yet", file=folders[0])
    found = {number: folder for folder in folders for number in part_numbers(folder)}
    missing = [number for number in range(totals[0]) if number not in found]
    if missing:
        shown = ", ".join(map(str, missing[:5])) + (", ..." if len(missing) > 5 else "")
        raise InputError(
            f"{len(missing)} of {totals[0]} chunks are missing ({shown}): of n shards, "
            "chunk k is made by shard k % n + 1",
            file=folders[0],
        )
    return [part_path(found[number], number) for number in range(totals[0])]


def read_plan(folder: Path) -> Plan:
    """The plan that the parts in a folder are of; InputError if there is none."""
    found = _read(folder / _PLAN)
    return Plan(found["content"], tuple(found["names"]), tuple(found["chunk"]))


def is_of(folder: Path, plan: Plan) -> bool:
    """Whether a folder holds work on this plan."""
    return (folder / _PLAN).is_file() and read_plan(folder).fingerprint == plan.fingerprint


def write_total(folder: Path, chunks: int) -> None:
    """Leave how many chunks there are, of all shards, for merge."""
    _write(folder / _TOTAL, {"chunks": chunks})


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file: no parts of a prepared set are here", file=path) from None
    except (OSError, ValueError) as error:
        raise InputError(f"is damaged: {error}", file=path) from None


def _write(path: Path, value: object) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
        write_whole(path, text.encode() + b"\n")
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error}") from None
