"""``OUT/report.html``: a run on one page, made of its log alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from varlen_sft.data.files import write_whole
from varlen_sft.errors import InputError
from varlen_sft.tools.page import Html, details, document, section, table, tag
from varlen_sft.tools.run_charts import CHART_STYLE, charts
from varlen_sft.tools.run_samples import SAMPLE_STYLE, samples_section, short_source
from varlen_sft.train.run_log import RunLog, read_run_log
from varlen_sft.words import count, listed

__all__ = ["run_page", "write_run_report"]

LOG, REPORT = "log.jsonl", "report.html"
_PLACES = ("model.name", "data.train", "data.valid", "data.cache", "data.template", "run.out")
"""Keys that say where things lie on somebody's disk; the page goes to others."""
_LEFT_OUT = {
    "rejected": "cannot be used",
    "untrained": "train nothing",
    "overlong_dropped": "too long, dropped",
    "overlong_truncated": "too long, cut off",
    "overlong_split": "too long, split",
    "overlong_parts_dropped": "parts too long, dropped",
    "overlong_parts_untrained": "parts that train nothing",
    "overlong_runs_masked": "answers cut off, not trained",
    "overlong_targets_lost": "targets lost with them",
}
"""See ``train.header.LEFT_OUT``."""
STYLE = """
.tiles { display: flex; flex-wrap: wrap; gap: 12px 40px; margin: 12px 0; }
.tiles div { font-size: 1.5rem; font-weight: 600; line-height: 1.3; }
.tiles small { display: block; font-size: .85rem; font-weight: 400; }
td.number { text-align: right; white-space: nowrap; }
@media print {
  :root { color-scheme: light; --bg: #fff; --fg: #000; --dim: #444; --line: #bbb; --card: #fff;
    --a: #0b62c4; --b: #b0480a; --bad: #c2172b; --good: #1a7f37; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  figure, .talk, tr, .tiles { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .columns { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; }
}
"""


def write_run_report(out: Path) -> Path:
    """Write ``report.html`` into a run's folder, of its log; whether the run has ended or not.

    Returns:
        Where it is.

    Raises:
        InputError: there is no log of a run, or the page cannot be written.
    """
    page, path = run_page(read_run_log(out / LOG)), out / REPORT
    try:
        write_whole(path, page.encode())
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=path) from None
    return path


def run_page(log: RunLog) -> str:
    """The page, which needs no other file and no network."""
    config = log.header.get("config") or {}
    name = str(config.get("model.name", "")).rstrip("/").rpartition("/")[2] or "a model"
    title = f"varlen_sft: {name}, {_length(log)}"
    body = [
        tag("h1", title),
        tag("p", _origin(log), class_="dim"),
        *_notes(log),
        tag("div", *_tiles(log), class_="tiles"),
        section("Curves", _curves(log)),
        samples_section(log.samples),
        _data(log.header.get("data") or ()),
        section("How it was run", *_settings(log)),
    ]
    return document(title, body, STYLE + CHART_STYLE + SAMPLE_STYLE)


def _length(log: RunLog) -> str:
    done = log.steps[-1]["step"] if log.steps else 0
    return f"{done:,} of {count(log.header.get('steps') or done, 'step')}"


def _origin(log: RunLog) -> str:
    """Where and when it was run last."""
    header = log.header
    ranks = count(header.get("ranks", 1), "rank")
    facts = [header.get("date"), header.get("device"), ranks]
    facts.append((header.get("config") or {}).get("model.dtype"))
    return " \u00b7 ".join(str(fact) for fact in facts if fact)


def _notes(log: RunLog) -> Iterator[Html]:
    """What a reader has to know before the numbers."""
    if log.went_on:
        steps = listed([f"{step:,}" for step in log.went_on])
        text = (
            f"It was stopped and went on after step {steps}; steps that were undone are left out."
        )
        yield tag("p", text, class_="dim", data_field="went_on", data_value=len(log.went_on))
    skipped = sum(not step.get("updated", True) for step in log.steps)
    if skipped:
        text = f"In {count(skipped, 'step')} nothing was supervised: no weight was moved."
        yield tag("p", text, class_="warning", data_field="skipped", data_value=skipped)
    if log.unreadable:
        text = f"{count(log.unreadable, 'line')} of the log cannot be read, as a kill leaves them."
        yield tag("p", text, class_="dim", data_field="unreadable", data_value=log.unreadable)


