"""The screen and the page of ``varlen-sft plan``."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.text import Text

from varlen_sft.data.plan import Bin, Plan, Spread
from varlen_sft.tools.page import Html, document, section, table, tag
from varlen_sft.words import count

__all__ = ["facts", "histogram_lines", "plan_page", "screen"]

BAR = 40  # cells of the longest bar
EIGHTHS = " \u258f\u258e\u258d\u258c\u258b\u258a\u2589"
STYLE = """
.bars td:nth-child(4) { min-width: 12rem; width: 100%; }
.bars td { padding-top: .1rem; padding-bottom: .1rem; border: 0; white-space: nowrap; }
.bar { display: block; height: .9rem; min-width: 1px; margin-top: .3rem; background: var(--a); }
"""


def screen(console: Console, plan: Plan, title: str) -> None:
    """A line per fact, and the histogram of lengths."""
    console.print(Text(title, "bold"), soft_wrap=True)
    told = facts(plan)
    width = max(map(len, told)) + 2
    for name, value in told.items():
        style = "red" if name == "over-long" and plan.overlong.samples else ""
        line = Text.assemble((name.ljust(width), "bold"), (value, style))
        console.print(line, soft_wrap=True)
    console.print(Text("\nlengths before packing", "bold"))
    for text in histogram_lines(plan.histogram):
        console.print(Text(text), soft_wrap=True)


def facts(plan: Plan) -> dict[str, str]:
    """What to tell, line by line, as text."""
    options, packing = plan.options, plan.packing
    told = {
        "samples": f"{plan.samples:,} of {count(plan.tokens, 'token')}, {plan.supervised:,} "
        f"supervised ({plan.supervised / plan.tokens:.1%})",
        "over-long": _overlong(plan),
        "packs": f"{packing.packs:,} of at most {count(options.max_tokens, 'token')} "
        f"({options.method}), {packing.fill:.2%} full, {packing.samples / packing.packs:.1f} "
        f"samples in each, at most {packing.most_samples:,}",
        "steps": f"{plan.steps:,} per epoch, {_step(plan)}",
        "tokens per step": _spread(plan.step_tokens),
        "supervised per step": _spread(plan.step_supervised),
        "imbalance": _imbalance(plan),
        "FLOPs per epoch": "unknown, without --model",
    }
    wanted = f"{count(plan.steps_wanted, 'step')} for {count(options.epochs, 'epoch')}"
    if plan.flops:
        each = plan.flops
        told["FLOPs per epoch"] = (
            f"{each.total:.3e}: layers {each.layers / each.total:.1%}, attention "
            f"{each.attention / each.total:.1%}, head {each.head / each.total:.1%}; "
            f"{each.total / plan.steps:.3e} per step"
        )
        wanted += f", {each.total * options.epochs:.3e} FLOPs"
    return told | {"wanted": wanted}


def _overlong(plan: Plan) -> str:
    over = plan.overlong
    if not over.samples:
        return f"none, more than {count(plan.options.max_tokens, 'token')} would be"
    what = {
        "drop": "dropped",
        "truncate": f"truncated to {count(over.kept_tokens, 'token')}, fewer where conversations "
        "are cut after an answer",
        "split": f"split into {count(over.kept_samples, 'part')}, more and shorter ones where "
        "conversations are cut between turns",
    }[over.policy]
    return (
        f"{over.samples:,} of {count(over.tokens, 'token')}, the longest {over.longest:,}: {what}"
    )


def _step(plan: Plan) -> str:
    """What a step is made of."""
    options = plan.options
    packs = options.step_packs
    cells = f"{count(options.ranks, 'rank')} x {count(options.accumulate, 'micro-batch')}"
    last = "" if plan.last_step_packs == packs else f", the last of {plan.last_step_packs:,}"
    return f"each of {count(packs, 'pack')} ({cells}){last}"


def _spread(of: Spread) -> str:
    return f"{of.mean:,.0f} on average, {of.least:,.0f} to {of.most:,.0f}"


def _imbalance(plan: Plan) -> str:
    """Of the full steps: the last one cannot be even."""
    options, of = plan.options, plan.imbalance
    if options.ranks == 1:
        return "none, there is one rank"
    if not of.mean:
        return "no step is full"
    cost = f"{plan.cost_a:,} T + sum l^2" if plan.cost_a else "T, tokens alone without --model"
    return (
        f"most / mean cost of a micro-batch {of.mean:.4f} on average, 99 % below {of.p99:.4f}, "
        f"worst {of.most:.4f} (balance {options.balance}); ranks wait {plan.waiting:.2%} of the "
        f"time; cost = {cost}"
    )


# ----------------------------------------------------------------- histogram


def histogram_lines(bins: tuple[Bin, ...]) -> Iterator[str]:
    """A line per bin: lengths, samples, the share of all tokens, and a bar of the samples."""
    rows = list(_rows(bins))
    if not rows:
        return
    widths = [max(len(row[k]) for row in rows) for k in range(3)]
    most = max(b.samples for b in bins)
    for row, each in zip(rows, bins, strict=True):
        cells = "  ".join(text.rjust(width) for text, width in zip(row, widths, strict=True))
        yield f"{cells}  {_bar(each.samples, most)}".rstrip()


def _rows(bins: tuple[Bin, ...]) -> Iterator[tuple[str, str, str]]:
    total = sum(b.tokens for b in bins)
    for b in bins:
        yield (
            f"{b.low:,} to {b.high - 1:,}",
            count(b.samples, "sample"),
            f"{b.tokens / max(total, 1):.1%} of tokens",
        )


def _bar(value: int, most: int) -> str:
    """In eighths of a cell, never empty for what is not 0."""
    eighths = max(round(8 * BAR * value / most), int(value > 0)) if most else 0
    return "\u2588" * (eighths // 8) + EIGHTHS[eighths % 8].strip()


# ---------------------------------------------------------------------- page


def plan_page(plan: Plan, title: str) -> str:
    """A page that needs nothing else."""
    pairs: list[Html] = []
    for name, value in facts(plan).items():
        pairs += tag("dt", name), tag("dd", value, data_field=name)
    body = [
        tag("h1", title),
        tag("dl", *pairs),
        section("Lengths before packing", _bars(plan.histogram)),
    ]
    return document(f"varlen-sft plan: {title}", body, STYLE)


def _bars(bins: tuple[Bin, ...]) -> Html:
    most = max((b.samples for b in bins), default=1)
    cells = []
    for row, b in zip(_rows(bins), bins, strict=True):
        bar = tag("span", class_="bar", style=f"width: {100 * b.samples / most:.2f}%")
        cells.append([*row, tag("td", bar, data_samples=b.samples)])
    return tag("div", table(["length", "samples", "tokens", ""], cells), class_="bars")
