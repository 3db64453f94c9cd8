from __future__ import annotations

import pytest
import torch
from torch import nn

from varlen_sft.errors import InputError
from varlen_sft.train.optimizer import GradientSums, MasterAdamW, freeze


def made(dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, MasterAdamW]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).to(dtype)
    return model, MasterAdamW(model, weight_decay=0.1)


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def snapshot(model: nn.Module, optimizer: MasterAdamW) -> list[torch.Tensor]:
    state = optimizer.state_dict()
    kept = [*state["masters"].values(), *state["exp_avg"].values(), *state["exp_avg_sq"].values()]
    return [t.detach().clone() for t in (*model.parameters(), *kept, state["updates"])]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("why", ["skip", "divisor", "gradient"])
def test_a_step_that_is_skipped_changes_no_bit(dtype, why):
    model, optimizer = made(dtype)
    give_gradients(model, 1)
    optimizer.step(1e-2, 1.0)
    before = snapshot(model, optimizer)
    give_gradients(model, 2)
    if why == "gradient":
        model[0].weight.grad[0, 0] = torch.nan
    divisor = torch.tensor(0.0 if why == "divisor" else 2.0)
    norm = optimizer.step(1e-2, 1.0, divisor=divisor, skip=torch.tensor(why == "skip"))
    assert bool(norm.isnan()) == (why == "gradient")
    for a, b in zip(before, snapshot(model, optimizer), strict=True):
        assert torch.equal(a, b)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("max_norm", [0.3, 1e9])
def test_gradients_are_divided_before_they_are_clipped(max_norm):
    (model, optimizer), (other, theirs) = made(torch.float64), made(torch.float64)
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(other, seed)
        for parameter in other.parameters():
            parameter.grad /= 7
        norm = optimizer.step(1e-2, max_norm, divisor=torch.tensor(7.0))
        assert norm == pytest.approx(float(theirs.step(1e-2, max_norm)), rel=1e-12)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=0)  # its scale is fp32


def test_micro_batches_add_up_in_fp32():
    parameter = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    sums = GradientSums()
    for value in [1.0] + [2**-9] * 4:
        parameter.grad = torch.full((2,), value, dtype=torch.bfloat16)
        sums.add([parameter])
        assert parameter.grad is None
    parameter.grad = torch.full((2,), 2**-9, dtype=torch.bfloat16)
    assert sums.take(parameter).tolist() == [1 + 5 * 2**-9] * 2 and not sums


def test_wide_gradients_stay_where_they_are():
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.ones(2)
    sums = GradientSums()
    sums.add([parameter])
    assert not sums and sums.take(parameter).tolist() == [1, 1]
    assert sums.take(nn.Parameter(torch.zeros(2))) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_run_that_goes_on_from_a_state_is_the_same_bit_for_bit(dtype):
    model, optimizer = made(dtype)
    for seed in range(2):
        give_gradients(model, seed)
        optimizer.step(1e-2, 1.0)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = optimizer.state_dict()
    kept = {key: value.clone() if key == "updates" else {n: v.clone() for n, v in value.items()}
            for key, value in state.items()}  # fmt: skip
    assert set(kept["masters"]) == (set(weights) if dtype == torch.bfloat16 else set())
    other, resumed = made(dtype)
    with torch.no_grad():
        other[0].weight.add_(1)  # a state is no use without the weights it is of
    other.load_state_dict(weights)
    resumed.load_state_dict(kept)
    for each, of in ((model, optimizer), (other, resumed)):
        give_gradients(each, 5)
        of.step(1e-2, 1.0)
    for a, b in zip(snapshot(model, optimizer), snapshot(other, resumed), strict=True):
        assert torch.equal(a, b)


def test_a_state_of_another_model_is_refused():
    _, optimizer = made()
    state = optimizer.state_dict()
    short = {**state, "exp_avg": {k: v for k, v in state["exp_avg"].items() if k != "0.bias"}}
    with pytest.raises(InputError, match=r"exp_avg 0.bias is missing \(1 such\)"):
        optimizer.load_state_dict(short)
    wide = {**state, "masters": {**state["masters"], "0.bias": torch.zeros(9)}}
    with pytest.raises(InputError, match=r"masters 0.bias must have shape \(3,\), has \(9,\)"):
        optimizer.load_state_dict(wide)


def test_weights_that_were_replaced_are_noticed():
    model, optimizer = made()
    model[0].weight.data = model[0].weight.data.clone()
    give_gradients(model, 0)
    with pytest.raises(RuntimeError, match="weights were moved or replaced since its optimiser"):
        optimizer.step(1e-2, 1.0)


def test_parts_are_frozen_by_their_names():
    model, _ = made()
    assert freeze(model, ["0.*"]) == ["0.weight", "0.bias"]
    frozen, trained = model[0].weight.detach().clone(), model[1].weight.detach().clone()
    optimizer = MasterAdamW(model)
    assert optimizer.names == ["1.weight", "1.bias"]
    give_gradients(model[1], 0)
    optimizer.step(1e-2, 1.0)
    assert torch.equal(model[0].weight, frozen) and not torch.equal(model[1].weight, trained)
    with pytest.raises(InputError, match=r"frozen: 'layers.\*' fits no parameter; there are 0.wei"):
        freeze(model, ["layers.*"])
    with pytest.raises(InputError, match=r"frozen: \* leave nothing to train"):
        freeze(model, ["*"])
    with pytest.raises(ValueError, match="must require gradients, none does"):
        MasterAdamW(model)
