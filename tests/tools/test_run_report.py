"""The page of a run, read back: by a parser, and in a browser where there is one."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from tests.tools.run_logs import START, page, step, validation, whole
from tests.tools.test_report import HOSTILE, Page, pixels
from varlen_sft import cli
from varlen_sft.tools.page import Series, line_chart
from varlen_sft.tools.run_charts import MOST, ends
from varlen_sft.tools.run_report import write_run_report
from varlen_sft.tools.run_samples import short_source


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    return page(tmp_path_factory.mktemp("a run"), *whole())


@pytest.fixture(scope="module")
def long(tmp_path_factory) -> Path:
    """1,000 steps, one of which is a spike."""
    steps = [step(number, loss=50.0 if number == 777 else 1.0) for number in range(1, 1001)]
    return page(tmp_path_factory.mktemp("a long run"), START, *steps, validation(500, 2.0))


def curve(page: Page, field: str) -> list[tuple[int, float]]:
    found = page.where("circle", field=field)
    return [(int(a["data-x"]), float(a["data-value"])) for a, _ in found]


# -- numbers


def test_every_curve_has_every_step(report):
    found, numbers = read(report), range(1, 31)
    assert [text for _, text in found.where("h1")] == ["varlen_sft: a <b> model, 30 of 30 steps"]
    assert curve(found, "loss") == [(n, 2.0 / n + 0.125) for n in numbers]
    assert curve(found, "validation_loss") == [
        (5 * at, 3.0 - 0.25 * at if at < 6 else 9.0) for at in range(1, 7)
    ]
    assert curve(found, "loss_assistant") == [(n, 1.5) for n in numbers]
    assert curve(found, "loss_tool") == [(n, 0.5) for n in numbers if n % 2]
    assert curve(found, "stop_loss") == [(n, 0.25) for n in numbers]
    assert curve(found, "lr") == [(n, 1e-5 * n) for n in numbers]
    assert curve(found, "grad_norm") == [(n, 1.0 + n) for n in numbers]
    assert curve(found, "real_tokens_per_s") == [(n, (500 + n) / 0.5) for n in numbers]
    assert curve(found, "supervised_tokens_per_s") == [(n, 200.0) for n in numbers]
    assert curve(found, "fill") == [(n, 87.5) for n in numbers]
    assert curve(found, "stall") == [(n, 25.0) for n in numbers]
    assert curve(found, "tflops") == [(n, 1.5) for n in numbers]
    assert curve(found, "peak_memory") == [(n, 3.0) for n in numbers]
    assert not curve(found, "mfu") and "utilisation" not in report.read_text()


def test_the_figures_of_the_whole_run(report):
    found = read(report)
    tokens = sum(500 + n for n in range(1, 31))
    expected = {
        "first_loss": 2.125, "last_loss": 2.0 / 30 + 0.125, "last_validation": 9.0,
        "best_validation": 1.75, "tokens": tokens, "speed": tokens / 15.0, "seconds": 15.0,
        "stall": 0.25, "exact": 1,
    }  # fmt: skip
    exact = {"exact": found.values("exact")[0]}
    tiles = {a["data-field"]: float(a["data-value"]) for a, _ in found.where("span")}
    assert tiles | exact == expected
    text = "".join(t for _, t in found.where("div") if "best, after step 25" in t)
    assert f"real tokens, {3000 / tokens:.1%} of them supervised" in text and "0:00:15" in text


def test_two_series_share_the_axis_of_steps(report):
    """The point of step 30 lies over that of step 30, though the lines have not as many points."""
    circles = [a for a, _ in read(report).where("circle") if a["data-x"] == "30"]
    loss, held_out = (
        next(a for a in circles if a["data-field"] == field)
        for field in ("loss", "validation_loss")
    )
    assert loss["cx"] == held_out["cx"] and float(held_out["cy"]) < float(loss["cy"])
    lines = [Series("a", "a", [1, 2]), Series("b", "b", [1, 2], x=[1, 11])]
    drawn = Page(line_chart("c", [1, 6], lines, x_label="step")).where("circle")
    left, middle, _, right = (float(a["cx"]) for a, _ in drawn)
    assert middle - left == right - middle > 0


def test_a_long_run_keeps_its_spikes(long):
    found = read(long)
    drawn, means = curve(found, "loss"), curve(found, "loss_mean")
    assert (777, 50.0) in drawn and len(drawn) <= 2 * MOST and len(means) <= MOST
    assert math.isclose(max(value for _, value in means), (50 + 8) / 9)
    assert curve(found, "validation_loss") == [(500, 2.0)]
    assert long.stat().st_size < 1_000_000


def test_of_neighbours_the_lowest_and_the_highest_stay():
    bad = (5, math.nan)  # the same object: NaN is not equal to itself
    pairs = [(1, 3.0), (2, 1.0), (3, 2.0), (4, 5.0), bad, (6, 4.0), (7, 7.0)]
    assert ends(pairs, 3) == [(1, 3.0), (2, 1.0), bad, (6, 4.0), (7, 7.0)]
    assert ends([(1, 2.0), (2, 2.0), (3, 2.0)], 3) == [(1, 2.0), (3, 2.0)]


# -- data, samples, settings


def test_what_the_data_came_to_and_what_was_left_out(report):
    found = read(report)
    rows = [text for a, text in found.where("tr")][1:]
    assert rows == [
        "chats.jsonldata2,0001,990100,00025,000 (25.0%)7 cannot be used, 3 too long, dropped",
        "search:held.jsonlvalidation9400100 (25.0%)nothing",
    ]
    assert found.values("supervised") == [25000.0, 100.0]


def test_answers_the_newest_first_and_the_oldest_beside_them(report):
    found = read(report)
    said = [(int(a["data-step"]), text) for a, text in found.where("dd", said="said")]
    assert said[:6] == [
        (30, "it is.<|im_end|>"), (25, "e"), (20, "d"), (5, "a"), (15, HOSTILE), (10, "b"),
    ]  # fmt: skip
    assert said[6:] == [(n, "no") for n in (30, 25, 20, 5, 15, 10)]
    looks = [a.get("class") for a, _ in found.where("dd", said="said")]
    assert looks == ["good"] + 11 * [None]
    assert [t for _, t in found.where("h3")] == [f"what is {n}? {HOSTILE}" for n in (1, 2)]
    assert [t for _, t in found.where(said="prompt")] == ["all of 1", "all of 2"]
    assert [t for _, t in found.where(said="answer")] == ["it is.<|im_end|>"] * 2
    text = "After step 30 1 of 2 answers is the held-out one"
    assert any(text in t for _, t in found.where("p"))


def test_settings_without_places_on_a_disk(report):
    found = read(report)
    assert {a["data-key"]: t for a, t in found.where("dd") if "data-key" in a} == {
        "model.dtype": "bf16", "optim.betas": "0.9, 0.95", "optim.lr": "0.0001",
    }  # fmt: skip
    text = report.read_text(encoding="utf-8")
    assert "/somewhere" not in text and "2030-01-02 03:04 UTC \u00b7 CPU \u00b7 2 ranks" in text
    sources = ["pretrain:/a/b.txt", "hub:owner/name@train", "search:hub:owner/name", "a.jsonl"]
    assert [short_source(source) for source in sources] == ["pretrain:b.txt", *sources[1:]]


def test_what_happened_is_told_before_the_numbers(tmp_path):
    made = page(
        tmp_path, START, step(1), step(2), START, {"event": "resume", "step": 1},
        step(2, updated=False, loss=0.0), {**START, "config": {**START["config"], "stages": [
            {"name": "cool", "start_training_step": 3}]}}, {"event": "resume", "step": 2},
    )  # fmt: skip
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"event": "st\n')
    found = read(write_run_report(tmp_path))
    assert found.values("went_on") == [2] and found.values("skipped") == [1]
    assert found.values("unreadable") == [1]
    assert any("went on after step 1 and 2" in text for _, text in found.where("p"))
    assert "cool" in [text for _, text in found.where("dt")]
    assert made == tmp_path / "report.html"


@pytest.mark.parametrize(
    "start", [START, {"event": "start", "config": {}, "ranks": 1, "steps": 3}, {"event": "start"}]
)
def test_a_run_that_has_only_begun_and_an_older_log_have_a_page(tmp_path, start):
    found = read(page(tmp_path, start))
    assert "No step is logged yet." in [text for _, text in found.where("p")]
    assert not found.where("circle")
    bare = {k: v for k, v in step(1).items() if k not in ("stall_s", "role_loss", "stop_loss",
            "tflops", "mfu", "peak_memory", "updated")}  # fmt: skip
    found = read(page(tmp_path, start, bare))
    fields = {a["data-field"] for a, _ in found.where("circle")}
    assert fields == {"loss", "lr", "grad_norm", "real_tokens_per_s", "supervised_tokens_per_s",
                      "fill"}  # fmt: skip


# -- the command


def test_the_command_writes_it_anew(tmp_path, capsys):
    path = page(tmp_path, *whole())
    before = path.read_bytes()
    path.unlink()
    assert cli.main(["report", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"written: {path}\n" and path.read_bytes() == before
    assert cli.main(["report", str(tmp_path / "nothing")]) == 2
    assert "log.jsonl: cannot be read: No such file" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()].count("report.html") == len(
        list(tmp_path.iterdir())
    ) - 1


# -- alone, and in a browser


def test_the_page_is_alone_and_text_is_text(report):
    text = report.read_text(encoding="utf-8")
    found = read(report)
    names = {name for name, _, _ in found.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes, _ in found.elements:
        assert not {"src", "href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert "https://" not in text and "url(" not in text and "@import" not in text


def test_it_is_drawn(report, browser, tmp_path):
    image = tmp_path / "page.png"
    browser(report.as_uri(), "--window-size=390,900", f"--screenshot={image}")
    width, height, lines = pixels(image)
    size = len(lines[0]) // width
    assert len({line[k : k + size] for line in lines for k in range(0, len(line), size)}) > 30
    assert all(any(line != lines[0] for line in lines[k : k + 225]) for k in range(0, height, 225))


@pytest.mark.parametrize("width", [390, 1400])
def test_it_never_scrolls_sideways(report, width, browser, tmp_path):
    """A frame of the wanted width holds the page; the page around it reads the frame's."""
    shutil.copy(report, tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(
        f"<iframe src='page.html' width='{width}' height='800' style='border:0'></iframe><p></p>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const e = d.documentElement; document.querySelector('p').textContent = JSON.stringify("
        "[e.clientWidth, e.scrollWidth, d.querySelectorAll('circle').length]); }</script>"
    )
    dom = browser(
        (tmp_path / "frame.html").as_uri(), "--allow-file-access-from-files", "--dump-dom"
    )
    inner, scroll, circles = json.loads(re.search(r"<p>(.*?)</p>", dom)[1])
    assert inner > width - 20 and scroll == inner and circles > 300


def test_it_prints(report, browser, tmp_path):
    browser(report.as_uri(), f"--print-to-pdf={tmp_path / 'page.pdf'}")
    data = (tmp_path / "page.pdf").read_bytes()
    assert data.startswith(b"%PDF") and 1 <= len(re.findall(rb"/Type\s*/Page\b", data)) <= 6
