"""How the demo looks: headings, one bar at a time, and the tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from varlen_sft.data.formats import Conversation
from varlen_sft.data.packing import PackingStats
from varlen_sft.data.sample import Sample
from varlen_sft.models.config import LlamaConfig
from varlen_sft.train.state import StepRecord


def heading(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


@contextmanager
def bar(console: Console) -> Iterator[Callable[[float, str], None]]:
    """A bar that is gone when its work is done; takes (share done, what is being done)."""
    text = TextColumn("{task.description}", markup=False)
    columns = (BarColumn(bar_width=24), text, TimeElapsedColumn())
    hidden = not console.is_terminal  # it would leave an empty line in a file
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, text: progress.update(task, completed=share, description=text)


def model(console: Console, folder: Path, config: LlamaConfig) -> None:
    console.print(
        f"{escape(str(folder))}\n{config.num_layers} layers, C {config.hidden_size}, "
        f"H {config.num_heads}, K {config.num_kv_heads}, D {config.head_dim}, "
        f"V {config.vocab_size:,}, RoPE {config.rope_parameters['rope_type']}",
        highlight=False,
    )


def counts(console: Console, counts: Mapping[str, int]) -> None:
    for kind, name in (
        ("chatterbot", "real conversations (chatterbot-corpus, English)"),
        ("register_machine", "register machine dialogues (answers can be computed)"),
    ):
        console.print(
            f"{counts[f'{kind}_train']:,} + {counts[f'{kind}_validation']:,} held out: {name}; "
            f"{counts[f'{kind}_duplicates']:,} duplicates left out",
            highlight=False,
        )


def data(console: Console, stats: PackingStats, samples: Sequence[Sample], straddles: int) -> None:
    rows = sum(len(sample) - 1 for sample in samples)
    supervised = sum(int((sample.token_weights[1:] > 0).sum()) for sample in samples)
    console.print(
        f"{stats.samples:,} conversations, {rows:,} tokens, {supervised / rows:.0%} supervised "
        f"(answers and their stop tokens)\n"
        f"{stats.packs:,} packs of {stats.max_tokens:,}: fill {stats.fill:.2%}, no pad token",
        highlight=False,
    )
    if straddles:
        console.print(f"{straddles:,} tokens that would straddle an answer's start were cut there")


def trained(console: Console, records: Sequence[StepRecord]) -> None:
    seconds = sum(record.step_time_s for record in records)
    tokens = sum(record.real_tokens for record in records)
    supervised = sum(record.supervised_tokens for record in records)
    tenth = max(1, len(records) // 10)
    first, last = (
        sum(r.loss for r in part) / tenth for part in (records[:tenth], records[-tenth:])
    )
    console.print(
        f"{len(records)} steps in {seconds:.0f} s: loss {first:.3f} -> {last:.3f} "
        f"(means of the first and last {tenth}), {tokens / seconds:,.0f} real tokens/s, "
        f"{supervised / seconds:,.0f} supervised tokens/s, "
        f"fill {sum(r.fill for r in records) / len(records):.1%}",
        highlight=False,
    )


def comparison(console: Console, compared: Mapping[str, Any]) -> None:
    """One row per way of batching; ratios against padding."""
    table = Table()
    for name in ("", "loss", "tokens computed", "step", "real tokens/s", "peak memory"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    padded = compared["rows"][0]
    for row in compared["rows"]:
        table.add_row(
            row["label"],
            f"{row['loss']:.6f}",
            f"{row['tokens_computed']:,}",
            f"{row['seconds_median']:.2f} s",
            f"{row['real_tokens_per_second']:,.0f}"
            f" ({row['real_tokens_per_second'] / padded['real_tokens_per_second']:.2f}x)",
            f"{row['peak_bytes'] / 2**20:,.0f} MiB"
            f" ({row['peak_bytes'] / padded['peak_bytes']:.2f}x)",
        )
    console.print(table)
    console.print(
        f"{compared['conversations']} conversations, {compared['real_tokens']:,} real tokens, "
        f"forward and backward, median of {compared['rounds']} interleaved rounds; memory of a "
        f"fresh process each.\nThe losses differ by {compared['loss_difference']:.2e}; the bound "
        f"is {compared['loss_bound']:.2e}. Measured on this CPU: no GPU figure.",
        highlight=False,
    )
    if compared["disturbed"]:
        console.print("[red]Other work disturbed these times: quote no ratio, run it again.[/red]")


def validation(console: Console, before: float, after: float, packs: int) -> None:
    console.print(
        f"validation loss {before:.4f} -> {after:.4f} ({packs} packs of held-out conversations)",
        highlight=False,
    )


def answers(
    console: Console,
    prompts: Sequence[Conversation],
    before: Sequence[str],
    after: Sequence[str],
) -> None:
    for prompt, first, second in zip(prompts, before, after, strict=True):
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_column(style="dim", no_wrap=True)
        table.add_column()
        table.add_row("asked", escape(prompt.messages[-2].content))
        table.add_row("before", escape(first))
        table.add_row("after", escape(second))
        table.add_row("held-out answer", escape(prompt.messages[-1].content))
        console.print(table)
        console.print()


def files(console: Console, out: Path, train_file: Path) -> None:
    heading(console, "Files")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for path, what in (
        (out / "report.html", "curves, the table above, and a pack drawn token by token"),
        (out / "checkpoint", "AutoModelForCausalLM.from_pretrained opens it"),
        (out / "log.jsonl", "one line per step"),
        (out / "summary.json", "everything shown above"),
        (train_file, "the conversations, one per line"),
    ):
        table.add_row(escape(str(path)), f"[dim]{what}[/dim]")
    console.print(table)
