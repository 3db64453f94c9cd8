"""``varlen-sft check``: see on your own model that packing changes nothing but the cost."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.formats import Conversation, read_conversations
from varlen_sft.data.load import tokenize_file
from varlen_sft.data.sample import Sample
from varlen_sft.errors import InputError
from varlen_sft.rope_frequencies import LENGTH_DEPENDENT_ROPE_TYPES
from varlen_sft.tools import check_gradients as gradients
from varlen_sft.tools import check_numbers as numbers
from varlen_sft.tools.check_compare import Alone, Comparison, compare_routes, route_findings
from varlen_sft.tools.check_finding import Finding, Subject
from varlen_sft.tools.check_generate import generate, teacher_forcing
from varlen_sft.tools.check_pack import check_pack, check_rope, check_weights
from varlen_sft.tools.check_routes import HFAlone, HFPacked, HFPadded, Result
from varlen_sft.tools.check_setup import inspect_model
from varlen_sft.tools.check_subject import hf_model, load_model, rotary_tables, vocab_size
from varlen_sft.tools.environment import environment
from varlen_sft.tools.register_machine import register_machine_conversations
from varlen_sft.tools.step_bench import DTYPES
from varlen_sft.train.memory import keep_freed_memory

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["CheckOptions", "check", "run"]

Bar = Callable[[float, str], None]


@dataclass(frozen=True, kw_only=True)
class CheckOptions:
    """What to check and how much of it; ``varlen-sft check --help`` says it in words."""

    model: Path
    data: Path | None = None
    dtype: str = "fp32"
    conversations: int = 50
    prompts: int = 10
    generated: int = 64
    seed: int = 0
    json: Path | None = None
    html: Path | None = None


@dataclass(frozen=True)
class Material:
    """Tokenised conversations, in the random order in which they are packed, and prompts."""

    samples: list[Sample]
    prompts: list[np.ndarray]  # token ids through the generation prompt


def run(options: CheckOptions, console: Console) -> bool:
    """Check, print a screen, write the files that were asked for.

    Returns:
        Whether everything held.

    Raises:
        InputError: a model or data that cannot be used, found before weights are if it can be.
    """
    from varlen_sft.tools import check_show, demo_show

    start = time.perf_counter()
    material = prepare(options)
    with demo_show.bar(console) as update:
        subject = Subject(load_model(options.model, DTYPES[options.dtype]))
        result = check(subject, options, material, update)
    result["seconds"] = time.perf_counter() - start
    check_show.screen(console, result)
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=2), encoding="utf-8")
    if options.html is not None:
        from varlen_sft.tools.check_page import write_check_page

        write_check_page(options.html, result)
    return all(finding["verdict"] != "fail" for finding in result["findings"])


def prepare(options: CheckOptions) -> Material:
    """Conversations and prompts, from --data or generated.

    Raises:
        InputError: no usable config, tokenizer or data.
    """
    size = vocab_size(options.model)
    tokenizer = ChatTokenizer.from_folder(options.model)
    if options.data is None:
        found = register_machine_conversations(options.conversations, options.seed, 1, 2)
        samples = tokenizer.encode_many(found)
    else:
        found = [c for _, c in read_conversations(options.data)][: options.conversations]
        stream = tokenize_file(options.data, tokenizer, vocab_size=size)
        samples = [sample for sample, _ in zip(stream, found, strict=False)]
    if len(samples) < 4:
        raise InputError(
            f"four conversations or more are needed, got {len(samples)}", file=options.data
        )
    if not any((sample.token_weights[1:] > 0).any() for sample in samples):
        raise InputError("no token is supervised: there is nothing to train", file=options.data)
    order = np.random.default_rng(options.seed).permutation(len(samples))
    return Material([samples[i] for i in order], _prompts(tokenizer, found, options.prompts))


def _prompts(
    tokenizer: ChatTokenizer, conversations: Sequence[Conversation], count: int
) -> list[np.ndarray]:
    return [tokenizer.encode_prompt(c.messages[:-1]) for c in conversations[:count]]


def check(
    subject: Subject,
    options: CheckOptions,
    material: Material,
    bar: Bar = lambda share, text: None,
) -> dict[str, Any]:
    """All properties of one model.

    Returns:
        findings (a list of Finding as dictionaries), layers, positions, routes (Hugging Face alone,
        padded and packed, and ours by each implementation), and what was measured on.
    """
    dtype = DTYPES[options.dtype]
    keep_freed_memory()
    bar(0.0, "loading transformers' model")
    low = hf_model(options.model, dtype)
    high = copy.deepcopy(low).to(numbers.HIGHER[dtype])  # the same weights, not another reading
    findings = [check_weights(subject, low), check_rope(subject, low), *_hf_rope(low)]
    findings += check_pack(subject, material.samples)
    measured, routes = numbers.Numbers(dtype), list[Comparison]()
    try:
        findings += _numeric(subject, (low, high), options, material, (measured, routes), bar)
    except ValueError as error:  # an op refused the pack: a finding like any other
        findings.append(Finding.decided("the ops accept the pack", [str(error)], ""))
    return _result(options, material, measured, routes, findings)


def _hf_rope(low: Any) -> list[Finding]:
    """Transformers' own tables, and whether its RoPE depends on a conversation's neighbours."""
    found = inspect_model(low)
    wrong = [mistake.what for mistake in found if mistake.certain]
    notes = [f"{mistake.what}: {mistake.effect}" for mistake in found if not mistake.certain]
    return [
        Finding.decided("transformers' own RoPE tables are those of the config", wrong, "in fp32"),
        *(Finding("transformers' RoPE by itself", None, None, "note", note) for note in notes),
    ]


def _numeric(
    subject: Subject,
    hf: tuple[Any, Any],
    options: CheckOptions,
    material: Material,
    found: tuple[numbers.Numbers, list[Comparison]],
    bar: Bar,
) -> list[Finding]:
    """What needs forward and backward passes; fills ``found`` on the way."""

    (low, _), (measured, routes) = hf, found
    # A bf16 gradient's error is mostly chance: more conversations make twice HF's a fair bound.
    part = 5 if low.dtype == torch.float32 else 2
    few = material.samples[: max(4, len(material.samples) // part)]
    some = few[: max(4, len(few) * 2 // 5)]  # for each route; gradients of all in the first
    progress = _stage(bar, 0.05, 0.4, "every position against HF alone")
    numbers.compare_forward(measured, subject, *hf, material.samples, progress)
    findings = numbers.forward_findings(measured)
    alone, judged = _gradients(subject, hf, few, len(some), bar)
    bar(0.62, "order, neighbours, pad tail, micro-batches")
    findings += judged + gradients.check_isolation(subject, few)
    findings.append(gradients.check_mean_loss(subject, few))
    mixed = _depends_on_length(subject)
    progress = _stage(bar, 0.68, 0.78, "greedy tokens of HF's generate")
    written = _written(hf, options, material, mixed, progress)
    findings.append(teacher_forcing(subject, low, written, options.generated, measured.tolerance))
    limits = (measured.tolerance, measured.log_probability_tolerance)
    progress = _stage(bar, 0.8, 0.99, "every implementation, and HF padded and packed")
    routes += compare_routes(subject, low, alone, some, written, limits, progress)
    note = "its frequencies are those of the longest conversation" if mixed else ""
    findings += route_findings(routes, note)
    findings.append(gradients.check_invariance(subject, few))
    return findings


def _stage(bar: Bar, begin: float, end: float, text: str) -> Callable[[float], None]:
    """Progress of a part of the whole."""
    bar(begin, text)
    return lambda share: bar(begin + (end - begin) * share, text)


def _depends_on_length(subject: Subject) -> bool:
    tables = rotary_tables(subject.model).values()
    types = {table.rope_parameters["rope_type"] for table in tables}
    return bool(types & set(LENGTH_DEPENDENT_ROPE_TYPES))


def _written(
    hf: tuple[Any, Any],
    options: CheckOptions,
    material: Material,
    mixed: bool,
    progress: Callable[[float], None],
) -> list[tuple[np.ndarray, torch.Tensor]]:
    writer = hf[0] if hf[0].dtype == torch.float32 else hf[1]
    # HF would give a prompt the frequencies of the longest beside it.
    at_once = 1 if mixed else max(1, len(material.prompts))
    return generate(writer, material.prompts, options.generated, at_once, progress)


def _gradients(
    subject: Subject, hf: tuple[Any, Any], samples: Sequence[Sample], first: int, bar: Bar
) -> tuple[Alone, list[Finding]]:
    """What HF alone makes of the first conversations, and how all compare."""
    text = "loss and gradients against HF alone"
    alone = _alone(*hf, samples[:first], _stage(bar, 0.4, 0.48, text))
    rest = _alone(*hf, samples[first:], _stage(bar, 0.48, 0.6, text))
    total = alone
    if first < len(samples):
        total = Alone(alone.low + rest.low, alone.high + rest.high)
    others = _batched(hf[0], samples, _depends_on_length(subject))
    return alone, gradients.check_gradients(subject, total, samples, others)


def _alone(low: Any, high: Any, samples: Sequence[Sample], progress: Callable) -> Alone:
    wide = HFAlone(high).run(samples, lambda share: progress(share * 0.7))
    return Alone(HFAlone(low).run(samples, lambda share: progress(0.7 + share * 0.3)), wide)


def _batched(low: Any, samples: Sequence[Sample], mixed: bool) -> list[Result]:
    """Hugging Face's own batches; in fp32 its model alone is measure enough, and of batches whose
    RoPE depends on their longest conversation it is the only one."""
    if low.dtype == torch.float32 or mixed:
        return []
    return [route.run(samples) for route in (HFPadded(low), HFPacked(low))]


def _result(
    options: CheckOptions,
    material: Material,
    measured: numbers.Numbers,
    routes: Sequence[Comparison],
    findings: Sequence[Finding],
) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "dtype": options.dtype,
        "environment": environment(),
        "conversations": len(material.samples),
        "tokens": sum(len(sample) for sample in material.samples),
        "findings": [asdict(finding) for finding in findings],
        "routes": [route.as_dict() for route in routes],
        "layers": measured.layer_errors(),
        "positions": [
            {"conversation": i, "errors": errors.tolist(), "bound": measured.tolerance}
            for i, errors in enumerate(measured.ours)
        ],
    }
