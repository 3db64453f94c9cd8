"""The demo as a page: curves, both ways of batching, answers, and one pack token by token."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.data.formats import Conversation
from varlen_sft.tools import pack_picture
from varlen_sft.tools.pack_picture import PackPicture, picture_pack
from varlen_sft.tools.page import Html, Series, details, document, line_chart, section, table, tag

__all__ = ["PackPicture", "picture_pack", "write_report"]

DEFAULT_MODEL = "SmolLM2-135M-Instruct"
PATHS = ("out", "model", "data")  # options that say where things lie on somebody's disk
MEASURES = (
    ("loss", "loss", lambda value: f"{value:.6f}"),
    ("tokens computed", "tokens_computed", lambda value: f"{value:,}"),
    ("step, median", "seconds_median", lambda value: f"{value:.3f} s"),
    ("real tokens/s", "real_tokens_per_second", lambda value: f"{value:,.1f}"),
    ("peak memory", "peak_bytes", lambda value: f"{value / 2**20:,.0f} MiB"),
)
STYLE = """
.bar { display: block; max-width: 7.5rem; height: 6px; margin: 4px 0 0; background: var(--a); }
td.measure { min-width: 8.2rem; }
.tiles { display: flex; flex-wrap: wrap; gap: 8px 40px; margin: 0 0 12px; }
.tiles div { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.tiles small { display: block; font-size: .85rem; font-weight: 400; }
.talk { border-top: 1px solid var(--line); margin: 0; padding: 10px 0; }
"""


def write_report(
    path: str | os.PathLike[str],
    summary: Mapping[str, Any],
    pack: PackPicture,
    prompts: Sequence[Conversation],
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        summary: what ``varlen-sft demo`` keeps in summary.json.
        pack: one pack to draw.
        prompts: the held-out conversations that were answered, in the order of the answers.

    Raises:
        ValueError: prompts and answers differ in number.
    """
    options, environment = summary["options"], summary["environment"]
    model = DEFAULT_MODEL if options["model"] == "None" else Path(options["model"]).name or "."
    title = f"varlen_sft: {model} fine-tuned without padding"
    made = f"{environment['date']} \u00b7 {environment['cpu']} \u00b7 {options['dtype']}"
    body = [
        tag("h1", title),
        tag("p", made, class_="dim"),
        _training(summary),
        _comparison(summary["comparison"]),
        _answers(summary, prompts),
        _pack(pack),
        _origin(summary),
    ]
    page = document(title, body, STYLE + pack_picture.STYLE)
    Path(path).write_text(page, encoding="utf-8", newline="\n")


# ------------------------------------------------------------------ training


def _training(summary: Mapping[str, Any]) -> Html:
    steps = summary["steps"]
    seconds = sum(step["step_time_s"] for step in steps)
    speed = sum(step["real_tokens"] for step in steps) / seconds
    before, after = (summary[when]["validation_loss"] for when in ("before", "after"))
    tiles = [
        _tile("validation_before", f"{before:.4f}", before, "validation loss before"),
        _tile("validation_after", f"{after:.4f}", after, "validation loss after"),
        _tile("steps", f"{len(steps):,}", len(steps), f"steps in {seconds:,.0f} s"),
        _tile("speed", f"{speed:,.0f}", speed, "real tokens/s while training"),
    ]
    return section("Training", tag("div", *tiles, class_="tiles"), _curves(steps))


def _tile(field: str, shown: str, value: float, text: str) -> Html:
    number = tag("span", shown, data_field=field, data_value=value)
    return tag("div", number, tag("small", text))


def _curves(steps: Sequence[Mapping[str, Any]]) -> Html:
    x = [step["step"] for step in steps]
    loss = Series("loss of the step", "loss", [step["loss"] for step in steps])
    speeds = [
        Series(
            kind,
            f"{kind}_tokens_per_s",
            [step[f"{kind}_tokens"] / step["step_time_s"] for step in steps],
            look,
        )
        for kind, look in (("real", "a"), ("supervised", "b"))
    ]
    return tag(
        "div",
        line_chart("Training loss per supervised token", x, [loss], x_label="step"),
        line_chart("Tokens per second", x, speeds, x_label="step", from_zero=True),
        class_="columns",
    )


# ---------------------------------------------------------------- comparison


def _comparison(compared: Mapping[str, Any]) -> Html:
    """A column per way of batching, so that it fits a narrow screen."""
    columns = compared["rows"]
    rows = [
        [tag("th", name, scope="row")]
        + [_cell(field, text(column[field]), column, columns) for column in columns]
        for name, field, text in MEASURES
    ]
    how = (
        f"{compared['conversations']} conversations, {compared['real_tokens']:,} real tokens, "
        f"forward and backward; {compared['rounds']} interleaved rounds, memory of a fresh "
        "process each. CPU times say nothing about a GPU."
    )
    return section(
        "The same conversations, padded and packed",
        _warning(compared),
        table(["", *(column["label"] for column in columns)], rows),
        _losses(compared),
        tag("p", how, class_="dim"),
    )


def _warning(compared: Mapping[str, Any]) -> Html:
    if not compared["disturbed"]:
        return Html("")
    text = "Other work disturbed these times: quote no ratio, run it again."
    names = ",".join(compared["disturbed"])
    return tag("p", text, class_="warning", data_field="disturbed", data_value=names)


def _cell(
    field: str, text: str, column: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]
) -> Html:
    value, padded = column[field], columns[0]
    data = {"data_field": field, "data_candidate": column["candidate"], "data_value": value}
    if field == "loss":
        return tag("td", text, class_="measure", **data)
    notes = []
    if field == "seconds_median":
        notes.append(_spread(column))
    if column is not padded:
        data["data_ratio"] = value / padded[field]
        notes.append(tag("small", f"{value / padded[field]:.2f}\u00d7 of padded"))
    share = value / max(other[field] for other in columns)
    notes.append(tag("i", class_="bar", style=f"width:{7.5 * share:.2f}rem"))
    return tag("td", text, *notes, class_="measure", **data)


