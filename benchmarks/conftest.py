"""Op benchmarks: options, and the tables at the end."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from op_groups import Group, as_json, render
from rich.console import Console

from varlen_sft.tools.environment import environment
from varlen_sft.tools.step_table import stamp

GROUPS = pytest.StashKey[list[Group]]()
ENVIRONMENT = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("op benchmarks")
    group.addoption("--rounds", type=int, default=5, help="interleaved rounds (default: 5)")
    group.addoption("--threads", type=int, default=2, help="of torch (default: 2)")
    group.addoption("--tiny", action="store_true", help="shapes that test the benchmark, no more")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(config.getoption("--threads"))
    config.stash[GROUPS] = []
    config.stash[ENVIRONMENT] = environment()


@pytest.fixture(scope="session")
def groups(request: pytest.FixtureRequest) -> list[Group]:
    """Where measured groups go: into the tables and the JSON."""
    return request.config.stash[GROUPS]


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    """Ratios, errors and goals beside the times; what it ran on without the machine's name."""
    output_json["groups"] = [as_json(group) for group in config.stash[GROUPS]]
    output_json["environment"] = config.stash[ENVIRONMENT]
    for key in ("node", "release"):
        output_json["machine_info"].pop(key, None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    groups = config.stash[GROUPS]
    if not groups:
        return
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 140)
    for group in groups:
        console.print(render(group))
    goals = [goal for group in groups for goal in group.goals]
    met = sum(goal.met for goal in goals)
    size = " (tiny shapes: they mean nothing)" if config.getoption("--tiny") else ""
    console.print(f"{met} of {len(goals)} goals met{size}")
    console.print(stamp(config.stash[ENVIRONMENT]), highlight=False)
