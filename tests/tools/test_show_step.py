"""``varlen-sft show PREFIX --step N`` shows what a run trained in that step."""

from __future__ import annotations

import json
import re
from itertools import islice

import pytest

from tests.data.prepared import chats, jsonl, made, model_folder
from varlen_sft import cli
from varlen_sft.data.masks import MaskOptions
from varlen_sft.data.store import Store
from varlen_sft.data.stream import OrderOptions, PackStream, StreamOptions
from varlen_sft.data.stream_state import save_state


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A prepared set, the steps of a run over it, a file with its state, and the model."""
    folder = tmp_path_factory.mktemp("run")
    model = model_folder(folder / "model")
    masks = MaskOptions(supervision_mode="all")  # first tokens, too, which are no targets
    made(folder / "set", model, jsonl(folder / "chats.jsonl", chats(40)), masks=masks)
    order = OrderOptions(max_tokens=96, packs_per_step=3, method="streaming", window=5, seed=2)
    stream = PackStream([Store(folder / "set")], order, StreamOptions(workers=0))
    steps = list(islice(stream, stream.steps_per_epoch + 2))
    state = folder / "stream.json"
    save_state(state, stream.state_dict())
    return folder / "set", steps, state, model


@pytest.fixture
def show(capsys, run):
    def called(*words: object, state=None) -> tuple[int, str, str]:
        prefix, _, usual, model = run
        known = ["show", prefix, "--model", model, "--state", state or usual, *words]
        code = cli.main(list(map(str, known)))
        return code, *capsys.readouterr()

    return called


def fact(out: str, name: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith(name + "  ")]
    return line.removeprefix(name).strip()


def test_the_step_and_its_packs_are_told(run, show):
    prefix, steps, _, _ = run
    store = Store(prefix)
    for number in (1, 2, len(steps)):
        code, out, err = show("--step", number)
        assert (code, err) == (0, "")
        step = steps[number - 1]
        want = f"{number}: step {step.step} of epoch {step.epoch}, both from 0"
        assert fact(out, "step") == want
        for k, pack in enumerate(step.packs, 1):
            rows = " ".join(str(i + 1) for i in sorted(pack))
            tokens = sum(int(store.lengths[i]) - 1 for i in pack)
            supervised = sum(int(store.supervised[i]) for i in pack)
            name = f"pack {k} (shown)" if k == 1 else f"pack {k}"
            expected = f"{tokens} tokens, {supervised} supervised, rows {rows}"
            assert fact(out, name) == expected
        assert steps[-1].epoch == 1


def test_the_pack_that_is_asked_for_is_shown(run, show):
    _, steps, _, _ = run
    code, out, _ = show("--step", 2, "--step-pack", 3)
    assert code == 0
    rows = (steps[1].packs[2] + 1).tolist()
    assert [line.split("(")[1] for line in out.splitlines() if line.startswith("sequence ")
            and "(row" in line] == [f"row {row})" for row in rows]  # fmt: skip
    row = rows[0] - 1
    assert f"it is {row * row}." in out
    assert " of 96 (" in fact(out, "pack")


def facts(out: str) -> list[str]:
    """All lines about the step."""
    return [line for line in out.splitlines() if line.startswith(("step ", "pack ", "source "))]


def test_the_run_s_options_do_for_its_state(run, show, capsys):
    prefix, steps, _, model = run
    known = ["show", prefix, "--model", model, "--step", 5]
    told = ["--max-tokens", 96, "--packs-per-step", 3, "--seed", 2, "--packing", "streaming"]
    assert cli.main(list(map(str, [*known, *told, "--window", 5]))) == 0
    assert facts(capsys.readouterr().out) == facts(show("--step", 5)[1])
    assert cli.main(list(map(str, [*known, *told, "--window", 6]))) == 0
    assert facts(capsys.readouterr().out) != facts(show("--step", 5)[1])
    assert cli.main(list(map(str, known))) == 2
    assert "--step needs the run: its --state, or else its" in capsys.readouterr().err


def test_options_that_were_not_said_are_those_of_a_stream(run, capsys):
    prefix, _, _, model = run
    known = ["show", prefix, "--model", model, "--max-tokens", 64, "--packs-per-step", 2]
    sizes, told = {"max_tokens": 64, "packs_per_step": 2}, set()
    for said, order in (
        ([], OrderOptions(**sizes)),
        (["--balance", "none"], OrderOptions(**sizes, balance="none")),
        (["--cost-a", 1], OrderOptions(**sizes, cost_a=1)),
    ):
        stream = PackStream([Store(prefix)], order, StreamOptions(workers=0))
        assert cli.main(list(map(str, [*known, "--step", 5, *said]))) == 0
        out = capsys.readouterr().out
        told.add(tuple(facts(out)))
        for number, pack in enumerate(stream.step(4).packs, 1):
            name = f"pack {number} (shown)" if number == 1 else f"pack {number}"
            assert fact(out, name).endswith("rows " + " ".join(map(str, sorted(pack + 1))))
    assert len(told) == 3


def test_a_step_of_several_sets_names_them(run, capsys, tmp_path):
    prefix, _, _, model = run
    more = tmp_path / "more"
    made(more, model, jsonl(tmp_path / "more.jsonl", chats(9)))
    order = OrderOptions(max_tokens=96, packs_per_step=3, weights=(1, 1), seed=3)
    stream = PackStream([Store(prefix), Store(more)], order, StreamOptions(workers=0))
    steps = list(islice(stream, 4))
    save_state(tmp_path / "state.json", stream.state_dict())
    command = ["show", prefix, "--source", more, "--model", model, "--step", 2]
    assert cli.main(list(map(str, [*command, "--state", tmp_path / "state.json"]))) == 0
    out = capsys.readouterr().out
    assert fact(out, "source 1") == str(prefix) and fact(out, "source 2") == str(more)
    for number, pack in enumerate(steps[1].packs, 1):
        rows = [stream.sources.origin(i) for i in sorted(pack.tolist())]
        name = f"pack {number} (shown)" if number == 1 else f"pack {number}"
        want = " ".join(f"{source + 1}:{row + 1}" for source, row in rows)
        assert fact(out, name).endswith(f"rows {want}")
    first = [stream.sources.origin(i) for i in steps[1].packs[0].tolist()]
    told = [line.split("(")[1] for line in out.splitlines() if "(source" in line]
    assert told == [f"source {source + 1}, row {row + 1})" for source, row in first]
    assert cli.main(list(map(str, ["show", prefix, *command[4:], "--state",
                                   tmp_path / "state.json"]))) == 2  # fmt: skip
    assert "weights must be one for each source: 1, got 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words, message",
    [
        (["--step", 2, "--step-pack", 4], "step 2 has 3 packs, no pack 4"),
        (["--step", 2, "--row", 3], "--step shows a pack of a run, without --row and --pack"),
        (["--step", 2, "--pack"], "--step shows a pack of a run, without --row and --pack"),
        (["--step", 2, "--max-tokens", 9], "and with --state without --max-tokens"),
        (["--step", 2, "--max-tokens", 9, "--packs-per-step", 3], "--step needs the run: its --s"),
        (["--step", 2, "--seed", 3], "need both --max-tokens and --packs-per-step, or --state"),
        (["--step", 2, "--prompt-weight", 1], "a prepared set, in which it is said what is"),
        (["--step", 2, "--mask-token-id", 1], "a prepared set, in which it is said what is"),
        ([], "there is a run, but no --step of it"),
    ],
)
def test_what_does_not_go_together_is_refused(show, words, message):
    code, out, err = show(*words)
    assert (code, out) == (2, "")
    assert message in err


def test_a_pack_of_no_step_is_refused(run, capsys):
    prefix, _, _, model = run
    assert cli.main(["show", str(prefix), "--model", str(model), "--step-pack", "2"]) == 2
    assert "--step-pack says which pack of --step" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fingerprint": "other"}, "is of another run: fingerprint was 'other', is "),
        ({"options": {}}, "options of another kind: .*max_tokens"),
        ({"options": {"max_tokens": 96, "new": 1}}, "options of another kind: .*new"),
        ({"options": {"max_tokens": "96"}}, "options of another kind: "),
        ({"options": {"max_tokens": 96, "method": "best"}}, "method must be one of .*'best'"),
        ({"version": 9}, "must be of version 1, is of 9"),
        (None, "stream.json: cannot be read"),
    ],
)
def test_a_state_that_is_of_something_else_is_refused(run, show, tmp_path, change, message):
    file = tmp_path / "stream.json"
    text = run[2].read_text()
    file.write_text("{" if change is None else json.dumps(json.loads(text) | change))
    code, out, err = show("--step", 2, state=file)
    assert (code, out) == (2, "")
    assert re.search(message, err)
