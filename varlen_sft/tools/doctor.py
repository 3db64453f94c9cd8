"""``varlen-sft doctor``: is a chat template fit for training, and a data file with it?"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from copy import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.masks import MaskOptions
from varlen_sft.errors import InputError
from varlen_sft.tools.doctor_data import Census, DataOptions, take_census
from varlen_sft.tools.doctor_data_questions import ask_data
from varlen_sft.tools.doctor_probes import Subject
from varlen_sft.tools.doctor_questions import ask
from varlen_sft.tools.doctor_strange import strangest

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["DoctorOptions", "examine", "run", "show_environment"]


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """What to examine; ``varlen-sft doctor --help`` says it in words."""

    model: Path  # a model folder, or a template, which needs a tokenizer
    tokenizer: Path | None = None
    data: DataOptions | None = None
    json: Path | None = None
    masks: MaskOptions = MaskOptions()


def run(options: DoctorOptions, console: Console) -> bool:
    """Examine, print a screen, write the file that was asked for.

    Returns:
        Whether no question failed.

    Raises:
        InputError: a template, tokenizer or data file that cannot be read.
    """
    from varlen_sft.tools import doctor_show

    with doctor_show.working(console) as progress:
        report = examine(options, progress)
    doctor_show.screen(console, report)
    _write(options.json, report)
    return report["passed"]


def show_environment(console: Console, path: Path | None = None) -> None:
    """Print what would compute each op here, and versions; write the same to ``path``."""
    from varlen_sft.tools import doctor_env, doctor_show

    environment = doctor_env.describe_environment()
    doctor_show.environment_screen(console, environment)
    _write(path, environment)


def examine(
    options: DoctorOptions, progress: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """All questions, as JSON holds them.

    Returns:
        passed, template, masks, seconds, findings (question, verdict, evidence); with ``data``
        also data: file, rows, tokens, trained, roles, findings, refused and strange rows.

    Raises:
        InputError: a template, tokenizer or data file that cannot be read.
    """
    start = time.perf_counter()
    progress("reading the tokenizer")
    tokenizer = _load(options)
    subject = Subject(tokenizer, _without_tags(options, tokenizer), options.masks)
    progress("asking the template")
    report: dict[str, Any] = {"template": str(options.model), "masks": asdict(options.masks)}
    report["findings"] = [asdict(finding) for finding in ask(subject)]
    if options.data is not None:
        census = take_census(tokenizer, options.masks, options.data, progress)
        report["data"] = _data(options.data, census, options.masks)
    findings = report["findings"] + report.get("data", {}).get("findings", [])
    report["passed"] = all(finding["verdict"] != "fail" for finding in findings)
    report["seconds"] = time.perf_counter() - start
    return report


def _load(options: DoctorOptions) -> ChatTokenizer:
    if options.model.is_dir():
        if options.tokenizer is not None:
            raise InputError(
                "--tokenizer goes with a template; this is a folder", file=options.model
            )
        return ChatTokenizer.from_folder(options.model)
    if not options.model.is_file():
        raise InputError("no such folder or template", file=options.model)
    if options.tokenizer is None:
        raise InputError("a template needs --tokenizer FOLDER to be tried with", file=options.model)
    return ChatTokenizer.from_folder(options.tokenizer, options.model)


def _without_tags(options: DoctorOptions, tokenizer: ChatTokenizer) -> ChatTokenizer:
    """The same tokenizer, blind to generation tags."""
    if not tokenizer.template.has_generation_tags:
        return tokenizer
    template = copy(tokenizer.template)
    template.has_generation_tags = False
    folder = options.tokenizer or options.model
    return ChatTokenizer((folder / "tokenizer.json").read_text(encoding="utf-8"), template)


def _data(options: DataOptions, census: Census, masks: MaskOptions) -> dict[str, Any]:
    from varlen_sft.data.sample import ROLES

    counts = zip(ROLES, census.role_tokens.tolist(), census.role_trained.tolist(), strict=True)
    return {
        "file": options.source,
        "rows": census.rows,
        "tokens": census.tokens,
        "trained": census.trained,
        "roles": {role: {"tokens": n, "trained": trained} for role, n, trained in counts},
        "findings": [asdict(finding) for finding in ask_data(census, masks)],
        "refused": [asdict(one) for one in census.refused.values()],
        "strange": [asdict(one) for one in strangest(census.traits)],
    }


def _write(path: Path | None, value: dict[str, Any]) -> None:
    if path is None:
        return
    try:
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot be written: {error.strerror}", file=path) from None
