"""A run's numbers for others to draw: TensorBoard and Weights & Biases, where they are asked for.

Both get what OUT/log.jsonl has. Their packages are imported only then.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from varlen_sft.errors import InputError
from varlen_sft.train.checkpoint_state import RunIds
from varlen_sft.train.config import LogConfig
from varlen_sft.train.state import StepRecord

__all__ = ["TENSORBOARD", "Tracker", "TensorBoard", "Wandb", "numbers", "open_trackers"]
__all__ += ["require_trackers"]

TENSORBOARD = "tensorboard"
"""Folder in OUT."""
_FLUSH_S = 10


class Tracker(Protocol):
    """Somebody who draws numbers over steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name after a step of the run."""

    def close(self, *, failed: bool) -> None:
        """All that was logged is on its way; the run ended, or failed."""


def numbers(record: StepRecord) -> dict[str, float]:
    """What a tracker gets of a step, by names that group what belongs together."""
    found: dict[str, float | None] = {
        "train/loss": record.loss,
        **{f"train/loss_{role}": loss for role, loss in record.role_loss.items()},
        "train/loss_stop": record.stop_loss,
        "train/grad_norm": record.grad_norm,
        "train/lr": record.lr,
        "train/epoch": record.epoch,
        "data/real_tokens": record.real_tokens,
        "data/supervised_tokens": record.supervised_tokens,
        "data/sequences": record.sequences,
        "data/fill": record.fill,
        "speed/real_tokens_per_s": record.real_tokens_per_s,
        "speed/supervised_tokens_per_s": record.supervised_tokens_per_s,
        "speed/step_time_s": record.step_time_s,
        "speed/stall": record.stall,
        "speed/tflops": record.tflops,
        "speed/naive_tflops": record.naive_tflops,
        "speed/mfu": record.mfu,
        "memory/peak_gb": record.peak_memory / 1e9,
    }
    return {name: value for name, value in found.items() if value is not None}


def require_trackers(config: LogConfig) -> None:
    """Say at once, before anything is prepared, that a package is missing.

    Raises:
        InputError: it is; names the package and how to get it.
    """
    for package, wanted in (("tensorboard", config.tensorboard), ("wandb", config.wandb)):
        found = importlib.util.find_spec(package) if wanted else None
        # A folder of that name, as W&B leaves them, is found too: as a package without a file.
        if wanted and (found is None or found.origin is None):
            raise InputError(
                f"log.{package} needs the package {package}, which is not installed: "
                f"pip install 'varlen-sft[{package}]'"
            )


def open_trackers(
    config: LogConfig, out: Path, settings: Mapping[str, Any], ids: RunIds, step: int
) -> list[Tracker]:
    """Those that the configuration asks for; one rank does it.

    Args:
        out: folder of the run.
        settings: the run's configuration by path.
        ids: under which the run is known; a new one is added, to be kept in its checkpoints.
        step: the last step that is behind. What a tracker has of later ones is drawn again.

    Raises:
        InputError: a package is missing; W&B does not take the run, such as without a key.
    """
    require_trackers(config)
    opened: list[Tracker] = []
    if config.tensorboard:
        opened.append(TensorBoard(out / TENSORBOARD, settings, step))
    if config.wandb is not None:
        opened.append(Wandb(config.wandb, out, settings, ids))
    return opened


class TensorBoard:
    """Event files that ``tensorboard --logdir`` reads, also while the run goes on.

    Args:
        folder: of the run's event files; a run that goes on adds one to them.
        settings, step: see ``open_trackers``.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(
            str(folder), purge_step=step + 1 if step else None, flush_secs=_FLUSH_S
        )
        text = "\n".join(f"    {key}: {value}" for key, value in settings.items())
        self._writer.add_text("config", text, global_step=step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb:
    """A run of Weights & Biases, the same one again where the run's checkpoint knows it.

    Args:
        project: it belongs to.
        out: where W&B keeps what is not sent yet, in a folder of its own.
        settings, ids: see ``open_trackers``; the id is under "wandb".

    Raises:
        InputError: W&B does not take it.
    """

    def __init__(self, project: str, out: Path, settings: Mapping[str, Any], ids: RunIds) -> None:
        import wandb

        try:
            self._run: Any = wandb.init(
                project=project,
                id=ids.get("wandb"),
                name=out.name,
                resume="allow",
                dir=str(out),
                config=dict(settings),
                settings=wandb.Settings(console="off"),  # the progress line is not for it
            )
        except wandb.Error as error:
            reason = str(error).strip() or type(error).__name__
            raise InputError(
                f"log.wandb: W&B does not take the run: {reason}; WANDB_MODE=offline does without "
                "a key and a network"
            ) from error
        ids["wandb"] = self._run.id
        # A run that goes on repeats steps that W&B has; its own counter cannot go back.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
