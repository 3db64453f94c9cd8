"""Every op on a CUDA device beside its peers, as shares of its copy and matmul rates."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu_timing
import torch
import torch.nn.functional as F
from gpu_timing import share
from head_checks import head_errors, head_truth, refuse_worse
from op_groups import Goal, Group, as_json, render
from peers import HEADS, HeadLoad, bare_products, compiled, head_step, liger_head, naive
from peers_elementwise import NormLoad, SwigluLoad
from peers_ops import (
    HeadsLoad,
    attention_ours,
    attention_reference,
    attention_sdpa,
    check,
    find_sequences,
    position_ids,
    rope_flash_attn,
    rope_hf,
    rope_liger,
    rope_ours,
    rope_reference,
)
from rich.console import Console
from torch import Tensor

from varlen_sft.ops.backends import BACKENDS
from varlen_sft.ops.cross_entropy import masked_cross_entropy
from varlen_sft.types import IGNORE_INDEX

HELP = """\
One table per op: ours, Liger, flash-attn, TRL, torch eager and compiled, forward and backward, and
the bare matrix products. CUDA events, interleaved rounds, cold L2. Needs no network; peers that are
not installed are named. Without a CUDA device it says so and does nothing.
"""
RESULTS = Path(__file__).parent / "results"
Step = Callable[[], Any]


def made(makers: dict[str, Callable[[], Step]]) -> tuple[dict[str, Step], dict[str, str]]:
    """Candidates that ran once, and why others did not. Ours has to."""
    steps, missing = {}, {}
    for name, make in makers.items():
        try:
            step = make()
            step()
            steps[name] = step
        except ModuleNotFoundError as error:
            missing[name] = f"not installed: {error.name}"
        except Exception as error:
            if name.startswith("ours"):
                raise
            missing[name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0][:80]}"
    return steps, missing


def measured(
    name: str, unit: str, makers: dict[str, Callable[[], Step]], rounds: int, note: str = ""
) -> Group:
    steps, missing = made(makers)
    group = Group(name, unit, steps, missing, note=note)
    group.seconds, memory = gpu_timing.interleaved(steps, rounds)
    for candidate, extra in memory.items():
        group.facts[candidate] = {"extra MB": round(extra / 1e6)}
    return group


def add_share(group: Group, column: str, work: float, per_second: float) -> None:
    for name in group.seconds:
        group.facts[name][column] = share(work, group.median(name), per_second)


# ----------------------------------------------------------------- the groups


def rope(limits: dict[str, float], load: HeadsLoad) -> Group:
    x = load.make()
    error = check(rope_ours(x), rope_reference(x), rope_reference(x, torch.float64), x.q.dtype)
    makers = {
        "ours": lambda: rope_ours(x),
        "ours, hf rounding": lambda: rope_ours(x, "hf"),
        "Liger": lambda: rope_liger(x),
        "flash-attn": lambda: rope_flash_attn(x),
        "HF eager": lambda: rope_hf(x),
        "HF compiled": lambda: rope_hf(x, torch.compile),
    }
    title = f"RoPE {load.dtype}, T = {len(x.q)}, H = {load.heads}, K = {load.kv_heads}, "
    group = measured(title + f"D = {load.head_dim}", "ours", makers, rounds=50)
    group.note = f"Our error {error:.1e}."
    work = gpu_timing.rope_bytes(
        len(x.q), load.heads + load.kv_heads, load.head_dim, x.q.element_size(), len(x.cos)
    )
    add_share(group, "of copy", work, limits["bytes_per_second"])
    of_copy = work / group.median("ours") / limits["bytes_per_second"]
    group.goals = [Goal("share of the copy bandwidth", of_copy, 0.9, at_least=True)]
    return group


def cross_entropy(limits: dict[str, float], rows: int, vocab: int, device: str = "cuda") -> Group:
    logits = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocab, (rows,), device=device)
    labels[::3] = IGNORE_INDEX

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Step:
        def run() -> tuple[Tensor, Tensor]:
            logits.grad = None
            value = loss(logits, labels)
            value.backward()
            return value.detach(), logits.grad  # type: ignore[return-value]

        return run

    def ours(x: Tensor, y: Tensor) -> Tensor:
        out = masked_cross_entropy(x, y)
        return out.loss_sum / out.weight_sum

    def eager(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(x.float(), y)

    def liger() -> Step:
        from liger_kernel.transformers import LigerCrossEntropyLoss

        inner = LigerCrossEntropyLoss()  # writes its gradient over the logits: a copy keeps them
        return step(lambda x, y: inner(x.clone(), y))

    makers = {"ours": lambda: step(ours), "Liger": liger, "torch eager": lambda: step(eager)}
    makers["torch compiled"] = lambda: step(torch.compile(eager))
    title = f"Cross-entropy bf16 on logits, rows = {rows}, V = {vocab}"
    group = measured(title, "ours", makers, rounds=20)
    work = gpu_timing.cross_entropy_bytes(rows, vocab, 2)
    add_share(group, "of copy", work, limits["bytes_per_second"])
    return group


def head(limits: dict[str, float], load: HeadLoad) -> Group:
    x = load.make()
    heads = HEADS | {"Liger": liger_head, "torch compiled": lambda x: compiled(naive)}
    makers: dict[str, Callable[[], Step]] = {
        name: partial(lambda make: head_step(make(x), x), make) for name, make in heads.items()
    }
    makers["bare GEMMs"] = lambda: bare_products(x)
    title = f"Loss head {load.dtype}, V = {load.vocab}, C = {load.hidden}, T = {load.tokens}, "
    truth = head_truth(x)
    checked = {n: head_errors(head_step(HEADS[n](x), x), x, truth) for n in ("ours", "naive")}
    refuse_worse(checked, x.hidden.dtype)
    group = measured(title + f"S = {len(x.scored)}", "bare GEMMs", makers, rounds=10)
    for name, step in group.steps.items():
        if name != "bare GEMMs":
            group.facts[name] |= head_errors(step, x, truth)
    work = gpu_timing.head_flops(len(x.scored), load.hidden, load.vocab)
    add_share(group, "of matmul", work, limits["flops_per_second"])
    if load.vocab > 100_000:
        ratio = group.ratio("ours", "bare GEMMs")
        group.goals = [Goal("ours over the three bare GEMMs", ratio, 1.15)]
    return group


def attention(limits: dict[str, float], load: HeadsLoad) -> Group:
    x = load.make()
    names = [b.name for b in BACKENDS["attention"] if "cuda" in b.device_types and not b.missing]
    makers = {"ours": lambda: attention_ours(x), "SDPA per sequence": lambda: attention_sdpa(x)}
    makers |= {f"impl {n}": partial(attention_ours, x, n) for n in names if n != "reference"}
    high = attention_reference(x, torch.float64)
    error = check(attention_ours(x), attention_reference(x), high, x.q.dtype)
    title = f"Attention {load.dtype}, T = {len(x.q)}, H = {load.heads}, K = {load.kv_heads}, "
    group = measured(title + f"D = {load.head_dim}", "ours", makers, rounds=20)
    group.note = f"{len(x.lengths)} sequences. Ours is whoever is picked; its error {error:.1e}."
    work = gpu_timing.attention_flops(x.lengths, load.heads, load.head_dim)
    add_share(group, "of matmul", work, limits["flops_per_second"])
    return group


def elementwise(limits: dict[str, float], load: NormLoad | SwigluLoad) -> Group:
    ours, eager = (load.step(op) for op in (load.ours(), load.eager()))
    dtype = load.inputs()[0].dtype
    error = check(ours, eager, load.step(load.eager(), torch.float64), dtype)
    makers = {
        "ours": lambda: ours,
        "Liger": lambda: load.step(load.liger()),
        "torch eager": lambda: eager,
        "torch compiled": lambda: load.step(torch.compile(load.eager())),
    }
    title = f"{load.name} {load.dtype}, {load.tokens} rows of {load.columns}"
    group = measured(title, "ours", makers, rounds=50, note=f"Our error {error:.1e}.")
    add_share(group, "of copy", load.least_bytes, limits["bytes_per_second"])
    of_copy = load.least_bytes / group.median("ours") / limits["bytes_per_second"]
    group.goals = [Goal("share of the copy bandwidth", of_copy, 0.9, at_least=True)]
    return group


def sequences(limits: dict[str, float], tokens: int, device: str = "cuda") -> Group:
    ids = position_ids(tokens, device)
    makers = {
        "ours": lambda: find_sequences(ids, capacity=len(ids) // 100),
        "torch ops": lambda: find_sequences(ids, "reference", len(ids) // 100),
    }
    found, truth = (make()() for make in makers.values())
    assert torch.equal(found.cu_seqlens, truth.cu_seqlens)
    group = measured(f"Sequences, T = {len(ids)}", "ours", makers, rounds=50)
    add_share(group, "of copy", ids.nbytes, limits["bytes_per_second"])
    return group


GROUPS: tuple[Callable[[dict[str, float]], Group], ...] = (
    partial(rope, load=HeadsLoad("bf16", 16_384, 9, 3, 64, "cuda")),
    partial(rope, load=HeadsLoad("bf16", 16_384, 32, 8, 128, "cuda")),
    partial(cross_entropy, rows=4096, vocab=49_152),
    partial(cross_entropy, rows=4096, vocab=128_256),
    partial(head, load=HeadLoad("bf16", 49_152, 16_384, 576, device="cuda")),
    partial(head, load=HeadLoad("bf16", 128_256, 8192, 4096, device="cuda")),
    partial(attention, load=HeadsLoad("bf16", 16_384, 32, 8, 128, "cuda")),
    partial(elementwise, load=NormLoad("bf16", 16_384, 2048)),
    partial(elementwise, load=NormLoad("bf16", 16_384, 4096)),
    partial(elementwise, load=SwigluLoad("bf16", 16_384, 8192)),
    partial(sequences, tokens=1_000_000),
)


def chart(groups: list[dict[str, Any]], path: Path) -> str:
    """A PNG with the milliseconds of all groups; a line that says what was done."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "No PNG: matplotlib is not installed."
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(groups), figsize=(9, 2.4 * len(groups)), squeeze=False)
    for axis, group in zip(axes[:, 0], groups, strict=True):
        rows = {name: row["seconds_median"] * 1e3 for name, row in group["rows"].items()}
        bars = axis.barh(list(rows), list(rows.values()))
        axis.bar_label(bars, fmt="%.3g ms", padding=3)
        axis.set_title(group["group"], fontsize=9)
        axis.invert_yaxis()
        axis.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return f"Chart: {path.name}"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=HELP, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder (default: results)")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"bench_gpu: torch {torch.__version__} finds no CUDA device: nothing was measured.")
        return 0
    start, console = time.perf_counter(), Console(width=None if sys.stdout.isatty() else 130)
    limits, environment, groups = gpu_timing.machine_limits(), gpu_timing.environment(), []
    for make in GROUPS:
        group = make(limits)
        console.print(render(group))
        groups.append(as_json(group))
        del group
        torch.cuda.empty_cache()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = limits | {"minutes": (time.perf_counter() - start) / 60}
    content = {"environment": environment, "limits": facts, "groups": groups}
    (args.out / "gpu.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    console.print(chart(groups, args.out / "gpu.png"))
    console.print(f"{environment} {facts}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
