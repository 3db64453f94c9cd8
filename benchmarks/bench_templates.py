"""Which pairs of chat template and conversation are proven, and which are refused and why."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))  # the fixtures are the tests' own

from tests.data.templates import tokenizers  # noqa: E402
from tests.data.templates.conversations import conversations  # noqa: E402
from tests.data.templates.prove import Verdict, chat_tokenizer, prove, with_template  # noqa: E402
from tests.data.templates.templates import FACTS, settings_of, sources  # noqa: E402
from varlen_sft.data.chat import ChatTokenizer  # noqa: E402

HELP = """\
Every chat template in the trl wheel x real tokenizers x the hand-written conversations of the tests
x every value of enable_thinking that the template knows. A pair is proven if the decoded text of
every trained turn is what the tests' oracle says, and both mechanisms agree; refused if the oracle
says so, too, for the same reason. Anything else is a fault, and ends the script with 1.
"""
RESULTS = Path(__file__).parent / "results" / "templates.json"
SLOW = "a hundred turns"  # where the second mechanism is left out: it renders once per turn


def count(chat: ChatTokenizer, composes: bool) -> dict[str, Verdict]:
    """A verdict for each template."""
    verdicts = {}
    for name, facts in FACTS.items():
        other, verdict = with_template(chat, name), Verdict()
        rows = conversations(facts)
        slow = {SLOW: rows.pop(SLOW)}
        for thinking, (some, checked) in itertools.product(
            settings_of(name), ((rows, True), (slow, False))
        ):
            found = prove(other, facts, some, thinking, composes=composes, cross_check=checked)
            verdict.add(found.of(name))
        verdicts[name] = verdict
    return verdicts


def known_tokenizers() -> dict[str, tokenizers.Tokenizer]:
    """By name, those whose packages are installed."""
    from varlen_sft.tools.demo_model import smollm2_folder

    smollm2 = tokenizers.Tokenizer.from_file(str(smollm2_folder() / "tokenizer.json"))
    found = {"bytes": tokenizers.byte_level(), "SmolLM2": smollm2}
    if tokenizers.qwen_ranks():
        found["Qwen"] = tokenizers.qwen()
    if (deepseek := tokenizers.deepseek()) is not None:
        found["DeepSeek"] = deepseek
    return found


def total(verdicts: dict[str, Verdict]) -> Verdict:
    summed = Verdict()
    for verdict in verdicts.values():
        summed.add(verdict)
    return summed


def table(verdicts: dict[str, dict[str, Verdict]]) -> Table:
    shown = Table(title=f"{len(FACTS)} templates x {len(verdicts)} tokenizers")
    shown.add_column("")
    for name in verdicts:
        shown.add_column(name, justify="right")
    totals = [total(one) for one in verdicts.values()]
    shown.add_row("pairs", *(str(v.proven + v.refused.total()) for v in totals))
    shown.add_row("proven", *(str(v.proven) for v in totals))
    shown.add_row("  turns in them", *(str(v.turns) for v in totals))
    shown.add_row("refused", *(str(v.refused.total()) for v in totals))
    reasons: Counter[str] = sum((v.refused for v in totals), Counter())
    for reason, _ in reasons.most_common():
        shown.add_row(f"  {reason}", *(str(v.refused[reason]) for v in totals))
    whole = [sum(v.proven > 0 for v in one.values()) for one in verdicts.values()]
    shown.add_row("templates with a proven pair", *map(str, whole))
    return shown


def main() -> int:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not sources():
        raise SystemExit("needs the chat templates in trl: pip install trl")
    from varlen_sft.tools.environment import environment

    console = Console(width=None if sys.stdout.isatty() else 120)
    verdicts: dict[str, dict[str, Verdict]] = {}
    for name, tokenizer in known_tokenizers().items():
        chat = chat_tokenizer(tokenizers.with_all_tokens(tokenizer), "qwen3")
        verdicts[name] = count(chat, composes=name == "Qwen")
    faults = [f"{name}: {f}" for name, one in verdicts.items() for f in total(one).faults]
    console.print(table(verdicts))
    for fault in faults:
        console.print(fault, markup=False)
    by_template: dict[str, Any] = {
        name: {template: _as_json(v) for template, v in one.items()}
        for name, one in verdicts.items()
    }
    args.json.write_text(
        json.dumps({"environment": environment(), "pairs": by_template}, indent=1) + "\n"
    )
    return 1 if faults else 0


def _as_json(verdict: Verdict) -> dict[str, Any]:
    return {"proven": verdict.proven, "turns": verdict.turns, "refused": dict(verdict.refused)}


if __name__ == "__main__":
    sys.exit(main())
