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
from varlen_sft.models.config import LlamaConfig
from varlen_sft.models.llama import LlamaForSFT
from varlen_sft.tools import check_gradients as gradients
from varlen_sft.tools import check_numbers as numbers
from varlen_sft.tools.check_finding import Finding, Subject
from varlen_sft.tools.check_pack import check_pack, check_rope, check_weights
from varlen_sft.tools.environment import environment
from varlen_sft.tools.register_machine import register_machine_conversations
from varlen_sft.tools.step_bench import DTYPES

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
        subject = Subject(LlamaForSFT.from_pretrained(options.model, dtype=DTYPES[options.dtype]))
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
    config = LlamaConfig.from_folder(options.model)
    tokenizer = ChatTokenizer.from_folder(options.model)
    if options.data is None:
        found = register_machine_conversations(options.conversations, options.seed, 1, 2)
        samples = tokenizer.encode_many(found)
    else:
        found = [c for _, c in read_conversations(options.data)][: options.conversations]
        stream = tokenize_file(options.data, tokenizer, vocab_size=config.vocab_size)
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
        findings (a list of Finding as dictionaries), layers, positions, and what was measured on.
    """
    dtype = DTYPES[options.dtype]
    bar(0.0, "loading transformers' model")
    low = numbers.hf_model(options.model, dtype)
    high = copy.deepcopy(low).to(numbers.HIGHER[dtype])  # the same weights, not another reading
    findings = [check_weights(subject, low), check_rope(subject, low)]
    findings += check_pack(subject, material.samples)
    measured = numbers.Numbers(dtype)
    try:
        findings += _numeric(subject, (low, high), options, material, measured, bar)
    except ValueError as error:  # an op refused the pack: a finding like any other
        findings.append(Finding.decided("the ops accept the pack", [str(error)], ""))
    return _result(options, material, measured, findings)


def _numeric(
    subject: Subject,
    hf: tuple[Any, Any],
    options: CheckOptions,
    material: Material,
    measured: numbers.Numbers,
    bar: Bar,
) -> list[Finding]:
    """What needs forward and backward passes; fills ``measured`` on the way."""

    def stage(begin: float, end: float, text: str) -> Callable[[float], None]:
        bar(begin, text)
        return lambda share: bar(begin + (end - begin) * share, text)

    low, high = hf
    # A bf16 gradient's error is mostly chance: more conversations make twice HF's a fair bound.
    part = 5 if low.dtype == torch.float32 else 2
    few = material.samples[: max(4, len(material.samples) // part)]
    progress = stage(0.05, 0.45, "every position against HF alone")
    numbers.compare_forward(measured, subject, low, high, material.samples, progress)
    findings = numbers.forward_findings(measured)
    findings += gradients.check_gradients(
        subject, low, high, few, stage(0.45, 0.7, "loss and gradients against HF alone")
    )
    stage(0.7, 0.7, "order, neighbours, pad tail, micro-batches")
    findings += gradients.check_isolation(subject, few)
    findings.append(gradients.check_mean_loss(subject, few))
    writer = low if low.dtype == torch.float32 else high
    progress = stage(0.75, 0.98, "greedy tokens of HF's generate")
    written = numbers.generate(writer, material.prompts, options.generated, progress)
    findings.append(
        numbers.teacher_forcing(subject, low, written, options.generated, measured.tolerance)
    )
    findings.append(gradients.check_invariance(subject, few))
    return findings


def _result(
    options: CheckOptions,
    material: Material,
    measured: numbers.Numbers,
    findings: Sequence[Finding],
) -> dict[str, Any]:
    return {
        "model": str(options.model),
        "dtype": options.dtype,
        "environment": environment(),
        "conversations": len(material.samples),
        "tokens": sum(len(sample) for sample in material.samples),
        "findings": [asdict(finding) for finding in findings],
        "layers": measured.layer_errors(),
        "positions": [
            {"conversation": i, "errors": errors.tolist(), "bound": measured.tolerance}
            for i, errors in enumerate(measured.ours)
        ],
    }
