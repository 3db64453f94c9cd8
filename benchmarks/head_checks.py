"""Errors of a loss head against fp64, and the memory that it takes in a process of its own.

``python benchmarks/head_checks.py --probe NAME ...`` is that process.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable

import torch
from peers import HEADS, HeadInputs, HeadLoad, head_step
from torch import Tensor

from varlen_sft import reference
from varlen_sft.tools import step_bench


def head_truth(x: HeadInputs, rows: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss, gradients of hidden and weight from the reference in fp64, ``rows`` at a time."""
    weight = x.weight.detach().double().requires_grad_()
    dhidden, loss = torch.zeros_like(x.hidden, dtype=torch.float64), weight.new_zeros(())
    for part in x.scored.split(rows):
        hidden = x.hidden.detach()[part].double().requires_grad_()
        out = reference.linear_cross_entropy(hidden, weight, x.labels[part])
        (out.loss_sum / len(x.scored)).backward()
        dhidden[part], loss = hidden.grad, loss + out.loss_sum.detach() / len(x.scored)
    return loss.detach(), dhidden, weight.grad


def head_errors(
    step: Callable[[], Tensor], x: HeadInputs, truth: tuple[Tensor, ...]
) -> dict[str, float]:
    """Relative errors (L2) of loss, hidden gradient and weight gradient against the truth."""
    got = (step(), x.hidden.grad, x.weight.grad)
    names = ("loss error", "dhidden error", "dweight error")
    return {
        name: float((value.double() - true).norm() / true.norm())
        for name, value, true in zip(names, got, truth, strict=True)
    }


def refuse_worse(
    errors: dict[str, dict[str, float]], dtype: torch.dtype, candidate: str = "ours"
) -> None:
    """AssertionError unless our errors are within twice eager torch's, plus one rounding."""
    for key, error in errors[candidate].items():
        bound = 2 * errors["naive"][key] + torch.finfo(dtype).eps
        assert error <= bound, f"{candidate}: {key} {error:.1e} > {bound:.1e}"


# --------------------------------------------------------------------- memory


def peak_memory(name: str, load: HeadLoad, threads: int) -> int:
    """Bytes that one forward and backward of a head adds to a fresh process at its peak."""
    words = ["--probe", name, "--dtype", load.dtype, "--vocab", load.vocab, "--hidden", load.hidden]
    words += ["--tokens", load.tokens, "--threads", threads]
    done = subprocess.run(
        [sys.executable, __file__, *map(str, words)], capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"the memory probe of {name!r} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])["extra_bytes"]


def main() -> None:
    """Print one JSON line: the extra memory of one head, alone in this process."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--probe", required=True, choices=HEADS)
    parser.add_argument("--dtype", required=True, choices=step_bench.DTYPES)
    for name in ("vocab", "tokens", "hidden", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warm_up = HeadLoad(args.dtype, vocab=64, tokens=64, hidden=32).make()
    head_step(HEADS[args.probe](warm_up), warm_up)()  # what is imported late is no head's memory
    x = HeadLoad(args.dtype, args.vocab, args.tokens, args.hidden).make()
    step = head_step(HEADS[args.probe](x), x)
    before = step_bench._resident("VmRSS")
    loss = float(step())
    print(json.dumps({"loss": loss, "extra_bytes": step_bench._resident("VmHWM") - before}))


if __name__ == "__main__":
    main()
