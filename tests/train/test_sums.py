from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.helpers import random_samples, tiny_hf_config, tiny_model
from varlen_sft.data.batch import STOP, PackedBatch, collate, target_roles
from varlen_sft.data.sample import ROLES, Sample
from varlen_sft.data.stream_step import Counts
from varlen_sft.train.stages import as_one_document
from varlen_sft.train.sums import MICRO_BATCH, StepSums, host_sums, micro_batch_sums

NONE, SYSTEM, USER, ASSISTANT, TOOL = range(len(ROLES))
TURNS = [NONE, USER, USER, NONE, ASSISTANT, ASSISTANT, NONE, TOOL, NONE, ASSISTANT, ASSISTANT]
"""Of the tokens of a conversation of two answers, whose stop tokens are the 6th and the last."""


def with_roles(sample: Sample) -> Sample:
    roles = np.resize(np.array(TURNS, np.uint8), len(sample))
    return replace(sample, roles=roles)


def step_sums(device: list[torch.Tensor], host: list[torch.Tensor]) -> StepSums:
    return StepSums.of(torch.cat([sum(device), sum(host)]).tolist())


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def host(rank: int = 0, ranks: int = 1, **changes) -> torch.Tensor:
    given = {"seconds": 0.0, "stop": False, "own": (0.0, 0.0), **changes}
    return host_sums(given.pop("counts", [Counts()]), rank=rank, ranks=ranks, **given)


def test_the_stop_token_is_the_last_of_each_answer():
    sample = Sample(
        np.arange(11, dtype=np.int32), np.ones(11, np.float32), np.array(TURNS, np.uint8)
    )
    found = target_roles(sample)
    assert (found & (STOP - 1)).tolist() == TURNS[1:]  # row i learns token i + 1
    assert np.flatnonzero(found >= STOP).tolist() == [5 - 1, 10 - 1]
    assert found.dtype == np.uint8


def test_losses_of_roles_and_stop_tokens_are_weighted_means_over_their_targets():
    model = tiny_model(tiny_hf_config())
    samples = [with_roles(s) for s in random_samples([11, 30, 4, 22, 9])]
    parts = [samples[:2], samples[2:]]
    device, by_kind = [], {kind: [0.0, 0.0] for kind in (*range(len(ROLES)), "stop")}
    for part in parts:
        batch = collate(part, pad_multiple=64)
        output = model(batch)
        device.append(micro_batch_sums(output, batch))
        losses = output.token_loss.tolist()
        at = 0
        for sample in part:
            for i in range(1, len(sample)):
                role, weight = int(sample.roles[i]), float(sample.token_weights[i])
                last = i + 1 == len(sample) or sample.roles[i + 1] != ASSISTANT
                kinds = [role, "stop"] if role == ASSISTANT and last else [role]
                for kind in kinds:
                    by_kind[kind][0] += weight * losses[at]
                    by_kind[kind][1] += weight
                at += 1
    sums = step_sums(device, [host()])
    whole = model(collate(samples))
    assert sums.mean == pytest.approx(float(whole.loss_sum / whole.weight_sum), rel=1e-10)
    assert [name for name in sums.role_loss] == ["none", "user", "assistant", "tool"]
    for name, loss in sums.role_loss.items():
        total, weight = by_kind[ROLES.index(name)]
        assert loss == pytest.approx(total / weight, rel=1e-10), name
    total, weight = by_kind["stop"]
    assert sums.stop_loss == pytest.approx(total / weight, rel=1e-10)
    roles = sums.kinds[: len(ROLES)]
    assert sum(loss for loss, _ in roles) == pytest.approx(sums.loss, rel=1e-10)
    assert sum(weight for _, weight in roles) == sums.weight  # of quarters: exact


def test_pairs_are_what_supervised_rows_see():
    model = tiny_model(tiny_hf_config())
    samples = random_samples([11, 30, 4])
    batch = collate(samples, pad_to=64)
    seen = sum(i for s in samples for i in range(1, len(s)) if s.token_weights[i] > 0)
    assert step_sums([micro_batch_sums(model(batch), batch)], [host()]).pairs == seen
    one = as_one_document(batch)
    starts = np.cumsum([0, *(len(s) - 1 for s in samples)])
    more = sum(int(start) * int((s.token_weights[1:] > 0).sum())
               for s, start in zip(samples, starts[:-1], strict=True))  # fmt: skip
    assert step_sums([micro_batch_sums(model(one), one)], [host()]).pairs == seen + more


def test_a_batch_that_knows_no_roles_has_a_loss_all_the_same():
    model = tiny_model(tiny_hf_config())
    batch = replace(collate(random_samples([9, 12])), target_roles=None)
    output = model(batch)
    sums = step_sums([micro_batch_sums(output, batch)], [host()])
    assert sums.mean == pytest.approx(float(output.loss_sum / output.weight_sum), rel=1e-12)
    assert sums.role_loss == {} and sums.stop_loss is None


def test_nothing_supervised_is_0_and_no_role():
    model = tiny_model(tiny_hf_config())
    blank = replace(random_samples([9])[0], token_weights=np.zeros(9, np.float32))
    batch = collate([blank])
    sums = step_sums([micro_batch_sums(model(batch), batch)], [host()])
    assert (sums.mean, sums.pairs, sums.role_loss, sums.stop_loss) == (0, 0, {}, None)


def test_ranks_add_up_but_for_what_each_has_of_its_own():
    nothing = torch.zeros(MICRO_BATCH, dtype=torch.float64)
    first = host(0, 3, seconds=7.5, own=(0.25, 4e9), counts=[Counts(2, 30, 8, 6.5, 500)] * 2)
    second = host(1, 3, stop=True, own=(1.5, 3e9), counts=[Counts(1, 9, 3, 3.0, 81)])
    third = host(2, 3, own=(0.5, 5e9 + 1))
    sums = step_sums([nothing], [first, second, third])
    assert (sums.tokens, sums.supervised, sums.sequences, sums.squares) == (69, 19, 5, 1081)
    assert (sums.seconds, sums.stop) == (7.5, 1)
    assert (sums.stall_s, sums.peak_memory) == (1.5, 5 * 10**9 + 1)


def test_roles_go_where_the_batch_goes():
    batch = collate([with_roles(s) for s in random_samples([11, 5])], pad_to=20)
    expected = [*TURNS[1:5], ASSISTANT | STOP, *TURNS[6:10], ASSISTANT | STOP]
    # The five tokens of the other end within its answer, which ends there all the same.
    expected += [*TURNS[1:4], ASSISTANT | STOP, *[0] * 6]
    assert batch.target_roles.tolist() == expected
    moved = batch.to("meta").target_roles
    assert moved.device.type == "meta" and moved.dtype == torch.uint8
    with pytest.raises(ValueError, match=r"target_roles must have shape \(T=20,\), got \(3,\)"):
        PackedBatch(**{**vars(batch), "target_roles": torch.zeros(3, dtype=torch.uint8)})