def _spread(column: Mapping[str, Any]) -> Html:
    low, high = column["seconds_min"], column["seconds_max"]
    return tag("small", f"[{low:.3f} \u2013 {high:.3f}]", data_min=low, data_max=high)


def _losses(compared: Mapping[str, Any]) -> Html:
    difference, bound = (
        tag("b", f"{compared[field]:.2e}", data_field=field, data_value=compared[field])
        for field in ("loss_difference", "loss_bound")
    )
    return tag("p", "The losses differ by ", difference, "; the bound is ", bound, ".")


# ---------------------------------------------------------- answers and pack


def _answers(summary: Mapping[str, Any], prompts: Sequence[Conversation]) -> Html:
    before, after = (summary[when]["answers"] for when in ("before", "after"))
    talks = [
        _talk(prompt, first, second)
        for prompt, first, second in zip(prompts, before, after, strict=True)
    ]
    note = "Greedy answers to conversations that were held out of training."
    return section("Before and after", tag("p", note, class_="dim"), *talks)


def _talk(prompt: Conversation, before: str, after: str) -> Html:
    *history, question, held_out = prompt.messages
    said = [
        ("asked", question.content),
        ("before", before),
        ("after", after),
        ("held-out answer", held_out.content),
    ]
    pairs: list[Html] = []
    if history:
        earlier = tag("div", "\n".join(f"{m.role}: {m.content}" for m in history))
        unfolds = tag("details", tag("summary", f"{len(history)} messages"), earlier)
        pairs += tag("dt", "earlier"), tag("dd", unfolds, data_said="earlier")
    for name, text in said:
        pairs += tag("dt", name), tag("dd", text, data_said=name)
    return tag("dl", *pairs, class_="talk")


def _pack(pack: PackPicture) -> Html:
    targets = sum(label >= 0 for label in pack.labels)
    sequences = len(set(pack.edges)) - 1
    what = (
        f"{len(pack.ids):,} tokens in {sequences} sequences, {targets:,} of them with a target, "
        f"{pack.pad_tokens:,} pad tokens. No token sees another sequence, and positions begin at 0 "
        "in each. \u21b5 is a newline, \u00b7 a space, \ufffd a part of a character. Hover for ids."
    )
    return section("One pack, token by token", tag("p", what), pack_picture.draw(pack))


def _origin(summary: Mapping[str, Any]) -> Html:
    options = {key: value for key, value in summary["options"].items() if key not in PATHS}
    return section(
        "How it was measured",
        details("Machine and versions", summary["environment"]),
        details("Options", options),
    )
