"""The curves of a run, of every step that was.

Of many steps a curve keeps the lowest and the highest of neighbouring ones, faint, so that no spike
is lost, beside the mean of as many; where a figure has several curves, their means alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from varlen_sft.tools.page import Html, Series, line_chart, tag
from varlen_sft.train.run_log import RunLog

__all__ = ["CHART_STYLE", "charts", "ends", "mean"]

MOST = 120
"""Groups of neighbouring steps that a curve is made of, if there are more steps."""
_LOOKS = "abcde"
CHART_STYLE = """
.chart .c { stroke: var(--good); stroke-dasharray: 8 3 2 3; } .chart circle.c { fill: var(--good); }
.chart .d { stroke: var(--dim); } .chart circle.d { fill: var(--dim); }
.chart .e { stroke: var(--bad); stroke-dasharray: 2 2; } .chart circle.e { fill: var(--bad); }
.chart .faint { stroke: var(--a); stroke-opacity: .35; stroke-width: 1; }
.many circle { opacity: 0; }
.many circle.wrong, .many circle[data-field="validation_loss"] { opacity: 1; }
"""

Step = Mapping[str, Any]
_T = TypeVar("_T")


class _Curve(NamedTuple):
    name: str
    field: str
    of: Callable[[Step], float | None]  # None: the step has no such number


def charts(log: RunLog) -> list[Html]:
    """Figures of all that the log has numbers of; at least one step is needed."""
    drawn = [_loss(log), _chart("Loss by role, per supervised token", log.steps, _roles(log.steps))]
    for caption, options, *curves in _CHARTS:
        drawn.append(_chart(caption, log.steps, [_Curve(*curve) for curve in curves], **options))
    return [chart for chart in drawn if chart]


def mean(values: Sequence[float]) -> float:
    """NaN of nothing."""
    return sum(values) / len(values) if values else math.nan


def _field(name: str) -> Callable[[Step], float | None]:
    return lambda step: step.get(name)


def _per_second(name: str) -> Callable[[Step], float | None]:
    return lambda step: step[name] / step["step_time_s"]


def _percent(name: str) -> Callable[[Step], float | None]:
    return lambda step: None if step.get(name) is None else 100 * step[name]


def _stall(step: Step) -> float | None:
    return 100 * step["stall_s"] / step["step_time_s"] if "stall_s" in step else None


def _gigabytes(step: Step) -> float | None:
    return step["peak_memory"] / 1e9 if step.get("peak_memory") else None


_FROM_ZERO: dict[str, Any] = {"from_zero": True}
_CHARTS: tuple[tuple[Any, ...], ...] = (
    ("Learning rate", _FROM_ZERO, ("learning rate", "lr", _field("lr"))),
    ("Gradient norm, before clipping", _FROM_ZERO, ("norm", "grad_norm", _field("grad_norm"))),
    ("Tokens per second", _FROM_ZERO,
     ("real", "real_tokens_per_s", _per_second("real_tokens")),
     ("supervised", "supervised_tokens_per_s", _per_second("supervised_tokens"))),
    ("Packs filled, %", {}, ("real tokens", "fill", _percent("fill"))),
    ("Waiting for the loader, % of the step", _FROM_ZERO, ("stall", "stall", _stall)),
    ("TFLOP/s, of all ranks", _FROM_ZERO, ("TFLOP/s", "tflops", _field("tflops"))),
    ("Model FLOPs utilisation, %", _FROM_ZERO, ("MFU", "mfu", _percent("mfu"))),
    ("Peak memory, GB", _FROM_ZERO, ("peak", "peak_memory", _gigabytes)),
)  # fmt: skip


def _loss(log: RunLog) -> Html:
    """Of steps, and of what is held out."""
    lines = _thin(_Curve("training", "loss", _field("loss")), log.steps, "a")
    if log.validations:
        x = [event["step"] for event in log.validations]
        held_out = [event["loss"] for event in log.validations]
        lines.append(Series("held out", "validation_loss", held_out, "b", x))
    return _figure("Loss per supervised token", lines, log.steps)


def _roles(steps: Sequence[Step]) -> list[_Curve]:
    """The losses by role that any step has, and that of stop tokens."""
    found = dict.fromkeys(role for step in steps for role in step.get("role_loss") or {})

    def of(role: str) -> Callable[[Step], float | None]:
        return lambda step: (step.get("role_loss") or {}).get(role)

    curves = [_Curve(role, f"loss_{role}", of(role)) for role in found]
    return [*curves, _Curve("stop tokens", "stop_loss", _field("stop_loss"))]


def _chart(
    caption: str, steps: Sequence[Step], curves: Sequence[_Curve], *, from_zero: bool = False
) -> Html:
    """Nothing where no step has one of these numbers."""
    lines: list[Series] = []
    for number, curve in enumerate(curves):
        lines += _thin(curve, steps, _LOOKS[number % len(_LOOKS)], mean_only=len(curves) > 1)
    if len(curves) > 1 and len(steps) > MOST:
        caption += f", means of {_size(steps)} steps"
    return _figure(caption, lines, steps, from_zero=from_zero) if lines else Html("")


def _figure(
    caption: str, lines: Sequence[Series], steps: Sequence[Step], *, from_zero: bool = False
) -> Html:
    figure = line_chart(caption, [], lines, x_label="step", from_zero=from_zero)
    return tag("div", figure, class_="many") if len(steps) > MOST else figure


def _thin(
    curve: _Curve, steps: Sequence[Step], look: str, *, mean_only: bool = False
) -> list[Series]:
    """All steps as they are, or of many the ends of each group, faint, and their mean."""
    found = [(step["step"], curve.of(step)) for step in steps]
    pairs = [(number, value) for number, value in found if value is not None]
    if not pairs:
        return []
    if len(pairs) <= MOST:
        x, values = zip(*pairs, strict=True)
        return [Series(curve.name, curve.field, values, look, x)]
    size = _size(pairs)
    groups = _groups(pairs, size)
    middle = [group[len(group) // 2][0] for group in groups]
    means = [mean([value for _, value in group]) for group in groups]
    name = curve.name if mean_only else f"mean of {size}"
    line = Series(name, f"{curve.field}_mean", means, look, middle)
    if mean_only:
        return [line]
    x, values = zip(*ends(pairs, size), strict=True)
    return [Series(curve.name, curve.field, values, "faint", x), line]


def ends(pairs: Sequence[tuple[int, float]], size: int) -> list[tuple[int, float]]:
    """Of every ``size`` neighbours the lowest and the highest, in their order; NaN and infinity are
    beyond all numbers."""
    kept: list[tuple[int, float]] = []
    for group in _groups(pairs, size):
        order = sorted(group, key=lambda pair: (not math.isfinite(pair[1]), pair[1]))
        kept += sorted({order[0], order[-1]}, key=lambda pair: pair[0])
    return kept


def _size(many: Sequence[Any]) -> int:
    """How many of them make a group."""
    return -(-len(many) // MOST)


def _groups(pairs: Sequence[_T], size: int) -> list[Sequence[_T]]:
    return [pairs[start : start + size] for start in range(0, len(pairs), size)]
