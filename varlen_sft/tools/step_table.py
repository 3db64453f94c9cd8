"""The step benchmark's table: what was computed, by whom, how fast, and how far to believe it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from varlen_sft.models.config import LlamaConfig
from varlen_sft.tools.step_candidates import Load, chat_like_lengths

__all__ = [
    "CPU_NOTE",
    "computed_when_padded",
    "describe",
    "disturbed",
    "padding_factor",
    "render",
    "stamp",
]

WIDE_SPREAD = 1.5
CPU_NOTE = "CPU times. They say nothing about a GPU, where no number of this table was measured."


def describe(load: Load) -> dict[str, Any]:
    """The load in numbers."""
    samples, config = load.samples(), LlamaConfig.from_folder(load.model)
    lengths = [len(sample) for sample in samples]
    scored = sum(int((sample.token_weights > 0).sum()) for sample in samples)
    return {
        "dtype": str(load.dtype).removeprefix("torch."),
        "seed": load.seed,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "vocab_size": config.vocab_size,
        "lengths": lengths,
        "real_tokens": sum(lengths),
        "supervised_share": scored / sum(lengths),
        "padding_factor": computed_when_padded(lengths) / sum(lengths),
        "padding_factor_median_of_seeds": padding_factor(load),
    }


def computed_when_padded(lengths: Sequence[int], micro_batch: int = 4) -> int:
    """Tokens that a step computes if every ``micro_batch`` samples are padded to their longest."""
    starts = range(0, len(lengths), micro_batch)
    return sum(max(group) * len(group) for s in starts if (group := lengths[s : s + micro_batch]))


def padding_factor(load: Load, draws: int = 500) -> float:
    """Median over seeds of tokens computed when padded per real token: is this draw a lucky one?"""
    draw = (chat_like_lengths(load.tokens, seed) for seed in range(draws))
    return statistics.median(computed_when_padded(lengths) / sum(lengths) for lengths in draw)


def render(result: Mapping[str, Any]) -> Table:
    """The table of one dtype."""
    title = f"One training step in {result['dtype']}, {result['real_tokens']} real tokens, CPU"
    table = Table(title=title, caption=caption(result), caption_justify="left")
    table.add_column("candidate", no_wrap=True)
    columns = ("loss", "tokens\ncomputed", "step, s [min - max]", "x\nfloor", "real\ntokens/s")
    for column in (*columns, "vs\npadded", "peak\nMB", "memory\nvs padded"):
        table.add_column(escape(column), justify="right", no_wrap=True)
    for row in result["rows"]:
        table.add_row(row["candidate"], *(escape(cell) for cell in cells(row)))
    return table


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    seconds = (row["seconds_median"], row["seconds_min"], row["seconds_max"])
    return (
        "" if row["loss"] is None else f"{row['loss']:.6f}",
        str(row["tokens_computed"]),
        "{:.2f} [{:.2f} - {:.2f}]".format(*seconds),
        f"{row['times_floor']:.2f}",
        f"{row['real_tokens_per_second']:.0f}",
        f"{row['speedup_over_padded']:.2f}x",
        f"{row['peak_bytes'] / 1e6:.0f}" if "peak_bytes" in row else "",
        f"{row['memory_over_padded']:.2f}x" if "peak_bytes" in row else "",
    )


def disturbed(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Candidates whose slowest step took over 1.5 times their fastest.

    Other work on the machine rarely falls on all alike: no ratio of such a table is to be quoted.
    """
    return [r["candidate"] for r in rows if r["seconds_max"] > WIDE_SPREAD * r["seconds_min"]]


def caption(result: Mapping[str, Any]) -> str:
    """What was computed, and whether the machine was quiet enough to believe the times."""
    wide = disturbed(result["rows"])
    noise = f"\n[red]Disturbed: max > {WIDE_SPREAD} min of {', '.join(wide)}. Quote no ratio[/red]"
    return (
        f"{len(result['lengths'])} samples of {min(result['lengths'])} to {max(result['lengths'])} "
        f"tokens, {result['supervised_share']:.0%} supervised; {result['layers']} layers, "
        f"C = {result['hidden_size']}, V = {result['vocab_size']}.\n"
        f"Padding computes {result['padding_factor']:.2f}x the real tokens here; the median of 500 "
        f"seeds is {result['padding_factor_median_of_seeds']:.2f}x.\n"
        f"Losses are within {result['loss_bound']:.1e} of {result['loss_fp32_padded']:.6f}, "
        f"that of hf padded in fp32.{noise if wide else ''}"
    )


def stamp(environment: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {v}" for name, v in environment["versions"].items())
    extension = "with" if environment["cpp_extension"] else "WITHOUT"
    return (
        f"{CPU_NOTE}\n{environment['cpu']}, {environment['cores']} cores, "
        f"{environment['threads']} threads, load {environment['load_before']} before; "
        f"{versions}; {extension} the C++ extension; "
        f"commit {environment['commit'] or 'unknown'}; {environment['date']}"
    )
