"""AdamW on fp32 weights, whatever dtype the model computes in and however it is sharded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from varlen_sft.errors import InputError
from varlen_sft.train.shards import local, total_norm, whole

__all__ = ["GradientSums", "MasterAdamW", "freeze"]

_WIDE = (torch.float32, torch.float64)


class GradientSums(dict[nn.Parameter, Tensor]):
    """fp32 sums of the gradients of low-precision parameters over micro-batches.

    Added up in bf16, each sum would lose what is below 1/256 of it.
    """

    def add(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the gradients here. Those of wide parameters add up where they are, and stay."""
        for parameter in parameters:
            grad = parameter.grad
            if grad is None or parameter.dtype in _WIDE:
                continue
            held = self.get(parameter)
            if held is None:
                self[parameter] = local(grad).float()
            else:
                held.add_(local(grad))
            parameter.grad = None

    def take(self, parameter: nn.Parameter) -> Tensor | None:
        """The whole sum, in the parameter's own shard, and forget it; None without a gradient."""
        grad, held = parameter.grad, self.pop(parameter, None)
        if grad is None:
            return held
        last = local(grad)
        if held is not None:
            return held.add_(last)
        return last if last.dtype in _WIDE else last.float()


class MasterAdamW:
    """Fused AdamW that keeps fp32 copies of low-precision weights.

    A bf16 weight has 8 bits: an update below 1/256 of it would vanish, and late in a run most are.
    The copies collect them, and the model gets their rounding after each step. Of a model that
    FSDP2 shards, each rank keeps copies and moments of its own shards.

    Args:
        model: its parameters that require gradients are trained; already sharded.
        weight_decay: applied to matrices; vectors (norms, biases) are not decayed.
        betas, eps: of AdamW (Loshchilov and Hutter 1711.05101).

    Attributes:
        sums: where gradients of micro-batches add up between steps.

    Raises:
        ValueError: no parameter requires a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise ValueError("a parameter of the model must require gradients, none does")
        self.names = [name for name, _ in named]
        self.parameters = [p for _, p in named]
        self.sums = GradientSums()
        self._shards = [local(p) for p in self.parameters]
        self.masters = [s if s.dtype in _WIDE else s.float() for s in self._shards]
        filled = [m for m in self.masters if m.numel()] or self.masters
        stepped = {id(m) for m in filled}
        self._rowless = [k for k, m in enumerate(self.masters) if id(m) not in stepped]
        groups = [
            {"params": [m for m in filled if m.dim() > 1], "weight_decay": weight_decay},
            {"params": [m for m in filled if m.dim() <= 1], "weight_decay": 0.0},
        ]
        self._adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]], lr=0.0, betas=betas, eps=eps, fused=True
        )
        self._first = [torch.zeros_like(m) for m in self.masters]
        self._second = [torch.zeros_like(m) for m in self.masters]
        self._updates = torch.zeros(len(named), device=self.masters[0].device)
        self._set_state()

    def step(
        self,
        lr: float,
        max_grad_norm: float,
        *,
        divisor: Tensor | None = None,  # () on the model's device
        skip: Tensor | None = None,  # () bool on the model's device
    ) -> Tensor:
        """Divide and clip, update, round back into the model, and drop the gradients.

        Nothing is updated, moments and counts of updates included, where the divisor is 0, the norm
        is not finite, or ``skip`` says so. That is decided on the device: nobody waits for it.

        Args:
            lr: learning rate of this step.
            max_grad_norm: gradients are scaled down to this global L2 norm if theirs is larger.
            divisor: gradients are divided by it; 1 if None.
            skip: leave everything as it is.

        Returns:
            The norm after the division and before clipping, () on the model's device.

        Raises:
            RuntimeError: the model's weights are not where they were.
        """
        self._gather()
        norm = total_norm([m.grad for m in self.masters], self.parameters)
        divisor = torch.ones_like(norm) if divisor is None else divisor.to(norm.dtype)
        none = divisor == 0
        divisor = torch.where(none, torch.ones_like(divisor), divisor)
        norm = norm / divisor
        clip = (max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        found = none | ~torch.isfinite(norm)
        found = found if skip is None else found | skip
        self._update(lr, divisor / clip, found)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Moments by the parameters' names, fp32 weights where the model has low precision, and the
        number of updates; of a sharded model as DTensors. They share memory with the optimiser."""
        pairs = list(zip(self.names, self.parameters, strict=True))
        copied = [m is not s for m, s in zip(self.masters, self._shards, strict=True)]

        def named(values: Sequence[Tensor]) -> dict[str, Tensor]:
            return {name: whole(v, p) for (name, p), v in zip(pairs, values, strict=True)}

        masters = named(self.masters)
        return {
            "masters": {n: m for (n, m), own in zip(masters.items(), copied, strict=True) if own},
            "exp_avg": named(self._first),
            "exp_avg_sq": named(self._second),
            "updates": self._updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take the values of ``state_dict``, of a model with the same parameters.

        Raises:
            InputError: parameters are missing, unknown or of other shapes.
        """
        here = self.state_dict()
        _require_same(_flat(state), _flat(here))
        there = _flat(state)
        with torch.no_grad():
            for name, value in _flat(here).items():
                local(value).copy_(local(there[name]))
        self._round_back()

    def _set_state(self) -> None:
        moments = zip(self.masters, self._first, self._second, self._updates, strict=True)
        for master, first, second, updates in moments:
            self._adamw.state[master] = {"step": updates, "exp_avg": first, "exp_avg_sq": second}

    def _gather(self) -> None:
        each = zip(self.parameters, self._shards, self.masters, strict=True)
        for parameter, shard, master in each:
            if local(parameter).data_ptr() != shard.data_ptr():
                raise RuntimeError(
                    "the model's weights were moved or replaced since its optimiser was made"
                )
            master.grad = self.sums.take(parameter)
            parameter.grad = None

    def _update(self, lr: float, scale: Tensor, skip: Tensor) -> None:
        for group in self._adamw.param_groups:
            group["lr"] = lr
        # What torch's GradScaler sets: the fused kernels divide by the one, and heed the other.
        vars(self._adamw).update(grad_scale=scale.float(), found_inf=skip.float())
        self._adamw.step()
        for number in self._rowless:  # other ranks count, and all have to hold the same
            if self.masters[number].grad is not None:
                self._updates[number] += 1 - skip.float()
        self._adamw.zero_grad(set_to_none=True)
        self._round_back()

    @torch.no_grad()
    def _round_back(self) -> None:
        for shard, master in zip(self._shards, self.masters, strict=True):
            if master is not shard:
                shard.copy_(master)


def freeze(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Leave parameters as they are, by shell patterns of their names (``layers.[0-3].*``).

    Returns:
        The names of those that are frozen.

    Raises:
        InputError: a pattern that fits no parameter, or nothing is left to train.
    """
    named = dict(model.named_parameters())
    frozen: dict[str, None] = {}
    for pattern in patterns:
        found = [name for name in named if fnmatchcase(name, pattern)]
        if not found:
            raise InputError(
                f"frozen: {pattern!r} fits no parameter; there are {', '.join(list(named)[:4])} ..."
            )
        frozen |= dict.fromkeys(found)
    for name in frozen:
        named[name].requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise InputError(f"frozen: {', '.join(patterns)} leave nothing to train")
    return list(frozen)


def _flat(state: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        inside = value if isinstance(value, Mapping) else {"": value}
        tensors |= {f"{key} {name}".strip(): tensor for name, tensor in inside.items()}
    return tensors


def _require_same(there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
    if odd := sorted(there.keys() ^ here.keys()):
        what = "is not of this model" if odd[0] in there else "is missing"
        raise InputError(f"the optimiser's state: {odd[0]} {what} ({len(odd)} such)")
    for name, value in here.items():
        if there[name].shape != value.shape:
            raise InputError(
                f"the optimiser's state: {name} must have shape {tuple(value.shape)}, "
                f"has {tuple(there[name].shape)}"
            )
