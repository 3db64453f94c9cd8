"""The part of a run's configuration that decides its samples, packs and steps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from varlen_sft.data.balance import Balance
from varlen_sft.data.load import OnError
from varlen_sft.data.masks import History, MaskOptions, SupervisionMode
from varlen_sft.data.overlong import Overlong
from varlen_sft.data.packing import Method
from varlen_sft.errors import InputError

__all__ = ["DataConfig", "StageConfig", "StreamConfig", "require"]


def require(holds: bool, expected: str, value: object) -> None:
    if not holds:
        raise InputError(f"{expected}, is {value!r}")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Rows and what of them is trained. A prepared set was told when it was made: `mask` options
    hold for raw sources."""

    train: tuple[str, ...] = ()
    """Raw sources as `varlen-sft prepare` takes them, or PREFIXes of prepared sets."""
    valid: tuple[str, ...] = ()
    """The same, for the validation loss."""
    cache: Path | None = None
    """Folder of the sets that are prepared from raw sources; OUT/prepared if not given."""
    template: Path | None = None
    """A Jinja file instead of the model's chat template."""
    conversation_column: str | None = None
    """The column that holds the messages, where it is neither messages nor conversations."""
    supervision_mode: SupervisionMode = "assistant"
    """Which messages are trained."""
    train_roles: tuple[str, ...] = ()
    """With supervision_mode: roles."""
    history: History = "as_rendered"
    """Where a template writes earlier answers otherwise than they were said."""
    prompt_weight: float = 0.0
    """Weight of the tokens that are no answer."""
    equal_sample_weight: bool = False
    """The weights of each row sum to 1."""
    on_error: OnError = "error"
    """What becomes of a row that cannot be used; skipped ones are listed in a file."""
    overlong: Overlong = "error"
    """What becomes of a row that does not fit a pack."""
    processes: int | None = None
    """That tokenise; as many as there are cores if not given."""
    mock: bool = False
    """Steps of made-up tokens from memory, as long as the real ones, to see what loading costs."""

    def __post_init__(self) -> None:
        require(self.processes is None or self.processes >= 1, "data.processes must be 1 or more",
                 self.processes)  # fmt: skip
        _ = self.masks

    @property
    def masks(self) -> MaskOptions:
        """What is trained, as data/masks takes it."""
        try:
            return MaskOptions(
                supervision_mode=self.supervision_mode,
                roles=self.train_roles,
                history=self.history,
                prompt_weight=self.prompt_weight,
                equal_sample_weight=self.equal_sample_weight,
            )
        except ValueError as error:
            raise InputError(f"data: {error}".replace("roles must", "train_roles must")) from None


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """Packs and steps. Ranks and accumulation share a step out; they never change it."""

    max_tokens: int = 4096
    """T, the most tokens in a pack."""
    packs_per_step: int = 8
    """P, packs of one optimiser step over all ranks and micro-batches."""
    packing: Method = "planned"
    """How samples are put into packs; false is none: every sample alone."""
    balance: Balance = "window"
    """Among which packs loads are evened out."""
    isolate: bool = True
    """Attention stays inside each sample. False is for comparison: a pack is one document."""
    weights: tuple[float, ...] | None = None
    """One per source of data.train: how often samples of it are drawn; none takes all once."""
    accumulate: int | None = None
    """Micro-batches of a rank in a step; one per pack if not given."""
    threads: int = 1
    """That read and collate ahead; 0 does it when a step is asked for."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "packs_per_step", "accumulate"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"stream.{name} must be 1 or more", value)
        require(self.threads >= 0, "stream.threads must be 0 or more", self.threads)


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Other data from a step on."""

    name: str
    """What it is called in messages."""
    start_training_step: int
    """The step, counted from 1, that is the first of these data; of the first stage 1."""
    train: tuple[str, ...]
    """As data.train."""
    weights: tuple[float, ...] | None = None
    """As stream.weights."""
