"""What is to be prepared, and the fingerprint of all that decides the samples."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.load import OnError, Policy
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.overlong import Overlong
from varlen_sft.data.prepare_count import count_rows
from varlen_sft.data.prepare_inputs import file_blocks, input_files
from varlen_sft.data.sources import Source
from varlen_sft.data.store import LAYOUTS
from varlen_sft.errors import InputError

CHUNK_ROWS = 256
"""Input rows that are worked on, and can be lost, at a time."""

CHUNK_SIZE = 1 << 20
"""Rows of a chunk end early where they have so much text: long ones would fill a worker's memory,
at some 100 bytes per token."""

VERSION = 1
"""Part of the fingerprint: raised when the same rows and settings give other samples."""


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What to prepare; ``varlen-sft prepare --help`` says it in words.

    Args:
        inputs: source strings, see ``sources.Source.parse``; of the hub see ``hub_files``.
        model: folder with tokenizer and chat template.
        out: prefix of the files to write.
        template: a Jinja file instead of the folder's template.
        shard: ``(i, n)``, only the chunks i, i + n, i + 2 n, ... counted from 1.
        chunk_rows: for tests.
        others: see ``load.tokenize_source`` and ``store``.

    Raises:
        ValueError: an unknown word or a number out of range.
        InputError: no input, or a layout that cannot hold the weights.
    """

    inputs: tuple[str, ...]
    model: Path
    out: Path
    template: Path | None = None
    masks: MaskOptions = MaskOptions()
    max_tokens: int | None = None
    overlong: Overlong = "error"
    on_error: OnError = "error"
    cross_check: int | str = 100
    vocab_size: int | None = None
    sample_processor: str | None = None
    mask_token_ids: tuple[int, ...] = ()
    layout: str = "sidecar"
    workers: int = 1
    shard: tuple[int, int] | None = None
    force: bool = False
    chunk_rows: int = CHUNK_ROWS

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout must be one of {LAYOUTS}, got {self.layout!r}")
        if self.workers < 1:
            raise ValueError(f"workers must be 1 or more, got {self.workers}")
        if self.shard is not None and not 1 <= self.shard[0] <= self.shard[1]:
            raise ValueError(f"shard must be i of n with 1 <= i <= n, got {self.shard}")
        if not self.inputs:
            raise InputError("nothing to prepare: no input was named")
        weighed = self.masks.equal_sample_weight or self.masks.prompt_weight not in (0, 1)
        if self.layout == "tokens+mask" and weighed:
            raise InputError(
                "the layout tokens+mask holds weights of 0 and 1 only, so neither "
                "equal_sample_weight nor such a prompt_weight: take the layout sidecar"
            )
        _ = self.policy

    @property
    def sources(self) -> list[Source]:
        return [Source.parse(text) for text in self.inputs]

    @property
    def policy(self) -> Policy:
        return Policy(
            self.masks,
            self.max_tokens,
            self.overlong,
            self.on_error,
            self.cross_check,
            self.vocab_size,
        )


@dataclass(frozen=True)
class Plan:
    """What decides the samples, as JSON, and the names of the inputs, which do not.

    Args:
        content: inputs (hashes), tokenizer, template and settings.
        names: of the inputs, as they were written.
        chunk: the most rows of a part, and their size, see ``prepare_inputs.row_size``.
        rows: of all inputs together, about; None where nobody knows before they are read.
        states: see input_states, before they were read.
    """

    content: dict[str, Any]
    names: tuple[str, ...]
    chunk: tuple[int, int]
    rows: int | None = None
    states: tuple[Any, ...] = ()

    @property
    def fingerprint(self) -> str:
        text = json.dumps(self.content, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def work(self) -> str:
        """What parts have to agree in to make one set: the fingerprint, and how rows are cut."""
        return ":".join([self.fingerprint, *map(str, self.chunk)])

    def as_json(self) -> dict[str, Any]:
        """What a shard leaves for merge."""
        return {"content": self.content, "names": self.names, "chunk": self.chunk}


def make_plan(options: PrepareOptions, progress: Callable[[int, int], None]) -> Plan:
    """Read all inputs once for their hashes, and the tokenizer.

    Args:
        progress: told the bytes done, and of all inputs.

    Raises:
        InputError: an input, the tokenizer or its template cannot be read.
    """
    tokenizer = ChatTokenizer.from_folder(options.model, options.template)
    states = input_states(options)
    listed = [input_files(source) for source in options.sources]
    total, done = sum(size for files in listed for *_, size in files), 0
    inputs, rows = [], []
    for source, files in zip(options.sources, listed, strict=True):
        hashes, lines, end = [], 0, b"\n"
        for name, path, _ in files:
            digest = hashlib.sha256()
            for block in file_blocks(path):
                digest.update(block)
                lines, end = lines + block.count(b"\n"), block[-1:]
                done += len(block)
                progress(done, total)
            hashes.append([name, digest.hexdigest()])
        size = sum(size for *_, size in files)
        entry = {"mode": source.mode, "split": source.split, "bytes": size, "files": hashes}
        inputs.append(entry)
        rows.append(count_rows(source, files, lines + (end != b"\n")))
    content = {
        "version": VERSION,
        "inputs": inputs,
        "tokenizer": tokenizer.fingerprint(),
        "template": hashlib.sha256(tokenizer.template.source.encode()).hexdigest(),
        "settings": _settings(options),
    }
    known = None if None in rows else sum(count for count in rows if count is not None)
    return Plan(content, options.inputs, (options.chunk_rows, CHUNK_SIZE), known, states)


def vocabulary_size(model: Path) -> int | None:
    """V as the config.json of a model folder says it, None without one; InputError if it is bad."""
    path = model / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot be read: {error}", file=path) from None
    size = config.get("vocab_size") if isinstance(config, dict) else None
    return size if isinstance(size, int) and size > 0 else None


def input_states(options: PrepareOptions) -> tuple[Any, ...]:
    """Size and time of change of all files of the inputs."""
    files = [path for source in options.sources for _, path, _ in input_files(source)]
    return tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files)


def differences(old: dict[str, Any], new: dict[str, Any]) -> str:
    """What of two plans' contents is not the same, in words."""
    names = [name for name in new if name != "settings" and old.get(name) != new[name]]
    before = old.get("settings") or {}
    names += [name for name, value in new["settings"].items() if before.get(name) != value]
    return ", ".join(names) or "nothing that it tells"


def _settings(options: PrepareOptions) -> dict[str, Any]:
    # on_error is left out: a set that is finished has the same samples either way.
    names = ("max_tokens", "overlong", "cross_check", "vocab_size", "layout")
    settings = {name: getattr(options, name) for name in names}
    masks = {
        name: list(v) if isinstance(v, tuple) else v for name, v in asdict(options.masks).items()
    }
    processor = options.sample_processor
    return {
        **settings,
        **masks,
        "mask_token_ids": sorted(options.mask_token_ids),
        "sample_processor": None if processor is None else _processor(processor),
    }


def _processor(name: str) -> list[str]:
    """Its name and the hash of the file that it is in."""
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        spec = None
    if spec is None or spec.origin is None or not os.path.isfile(spec.origin):
        raise InputError(f"sample_processor {name!r}: no such module")
    return [name, hashlib.sha256(Path(spec.origin).read_bytes()).hexdigest()]
