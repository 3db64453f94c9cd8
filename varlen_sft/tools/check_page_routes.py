"""A table of the check's page: what each way to compute is off by, and its gradients' norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from varlen_sft.tools.page import Html, table, tag

__all__ = ["routes_section"]


def routes_section(routes: Sequence[Mapping[str, Any]]) -> list[Html]:
    """Errors of each way to compute against Hugging Face alone, and gradient norms."""
    if not routes:
        return [tag("p", "Not measured.")]
    names = list(dict.fromkeys(name for route in routes for name in route["figures"]))
    rows = [
        [tag("th", route["name"], scope="row")]
        + [_figure(route["name"], name, route["figures"].get(name)) for name in names]
        for route in routes
    ]
    groups = list(dict.fromkeys(group for route in routes for group in route["norms"]))
    norms = [
        [tag("th", route["name"], scope="row")]
        + [f"{route['norms'].get(group, 0.0):.6g}" for group in groups]
        for route in routes
    ]
    return [
        tag("p", "Errors against Hugging Face alone in the higher precision.", class_="dim"),
        table(["computed by", *names], rows),
        tag("details", tag("summary", "Norms of the gradients"), table(["", *groups], norms)),
    ]


def _figure(route: str, name: str, figure: Mapping[str, float | None] | None) -> Html:
    """An error, red where it is over its bound; hover for the bound."""
    if figure is None:
        return tag("td", "")
    error, bound = figure["error"], figure["bound"]
    over = error is not None and bound is not None and not error <= bound
    hint = None if bound is None else f"bound {bound:.2e}"
    look = "bad" if over else None
    shown = "" if error is None else f"{error:.2e}"
    data = {"data_route": route, "data_figure": name, "data_value": error}
    return tag("td", shown, class_=look, title=hint, **data)
