"""What a run is asked to do: one frozen dataclass per subject, a docstring under each field.

``config_file`` reads it from YAML and the command line; ``setup`` makes model, stream and optimiser
of it. A key's name there is its path here: ``optim.lr``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from varlen_sft.errors import InputError
from varlen_sft.train.config_data import DataConfig, StageConfig, StreamConfig, require
from varlen_sft.train.schedule import ScheduleKind

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DistConfig",
    "LogConfig",
    "ModelConfig",
    "OptimConfig",
    "RunConfig",
    "StageConfig",
    "StreamConfig",
    "TrainConfig",
]

Dtype = Literal["bf16", "fp32"]
Impl = Literal["own", "hf"]
Strategy = Literal["fsdp", "zero2", "ddp"]
"""What every rank holds whole during a step: one block of weights at a time, the weights, all."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    name: str
    """Folder in Hugging Face's format, or hub:OWNER/NAME, which is downloaded."""
    impl: Impl | None = None
    """own: LlamaForSFT; hf: transformers' model, patched. null: own for Llamas without LoRA."""
    dtype: Dtype = "bf16"
    """What the model computes in; the optimiser keeps fp32 weights either way."""
    random_init: bool = False
    """Start from random weights; of the model's folder, config and tokenizer are read."""
    lora_rank: int = 0
    """Above 0: train LoRA matrices of this rank (alpha twice the rank) on all linear layers."""
    frozen: tuple[str, ...] = ()
    """Parameters left as they are, by patterns such as embed_tokens.* or layers.[0-3].*"""
    activation_checkpointing: bool = False
    """Keep only the inputs of each layer and compute the rest again: less memory, more time."""
    compile: bool = False
    """Compile each layer with torch.compile."""

    def __post_init__(self) -> None:
        require(bool(self.name), "model.name must be given", self.name)
        require(self.lora_rank >= 0, "model.lora_rank must be 0 or more", self.lora_rank)
        if self.lora_rank and self.impl == "own":
            raise InputError("model.lora_rank needs model.impl: hf, since PEFT wraps such models")
        if self.lora_rank and self.frozen:
            raise InputError("model.frozen: with model.lora_rank all other weights are frozen")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW on fp32 weights, and its learning rate."""

    lr: float = 2e-5
    """Peak learning rate."""
    schedule: ScheduleKind = "cosine"
    """How it falls after the warm-up."""
    warmup: float = 0.03
    """Share of the run that is spent rising."""
    floor: float = 0.1
    """Share of the peak at the end of cosine and linear."""
    weight_decay: float = 0.0
    """Of matrices; norms and biases are not decayed."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm if theirs is larger."""

    def __post_init__(self) -> None:
        for name in ("lr", "max_grad_norm"):
            value = getattr(self, name)
            require(0 < value < math.inf, f"optim.{name} must be above 0", value)
        require(0 <= self.warmup < 1, "optim.warmup must be in [0, 1)", self.warmup)
        require(0 <= self.floor <= 1, "optim.floor must be in [0, 1]", self.floor)
        require(0 <= self.weight_decay < math.inf, "optim.weight_decay must be 0 or more",
                 self.weight_decay)  # fmt: skip
        require(all(0 <= beta < 1 for beta in self.betas), "optim.betas must be in [0, 1)",
                 self.betas)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long, where to, and how it is watched."""

    out: Path = Path("runs/train")
    """Folder of checkpoints, log, config.yaml and the model that is exported at the end."""
    steps: int | None = None
    """Steps of the run; instead of epochs."""
    epochs: float = 1.0
    """Times that the data are seen, where steps are not given."""
    seed: int = 0
    """Of the order of samples, and of random weights."""
    valid_every: int | None = None
    """Steps between validations; at the end only if not given. Needs data.valid."""
    valid_packs: int = 32
    """The most packs that a validation runs on, always the same ones."""

    def __post_init__(self) -> None:
        for name in ("steps", "valid_every", "valid_packs"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"run.{name} must be 1 or more", value)
        require(0 < self.epochs < math.inf, "run.epochs must be above 0", self.epochs)
        require(0 <= self.seed < 2**63, "run.seed must be 0 or more", self.seed)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives a kill."""

    every: int = 500
    """Steps between checkpoints; the last step always makes one."""
    keep: int = 2
    """Newest ones that are kept."""
    resume: bool = True
    """Go on from the newest good one in run.out; false refuses a folder that has one."""

    def __post_init__(self) -> None:
        require(self.every >= 1, "checkpoint.every must be 1 or more", self.every)
        require(self.keep >= 1, "checkpoint.keep must be 1 or more", self.keep)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is said while it runs. OUT/log.jsonl always has every step."""

    every_s: float = 10.0
    """Seconds between lines where no terminal can renew one."""
    tensorboard: bool = False
    """Write the numbers to OUT/tensorboard, too. Needs the package tensorboard."""
    wandb: str | None = None
    """Project of Weights & Biases that gets them, too. Needs wandb; WANDB_MODE is obeyed."""
    peak_tflops: float | None = None
    """TFLOP/s of one device in model.dtype, for MFU. Not given: of a known GPU in bf16."""
    samples: int = 4
    """Held-out conversations that the model answers at each validation; 0 for none."""
    sample_tokens: int = 128
    """The most tokens of such an answer."""

    def __post_init__(self) -> None:
        require(self.every_s >= 0, "log.every_s must be 0 or more", self.every_s)
        require(self.wandb != "", "log.wandb must name a project", self.wandb)
        peak = self.peak_tflops
        require(peak is None or 0 < peak < math.inf, "log.peak_tflops must be above 0", peak)
        require(self.samples >= 0, "log.samples must be 0 or more", self.samples)
        require(self.sample_tokens >= 1, "log.sample_tokens must be 1 or more", self.sample_tokens)


@dataclass(frozen=True, kw_only=True)
class DistConfig:
    """Several ranks, as torchrun starts them; one process reads none of it."""

    strategy: Strategy = "fsdp"
    """fsdp shards weights, gradients and optimiser; zero2, too, but keeps weights whole during a
    step: more memory, fewer exchanges; ddp copies all."""
    timeout_s: float = 50.0
    """After so long a rank that does not answer ends the run by name."""

    def __post_init__(self) -> None:
        require(0 < self.timeout_s < math.inf, "dist.timeout_s must be above 0", self.timeout_s)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A run."""

    model: ModelConfig
    data: DataConfig = field(default_factory=DataConfig)
    stream: StreamConfig = field(default_factory=StreamConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    run: RunConfig = field(default_factory=RunConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    dist: DistConfig = field(default_factory=DistConfig)
    stages: tuple[StageConfig, ...] = ()
    """Instead of data.train: what is trained from which step on."""

    def __post_init__(self) -> None:
        made_up = self.data.mock and not self.data.train  # mock data need no source
        if bool(self.data.train) == bool(self.stages) and not made_up:
            raise InputError("data.train or stages must be given, and not both")
        if self.stages:
            _check_stages(self)
        if self.run.valid_every is not None and not self.data.valid:
            raise InputError("run.valid_every needs data.valid, which names no source")

    @property
    def all_stages(self) -> tuple[StageConfig, ...]:
        """The stages; of a run without any, its data as one."""
        whole = StageConfig(
            name="data", start_training_step=1, train=self.data.train, weights=self.stream.weights
        )
        return self.stages or (whole,)


def _check_stages(config: TrainConfig) -> None:
    starts = [stage.start_training_step for stage in config.stages]
    if starts[0] != 1 or any(b <= a for a, b in zip(starts, starts[1:], strict=False)):
        raise InputError(f"start_training_step of the stages must rise from 1, are {starts}")
    if any(not stage.train for stage in config.stages):
        raise InputError("every stage must name a source in train")
    if config.stream.weights is not None:
        raise InputError("stream.weights: with stages, each stage has weights of its own")
    if config.run.steps is None or config.run.steps < starts[-1]:
        raise InputError(
            f"run.steps must be given with stages, and reach the last one's start {starts[-1]}, "
            f"is {config.run.steps}"
        )
