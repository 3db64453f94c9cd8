"""The first line of a log: what was asked for, on what, with which versions and data."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Iterator
from typing import Any

import torch

from varlen_sft import __version__
from varlen_sft.data.store import Store
from varlen_sft.train.config import TrainConfig
from varlen_sft.train.config_out import flat
from varlen_sft.train.distributed import World
from varlen_sft.train.setup import Sets

__all__ = ["data_summary", "device_name", "log_header"]

PACKAGES = ("torch", "transformers", "peft")
LEFT_OUT = (
    "rejected",
    "untrained",
    "overlong_dropped",
    "overlong_truncated",
    "overlong_split",
    "overlong_parts_dropped",
    "overlong_parts_untrained",
    "overlong_runs_masked",
    "overlong_targets_lost",
)
"""Counts of a manifest that say what of the rows is in no sample, or not whole; see ``tally``."""


def log_header(config: TrainConfig, sets: Sets, here: World, steps: int | None) -> dict[str, Any]:
    """Plain values for the event "start".

    Args:
        sets: of ``prepare_sets``.
        steps: of the whole run.
    """
    return {
        "config": flat(config),
        "ranks": here.size,
        "steps": steps,
        "device": device_name(here),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": dict(_versions()),
        "data": data_summary(config, sets),
    }


def device_name(here: World) -> str:
    """Of this rank's device, as its maker calls it; a CPU is just that."""
    on_gpu = here.device.type == "cuda"
    return torch.cuda.get_device_name(here.device) if on_gpu else "CPU"


def data_summary(config: TrainConfig, sets: Sets) -> list[dict[str, Any]]:
    """What each source came to: rows, samples, tokens, supervised tokens, and what was left out.

    ``use`` is the name of the stage that trains it ("data" where there are none), or "validation".
    ``rows`` are None for a set that was not made of rows.
    """
    uses = [(stage.name, stage.train) for stage in config.all_stages]
    return [
        {"use": use, "source": source, **_came_to(Store(sets[source]))}
        for use, sources in [*uses, ("validation", config.data.valid)]
        for source in sources
    ]


def _came_to(store: Store) -> dict[str, Any]:
    counts = store.manifest["counts"]
    supervised = counts.get("targets")
    return {
        "fingerprint": store.fingerprint,
        "rows": counts.get("rows"),
        "samples": counts["samples"],
        "tokens": counts["tokens"],
        "supervised": int(store.supervised.sum()) if supervised is None else supervised,
        "left_out": {name: counts[name] for name in LEFT_OUT if counts.get(name)},
    }


def _versions() -> Iterator[tuple[str, str]]:
    yield "varlen_sft", __version__
    yield "python", platform.python_version()
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