# ---------------------------------------------------------------------- numbers


def _tiles(log: RunLog) -> Iterator[Html]:
    steps, held_out = log.steps, log.validations
    if not steps:
        return
    seconds = sum(step["step_time_s"] for step in steps)
    tokens = sum(step["real_tokens"] for step in steps)
    supervised = sum(step["supervised_tokens"] for step in steps)
    stall = sum(step.get("stall_s", 0.0) for step in steps) / seconds
    yield _tile("first_loss", f"{steps[0]['loss']:.4f}", steps[0]["loss"], "loss of the first step")
    yield _tile("last_loss", f"{steps[-1]['loss']:.4f}", steps[-1]["loss"], "of the last")
    if held_out:
        last, best = held_out[-1], min(held_out, key=lambda event: event["loss"])
        yield _tile("last_validation", f"{last['loss']:.4f}", last["loss"], "held out, last")
        text = f"best, after step {best['step']:,}"
        yield _tile("best_validation", f"{best['loss']:.4f}", best["loss"], text)
    share = (
        f"real tokens, {supervised / tokens:.1%} of them supervised" if tokens else "real tokens"
    )
    yield _tile("tokens", f"{tokens:,}", tokens, share)
    yield _tile("speed", f"{tokens / seconds:,.0f}", tokens / seconds, "real tokens/s")
    yield _tile("seconds", _clock(seconds), seconds, "in steps (h:mm:ss)")
    yield _tile("stall", f"{stall:.1%}", stall, "of it waiting for the loader")


def _tile(field: str, shown: str, value: float, text: str) -> Html:
    number = tag("span", shown, data_field=field, data_value=value)
    return tag("div", number, tag("small", text))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _curves(log: RunLog) -> Html:
    if not log.steps:
        return tag("p", "No step is logged yet.")
    return tag("div", *charts(log), class_="columns")


# ------------------------------------------------------------------------- data


def _data(sources: Sequence[Mapping[str, Any]]) -> Html:
    """A row per source, and what was left out of it; nothing where the log does not tell."""
    if not sources:
        return Html("")
    head = ["source", "for", "rows", "samples", "tokens", "supervised", "left out"]
    return section("Data", table(head, [_source(source) for source in sources]))


def _source(source: Mapping[str, Any]) -> list[Html]:
    share = source["supervised"] / max(source["tokens"], 1)
    name = tag("th", short_source(source["source"]), scope="row")
    left = [
        f"{number:,} {_LEFT_OUT.get(kind, kind)}" for kind, number in source["left_out"].items()
    ]
    told = tag("td", ", ".join(left) or "nothing", data_field="left_out", data_value=len(left))
    supervised = _number("supervised", source["supervised"], f" ({share:.1%})")
    counts = [_number(field, source[field]) for field in ("rows", "samples", "tokens")]
    return [name, tag("td", source["use"]), *counts, supervised, told]


def _number(field: str, value: int | None, more: str = "") -> Html:
    shown = "" if value is None else f"{value:,}{more}"
    return tag("td", shown, class_="number", data_field=field, data_value=value)


# --------------------------------------------------------------------- settings


def _settings(log: RunLog) -> Iterator[Html]:
    config = dict(log.header.get("config") or {})
    stages = config.pop("stages", None) or []
    shown = {key: value for key, value in config.items() if key not in _PLACES}
    yield details("Versions", log.header.get("versions") or {})
    pairs: list[Html] = []
    for key, value in shown.items():
        pairs += tag("dt", key), tag("dd", _value(value), data_key=key)
    yield tag("details", tag("summary", "Configuration"), tag("dl", *pairs))
    if stages:
        starts = {stage["name"]: f"from step {stage['start_training_step']:,}" for stage in stages}
        yield details("Stages", starts)


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
