"""Checkpoints: what a save holds up, what it costs the next step, and what a resume takes."""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import script
from rich.table import Table

HELP = """\
Trains a Llama of SmolLM2-135M's sizes (bf16, fp32 weights in the optimiser, random weights) on one
pack over and over, and saves its whole state: 1.9 GB.

Of each way: how long the call holds up training, how long the step after it takes against a step
beside which nothing is written, and how long until all is on the disk. Rounds are interleaved,
figures are medians; the first round, in which memory is fetched, counts nowhere. What ours wrote is
read back, and has to be the same bit for bit, or nothing is printed.

"one copy" clones every tensor of the state, which is what any save that goes on beside training
has to do at least.
"""
SIZES = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}  # fmt: skip
LENGTH = 512  # tokens of a sample
STALL, SLOWER = 1.5, 1.1  # promised: of one copy, and of a step


class Run:
    """A model in training."""

    def __init__(
        self, tokens: int, seed: int, sizes: Mapping[str, Any] = MappingProxyType(SIZES)
    ) -> None:
        import torch

        from varlen_sft.data.batch import collate
        from varlen_sft.data.sample import Sample
        from varlen_sft.models.config import LlamaConfig
        from varlen_sft.models.llama import LlamaForSFT
        from varlen_sft.train.checkpoint import ModelState, RandomState
        from varlen_sft.train.optimizer import MasterAdamW

        torch.manual_seed(seed)
        self.model = LlamaForSFT(LlamaConfig.from_hf(dict(sizes))).to(torch.bfloat16)
        self.optimizer = MasterAdamW(self.model)
        self.parts = {
            "model": ModelState(self.model),
            "optimizer": self.optimizer,
            "random": RandomState(),
        }
        draw = np.random.default_rng(seed)
        self.batch = collate(
            [
                Sample(
                    draw.integers(0, sizes["vocab_size"], LENGTH + 1, dtype=np.int32),
                    np.ones(LENGTH + 1, np.float32),
                    np.zeros(LENGTH + 1, np.uint8),
                )
                for _ in range(tokens // LENGTH)
            ]
        )

    def step(self) -> None:
        output = self.model(self.batch)
        output.loss_sum.backward()
        self.optimizer.step(1e-5, 1.0, divisor=output.weight_sum)

    def tensors(self) -> dict[str, Any]:
        from varlen_sft.train.checkpoint_state import parted

        found: dict[str, Any] = {}
        for name, part in self.parts.items():
            found |= parted(name, part.state_dict())[0]
        return found


# ------------------------------------------------------------------- candidates

Way = Callable[[int], Callable[[], Any]]
"""Saves, and gives what waits until all is on the disk."""


def ways(run: Run, folder: Path, checkpoints: Any) -> dict[str, Way]:
    import torch

    def ours(number: int) -> Callable[[], Any]:
        checkpoints.save(run.parts, number)
        return checkpoints.wait

    def one_copy(number: int) -> Callable[[], Any]:
        copies = {name: tensor.clone() for name, tensor in run.tensors().items()}
        return copies.clear

    def torch_save(number: int) -> Callable[[], Any]:
        torch.save(run.tensors(), folder / "state.pt")
        return (folder / "state.pt").unlink

    return {"Checkpointer": ours, "one copy": one_copy, "torch.save": torch_save}


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return work(), time.perf_counter() - start


def measure(
    run: Run, folder: Path, rounds: int, left_out: Sequence[str] = ()
) -> dict[str, dict[str, list[float]]]:
    """Seconds by way and by what was timed."""
    from varlen_sft.train.checkpoint import Checkpointer

    found: dict[str, dict[str, list[float]]] = {}
    with Checkpointer(folder / "ours", keep=1) as checkpoints:
        for number in range(rounds + 1):
            for name, save in ways(run, folder, checkpoints).items():
                if name in left_out:
                    continue
                _, plain = timed(run.step)
                start = time.perf_counter()
                wait, stall = timed(partial(save, number))
                _, after = timed(run.step)
                wait()
                whole = time.perf_counter() - start
                if number:
                    times = found.setdefault(name, {"plain": [], "stall": [], "after": [],
                                                    "whole": []})  # fmt: skip
                    for key, value in zip(times, (plain, stall, after, whole), strict=True):
                        times[key].append(value)
        found["resume"] = {"seconds": [resumed(run, checkpoints)]}
    return found


def resumed(run: Run, checkpoints: Any) -> float:
    """Seconds to find, check and load the newest, which has to be what the state is."""
    import torch

    checkpoints.save(run.parts, 10**6)
    checkpoints.wait()
    expected = {name: tensor.clone() for name, tensor in run.tensors().items()}
    run.step()
    _, seconds = timed(lambda: checkpoints.load(run.parts, checkpoints.latest()))
    for name, tensor in run.tensors().items():
        if not name.startswith("random.") and not torch.equal(tensor, expected[name]):
            raise SystemExit(f"{name} did not come back bit for bit")
    return seconds


# ---------------------------------------------------------------------- results


def summary(found: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    """Medians, and the times they are of."""
    plain = statistics.median(t for times in found.values() for t in times.get("plain", ()))
    copy = statistics.median(found["one copy"]["stall"])
    results: dict[str, Any] = {"step_s": plain, "resume_s": found["resume"]["seconds"][0]}
    for name, times in found.items():
        if name == "resume":
            continue
        stall, after, whole = (statistics.median(times[k]) for k in ("stall", "after", "whole"))
        ratio = statistics.median(
            a / p for a, p in zip(times["after"], times["plain"], strict=True)
        )
        results[name] = {"stall_s": stall, "of_one_copy": stall / copy, "next_step": ratio,
                         "after_s": after, "until_on_disk_s": whole, "times": times}  # fmt: skip
    return results


def table(results: Mapping[str, Any]) -> Table:
    """A row for each way of saving."""
    shown = Table("saved by", "holds up, s", "of one copy", "next step", "until on disk, s")
    for name, row in results.items():
        if isinstance(row, Mapping):
            on_disk = "-" if name == "one copy" else f"{row['until_on_disk_s']:.1f}"
            figures = (f"{row['of_one_copy']:.2f}x", f"{row['next_step']:.2f}x", on_disk)
            shown.add_row(name, f"{row['stall_s']:.2f}", *figures)
    return shown


def main() -> int:
    parser = script.parser(HELP, __file__)
    parser.add_argument("--tokens", type=int, default=8192, help="of the pack (default: 8192)")
    parser.add_argument("--rounds", type=int, default=5, help="that are timed (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and pack (default: 0)")
    args = parser.parse_args()

    from varlen_sft.tools.environment import environment
    from varlen_sft.train.memory import keep_freed_memory

    keep_freed_memory()
    stamped = environment()
    console = script.console()
    run = Run(args.tokens, args.seed)
    with tempfile.TemporaryDirectory() as folder:
        results = summary(measure(run, Path(folder), args.rounds))
    console.print(table(results))
    size = sum(tensor.nbytes for tensor in run.tensors().values())
    ours = results["Checkpointer"]
    console.print(
        f"state {size / 1e9:.2f} GB, step {results['step_s']:.2f} s, resume "
        f"{results['resume_s']:.1f} s",
        script.goal(ours["of_one_copy"] <= STALL, f"holds up at most {STALL} copies"),
        script.goal(ours["next_step"] <= SLOWER, f"next step at most {SLOWER}x"),
        sep="\n",
        highlight=False,
    )
    return script.finish(
        console, args.json, stamped, {"bytes": size, "tokens": args.tokens, **results}
    )


if __name__ == "__main__":
    sys.exit(main())
