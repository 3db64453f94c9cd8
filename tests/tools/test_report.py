from __future__ import annotations

import json
import math
import re
import shutil
import struct
import zlib
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.data.test_chat import CHATML, TOKENS, talk, train_tokenizer
from varlen_sft.data.batch import collate
from varlen_sft.data.chat import ChatTokenizer
from varlen_sft.data.sample import ROLES
from varlen_sft.data.template import ChatTemplate
from varlen_sft.tools.check_page import write_check_page
from varlen_sft.tools.pack_picture import visible
from varlen_sft.tools.page import Series, line_chart, tag
from varlen_sft.tools.report import picture_pack, write_report

HOSTILE = "<script>alert(1)</script>\"'&amp;<img src=http://x.test onerror=alert(2)>"
PROMPTS = [talk("hello", "it is."), talk("what?", "a\nb", HOSTILE, HOSTILE, system="be brief")]
ENVIRONMENT = {
    "versions": {"python": "3.11", "torch": "2.11"},
    "cpu": "a <processor>",
    "date": "2030-01-02 03:04 UTC",
}


class Page(HTMLParser):
    """Every element as (name, attributes, text of it and all inside)."""

    VOID = {"meta", "input"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(html)
        self.close()
        assert not self.open, "an element was not closed"

    def handle_starttag(self, tag, attrs):
        element = (tag, dict(attrs), [])
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        for element in self.open:
            element[2].append(data)

    def where(self, *names: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        """(attributes, text) of elements of these names whose data-* attributes are as wanted."""
        return [
            (attributes, "".join(text))
            for name, attributes, text in self.elements
            if (not names or name in names)
            and all(attributes.get(f"data-{key}") == value for key, value in wanted.items())
        ]

    def values(self, field: str, **wanted: str) -> list[float]:
        return [float(a["data-value"]) for a, _ in self.where(field=field, **wanted)]


def tokens(page: Page) -> list[tuple[dict[str, str | None], str]]:
    return [(a, text) for a, text in page.where("span") if "data-id" in a]


@pytest.fixture(scope="module")
def tiny() -> ChatTokenizer:
    return ChatTokenizer(train_tokenizer().to_str(), ChatTemplate(CHATML, TOKENS))


@pytest.fixture(scope="module")
def pack(tiny):
    """Three conversations and a pad tail; (batch, picture, texts of the conversations)."""
    conversations = [
        talk("hello", "it is.\n\n", system="hello world"),
        talk("\u00e9 \U0001f999\u202e\u00a0", HOSTILE, "what is it?\t", "\U0001f916"),
        talk("user", "assistant"),
    ]
    samples = tiny.encode_many(conversations)
    batch = collate(samples, pad_to=sum(len(s) - 1 for s in samples) + 20)
    return samples, batch, picture_pack(samples, batch, tiny)


def row(name: str, label: str, **values: object) -> dict[str, object]:
    return {"candidate": name, "label": label, **values}


@pytest.fixture(scope="module")
def summary() -> dict:
    steps = [
        {"step": k, "loss": 2.0 / k + 0.125, "real_tokens": 500 + k, "supervised_tokens": 200,
         "step_time_s": 0.5 + 0.01 * k}
        for k in range(1, 24)
    ]  # fmt: skip
    padded = row("hf padded", "HF, padded", loss=1.5, tokens_computed=6378, seconds_median=2.5,
                 seconds_min=2.25, seconds_max=4.5, real_tokens_per_second=1508.75,
                 peak_bytes=3 * 2**30)  # fmt: skip
    ours = row("ours", "varlen_sft, packed", loss=1.5000001, tokens_computed=3750,
               seconds_median=1.25, seconds_min=1.125, seconds_max=1.375,
               real_tokens_per_second=3017.5, peak_bytes=2**30)  # fmt: skip
    return {
        "options": {"model": "/somewhere/a <b> model", "out": "/somewhere/out", "data": "None",
                    "dtype": "fp32", "max_tokens": "512"},
        "environment": ENVIRONMENT,
        "steps": steps,
        "comparison": {"rows": [padded, ours], "disturbed": ["hf padded"], "conversations": 22,
                       "real_tokens": 3772, "rounds": 3, "loss_difference": 1e-7,
                       "loss_bound": 3e-5},
        "before": {"validation_loss": 2.34567, "answers": [HOSTILE, "two\nlines"]},
        "after": {"validation_loss": 1.23456, "answers": ["it is.", "after <b>"]},
    }  # fmt: skip


@pytest.fixture(scope="module")
def report(summary, pack, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a report") / "report.html"
    write_report(path, summary, pack[2], PROMPTS)
    return path


@pytest.fixture(scope="module")
def result() -> dict:
    return {
        "model": "/somewhere/<i>model",
        "dtype": "fp32",
        "environment": ENVIRONMENT,
        "conversations": 3,
        "tokens": 1200,
        "findings": [
            {"property": "logits", "worst": 2.5e-7, "bound": 1e-5, "verdict": "pass",
             "detail": HOSTILE},
            {"property": "gradients", "worst": 3e-4, "bound": 1e-5, "verdict": "fail",
             "detail": "layers.3"},
            {"property": "across edges", "worst": 0.0, "bound": 0.0, "verdict": "pass",
             "detail": ""},
            {"property": "straddles", "worst": None, "bound": None, "verdict": "note",
             "detail": "none"},
        ],
        "routes": [
            {"name": "alone", "figures": {"loss": {"error": 1e-7, "bound": None}},
             "norms": {"MLP": 2.0}},
            {"name": HOSTILE, "figures": {"loss": {"error": 3e-7, "bound": 2e-7},
             "leakage": {"error": 0.0, "bound": 0.0}}, "norms": {"MLP": 2.5}},
        ],
        "layers": [
            {"name": f"layers.{k}", "ours": 1e-8 * 2**k * (k > 0), "hf": 3e-8 * 2**k,
             "bound": 6.1e-8 * 2**k}
            for k in range(12)
        ],
        "positions": [
            {"conversation": 0, "errors": [0.0, 1e-9, 5e-8, 1e-6], "bound": 1e-6},
            {"conversation": 1, "errors": [1e-8 * (k % 7 + 1) for k in range(700)], "bound": 1e-6},
            {"conversation": 2, "errors": [1e-7, 2e-6, math.nan, 1e-7, 3e-7], "bound": 1e-6},
        ],
    }  # fmt: skip


@pytest.fixture(scope="module")
def check(result, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("a check") / "check.html"
    write_check_page(path, result)
    return path


# -- the report, read back


def test_every_measured_number_is_on_the_page(report, summary):
    page = Page(report.read_text(encoding="utf-8"))
    steps = summary["steps"]
    title = "varlen_sft: a <b> model fine-tuned without padding"
    assert [text for _, text in page.where("h1")] == [title]
    assert page.values("loss", x="1") == [2.125]
    curve = [(int(a["data-x"]), float(a["data-value"])) for a, _ in page.where("circle")]
    assert curve[: len(steps)] == [(s["step"], s["loss"]) for s in steps]
    assert page.values("supervised_tokens_per_s") == [200 / s["step_time_s"] for s in steps]
    assert page.values("validation_before") == [2.34567]
    assert page.values("validation_after") == [1.23456]
    assert page.values("speed") == [
        sum(s["real_tokens"] for s in steps) / sum(s["step_time_s"] for s in steps)
    ]
    assert page.values("loss_difference") == [1e-7] and page.values("loss_bound") == [3e-5]


def test_padded_against_packed(report, summary):
    page = Page(report.read_text(encoding="utf-8"))
    columns = summary["comparison"]["rows"]
    fields = ["loss", "tokens_computed", "seconds_median", "real_tokens_per_second", "peak_bytes"]
    for field in fields:
        for column in columns:
            assert page.values(field, candidate=column["candidate"]) == [column[field]]
    texts = {a["data-field"]: t for a, t in page.where("td", candidate="ours")}
    assert list(texts) == fields
    assert texts["loss"] == "1.500000"
    assert texts["seconds_median"] == "1.250 s[1.125 \u2013 1.375]0.50\u00d7 of padded"
    assert texts["real_tokens_per_second"] == "3,017.52.00\u00d7 of padded"
    assert texts["peak_bytes"] == "1,024 MiB0.33\u00d7 of padded"
    [(warning, text)] = page.where("p", field="disturbed")
    assert warning["data-value"] == "hf padded" and "quote no ratio" in text


def test_no_warning_where_nothing_was_disturbed(summary, pack, tmp_path):
    calm = summary | {"comparison": summary["comparison"] | {"disturbed": []}}
    write_report(tmp_path / "a.html", calm, pack[2], PROMPTS)
    assert not Page((tmp_path / "a.html").read_text(encoding="utf-8")).where(field="disturbed")


def test_answers_before_and_after(report, summary):
    page = Page(report.read_text(encoding="utf-8"))
    said = {
        key: [t for _, t in page.where("dd", said=key)]
        for key in ("earlier", "asked", "before", "after", "held-out answer")
    }
    assert said == {
        "earlier": ["3 messagessystem: be brief\nuser: what?\nassistant: a\nb"],
        "asked": ["hello", HOSTILE],
        "before": summary["before"]["answers"],
        "after": summary["after"]["answers"],
        "held-out answer": ["it is.", HOSTILE],
    }


def test_prompts_without_answers_are_refused(summary, pack, tmp_path):
    with pytest.raises(ValueError, match="shorter"):
        write_report(tmp_path / "a.html", summary, pack[2], [*PROMPTS, PROMPTS[0]])


# -- the pack, read back


def test_every_token_of_the_pack_is_drawn_as_the_batch_has_it(report, pack, tiny):
    samples, batch, _ = pack
    drawn = tokens(Page(report.read_text(encoding="utf-8")))
    assert [int(a["data-id"]) for a, _ in drawn] == batch.input_ids.tolist()
    assert [int(a["data-pos"]) for a, _ in drawn] == batch.position_ids.tolist()
    assert [int(a["data-label"]) for a, _ in drawn] == batch.labels.tolist()
    assert [float(a["data-weight"]) for a, _ in drawn] == batch.token_weights.tolist()
    roles = [ROLES[role] for sample in samples for role in sample.roles[:-1]]
    assert [a["data-role"] for a, _ in drawn] == roles + ["none"] * batch.pad_tokens
    assert all(a["data-role"] in a["class"].split() for a, _ in drawn)
    for (attributes, text), token in zip(drawn, batch.input_ids.tolist(), strict=True):
        shown = visible(tiny.decode([token]))
        label = int(attributes["data-label"])
        target = "" if label < 0 else "\u2192" + visible(tiny.decode([label]))
        assert text == f"{shown}{attributes['data-pos']}{target}"


def test_targets_are_marked_and_no_other_token(report, pack):
    _, batch, _ = pack
    drawn = tokens(Page(report.read_text(encoding="utf-8")))
    marked = ["s" in a["class"].split() for a, _ in drawn]
    assert marked == (batch.labels >= 0).tolist() and any(marked)
    assert ["no target" in a["title"] for a, _ in drawn] == (batch.labels < 0).tolist()


def test_hover_tells_id_role_position_target_and_weight(report, pack, tiny):
    _, batch, _ = pack
    drawn = tokens(Page(report.read_text(encoding="utf-8")))
    at = int((batch.labels >= 0).nonzero()[0])
    token, label = int(batch.input_ids[at]), int(batch.labels[at])
    position = int(batch.position_ids[at])
    assert tiny.decode([token]) == "\n"
    assert drawn[at][0]["title"] == (
        f"\u21b5 (id {token}), none\nposition {position}, row {at}\n"
        f"target: {visible(tiny.decode([label]))} (id {label})\nweight 1"
    )


def test_sequence_edges_are_those_of_cu_seqlens(report, pack):
    _, batch, _ = pack
    page = Page(report.read_text(encoding="utf-8"))
    blocks = [a for a, _ in page.where("div") if a.get("class") == "sequence"]
    lengths = batch.cu_seqlens.diff().tolist()
    assert [int(a["data-tokens"]) for a in blocks] == lengths and len(lengths) > 3
    parts = batch.labels.split(lengths)
    assert [int(a["data-targets"]) for a in blocks] == [int((p >= 0).sum()) for p in parts]
    heads = [text for _, text in page.where("h3")]
    assert heads[0] == f"sequence 1, {lengths[0]} tokens, {int((parts[0] >= 0).sum())} targets"
    assert heads[3] == f"sequence 4, {lengths[3]} tokens, padding"


def test_samples_of_another_batch_are_refused(pack, tiny):
    samples, batch, _ = pack
    with pytest.raises(ValueError, match="samples must be those of the batch"):
        picture_pack(samples[::-1], batch, tiny)


def test_what_cannot_be_seen_is_written_out(tiny):
    assert visible(" a\n\r\t") == "\u00b7a\u21b5\u240d\u21e5"
    assert visible("\u202e\u00a0\x00\u200b") == "\\u202e\\u00a0\\u0000\\u200b"
    assert visible("\u00e9\U0001f999\ufffd") == "\u00e9\U0001f999\ufffd"


def test_a_part_of_a_character_is_the_replacement_character(pack):
    _, _, picture = pack
    assert "\ufffd" in picture.texts


# -- the page of the check, read back


def test_findings_and_verdict(check, result):
    page = Page(check.read_text(encoding="utf-8"))
    assert [text for _, text in page.where("h1")] == ["varlen_sft check: <i>model, fp32"]
    [(verdict, text)] = page.where("p", field="verdict")
    assert (verdict["data-value"], text) == ("fail", "\u2717 1 of 3 properties do not hold")
    for finding in result["findings"]:
        name = finding["property"]
        [(cell, _)] = [(a, t) for a, t in page.where("td", property=name) if "data-verdict" in a]
        assert cell["data-verdict"] == finding["verdict"]
        for field in ("worst", "bound"):
            [(cell, _)] = page.where("td", property=name, field=field)
            value = cell.get("data-value")
            assert (None if value is None else float(value)) == finding[field]


@pytest.mark.parametrize(
    ("verdicts", "value", "text"),
    [(["pass", "note"], "pass", "All 1 properties hold"), (["note"], "note", "was judged")],
)
def test_verdict_without_failures(result, tmp_path, verdicts, value, text):
    findings = [result["findings"][3] | {"verdict": verdict} for verdict in verdicts]
    write_check_page(tmp_path / "a.html", result | {"findings": findings})
    [(found, words)] = Page((tmp_path / "a.html").read_text()).where("p", field="verdict")
    assert found["data-value"] == value and text in words


def test_errors_of_every_way_to_compute(check):
    page = Page(check.read_text(encoding="utf-8"))
    cells = [
        (a["data-route"], a["data-figure"], float(a["data-value"]), a.get("class"), a.get("title"))
        for a, _ in page.where("td")
        if "data-route" in a
    ]
    assert cells == [
        ("alone", "loss", 1e-7, None, None),
        (HOSTILE, "loss", 3e-7, "bad", "bound 2.00e-07"),
        (HOSTILE, "leakage", 0.0, None, "bound 0.00e+00"),
    ]
    assert "2.5" in [text for _, text in page.where("td")]


def test_errors_of_every_layer(check, result):
    page = Page(check.read_text(encoding="utf-8"))
    for key in ("ours", "hf", "bound"):
        assert page.values(f"layer_{key}") == [layer[key] for layer in result["layers"]]
    titles = [text for _, text in page.where("title")]
    assert "layers.11: ours 2.048e-05" in titles


def test_errors_of_every_position(check, result):
    page = Page(check.read_text(encoding="utf-8"))
    cells = [(int(a["data-pos"]), float(a["data-value"]), a) for a, _ in page.where("rect")
             if "data-pos" in a]  # fmt: skip
    errors = [e for row in result["positions"] for e in row["errors"]]
    drawn = [value for _, value, _ in cells]
    # 700 positions in at most 256 cells: three to a cell, and the worst of the three is shown.
    assert [p for p, _, _ in cells] == [0, 3, *range(0, 700, 3), 0, 3]
    assert drawn[:2] == [max(errors[:3]), errors[3]]
    assert drawn[2:236] == [max(errors[4:704][k : k + 3]) for k in range(0, 700, 3)]
    assert math.isnan(drawn[236]) and drawn[237] == 3e-7
    assert [a["class"] for _, _, a in cells if a["class"] in ("over", "wrong")] == ["wrong"]
    shares = [float(a["data-share"]) for a, _ in page.where("svg") if "data-share" in a]
    assert shares[:2] == [1.0, pytest.approx(0.07)] and math.isnan(shares[2])


@pytest.mark.parametrize(
    ("share", "shade"),
    [(0.0, "zero"), (1e-9, "c0"), (0.09, "c5"), (0.3, "c6"), (1.0, "c7"), (1.01, "over")],
)
def test_colour_of_an_error(result, tmp_path, share, shade):
    rows = [{"conversation": 0, "errors": [share * 1e-3], "bound": 1e-3}]
    write_check_page(tmp_path / "a.html", result | {"positions": rows, "layers": []})
    page = Page((tmp_path / "a.html").read_text())
    assert [a["class"] for a, _ in page.where("rect", pos="0")] == [shade]


def test_a_bound_of_zero_is_kept_by_zero_alone(result, tmp_path):
    rows = [{"conversation": 0, "errors": [0.0, 1e-30], "bound": 0.0}]
    write_check_page(tmp_path / "a.html", result | {"positions": rows})
    cells = [a for a, _ in Page((tmp_path / "a.html").read_text()).where("rect") if "data-pos" in a]
    assert [a["class"] for a in cells] == ["zero", "over"]


# -- charts


def places(svg: str, field: str) -> list[tuple[float, float]]:
    circles = [a for a, _ in Page(svg).where("circle", field=field)]
    return [(float(a["cx"]), float(a["cy"])) for a in circles]


def test_points_lie_where_the_ticks_say():
    svg = line_chart("c", [1, 2, 3], [Series("s", "f", [0.0, 5.0, 10.0])], x_label="step")
    (x1, y1), (x2, y2), (x3, y3) = places(svg, "f")
    assert x2 - x1 == x3 - x2 > 0 and y1 - y2 == y2 - y3 > 0
    labels = {t: a for a, t in Page(svg).where("text") if a.get("text-anchor") == "end"}
    assert [*labels] == ["0", "2", "4", "6", "8", "10"]
    assert float(labels["0"]["y"]) == y1 + 4 and float(labels["10"]["y"]) == y3 + 4


def test_decades_lie_apart_alike_and_zero_has_a_tick_of_its_own():
    line = Series("s", "f", [0.0, 1e-6, 1e-5, 1e-4, math.nan])
    svg = line_chart("c", range(5), [line], x_label="layer", log=True)
    heights = [y for _, y in places(svg, "f")]
    steps = [a - b for a, b in zip(heights, heights[1:], strict=False)]
    assert steps[:3] == pytest.approx([steps[0]] * 3, abs=0.2) and steps[0] > 0
    assert heights[4] == min(heights)
    labels = [t for a, t in Page(svg).where("text") if a.get("text-anchor") == "end"]
    assert labels == ["0", "1e-6", "1e-5", "1e-4"]
    assert [a["class"] for a, _ in Page(svg).where("circle")][3:] == ["a", "wrong"]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0]])
@pytest.mark.parametrize("log", [False, True])
def test_a_line_without_extent_can_be_drawn(values, log):
    line = Series("s", "f", values)
    for x, y in places(line_chart("c", range(len(values)), [line], x_label="x", log=log), "f"):
        assert 0 <= x <= 480 and 0 <= y <= 280


# -- nothing foreign gets in, and nothing is loaded


@pytest.mark.parametrize("name", ["report", "check"])
def test_the_page_is_alone_and_text_is_text(name, request):
    text = request.getfixturevalue(name).read_text(encoding="utf-8")
    page = Page(text)
    names = {name for name, _, _ in page.elements}
    assert not names & {"script", "link", "img", "iframe", "object", "base"}
    for _, attributes, _ in page.elements:
        assert not {"src", "href"} & set(attributes)
        assert not any(key.startswith("on") for key in attributes)
    assert "https://" not in text and "url(" not in text and "@import" not in text
    assert "http://x.test" in text and "<img" not in text  # as text, from the hostile message
    [policy] = [a["content"] for a, _ in page.where("meta") if "http-equiv" in a]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    assert "/somewhere" not in text


def test_tags_escape_all_but_markup():
    made = tag("b", "<&>", tag("i", '"'), class_='"<', data_x=1.5, title=None)
    assert made == '<b class="&quot;&lt;" data-x="1.5">&lt;&amp;&gt;<i>&quot;</i></b>'


# -- in a browser


def pixels(path: Path) -> tuple[int, int, list[bytes]]:
    """(width, height, one bytes object per line) of an 8 bit RGB or RGBA PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, packed = 8, b""
    while at < len(data):
        (size,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        if kind == b"IHDR":
            width, height, depth, colour = struct.unpack(">IIBB", data[at + 8 : at + 18])
        if kind == b"IDAT":
            packed += data[at + 8 : at + 8 + size]
        at += 12 + size
    assert depth == 8 and colour in (2, 6)
    step = {2: 3, 6: 4}[colour]
    return width, height, _unfilter(zlib.decompress(packed), width * step, step)


def _unfilter(raw: bytes, size: int, step: int) -> list[bytes]:
    lines, above = [], bytes(size)
    for start in range(0, len(raw), size + 1):
        kind, line = raw[start], bytearray(raw[start + 1 : start + 1 + size])
        for k in range(size if kind else 0):
            left, up, corner = (
                (line[k - step], above[k], above[k - step]) if k >= step else (0, above[k], 0)
            )
            guess = left + up - corner
            near = min((left, up, corner), key=lambda v, g=guess: abs(g - v))
            line[k] = (line[k] + (0, left, up, (left + up) // 2, near)[kind]) & 255
        above = bytes(line)
        lines.append(above)
    return lines


@pytest.mark.parametrize(("width", "height"), [(1400, 900), (390, 844)])
@pytest.mark.parametrize("name", ["report", "check"])
def test_it_is_drawn(name, width, height, request, browser, tmp_path):
    path, image = request.getfixturevalue(name), tmp_path / "page.png"
    browser(path.as_uri(), f"--window-size={width},{height}", f"--screenshot={image}")
    found_width, found_height, lines = pixels(image)
    assert (found_width, found_height) == (width, height)
    step = len(lines[0]) // width
    colours = {line[k : k + step] for line in lines for k in range(0, len(line), step)}
    assert len(colours) > 30
    background = lines[0][:step]
    quarters = [lines[k * height // 4 : (k + 1) * height // 4] for k in range(4)]
    for quarter in quarters:
        assert any(line != background * width for line in quarter)


def test_the_browser_reads_back_what_was_measured(report, summary, pack, browser):
    page = Page(browser(report.as_uri(), "--dump-dom"))
    _, batch, _ = pack
    assert page.values("peak_bytes") == [3 * 2**30, 2**30]
    losses = [float(a["data-value"]) for a, _ in page.where("circle", field="loss")]
    assert losses == [step["loss"] for step in summary["steps"]]
    drawn = tokens(page)
    assert [int(a["data-id"]) for a, _ in drawn] == batch.input_ids.tolist()
    assert [int(a["data-label"]) for a, _ in drawn] == batch.labels.tolist()
    assert not page.where("script")


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("name", ["report", "check"])
def test_the_page_never_scrolls_sideways(name, width, request, browser, tmp_path):
    """A frame of the wanted width holds the page; the page around it reads the frame's."""
    shutil.copy(request.getfixturevalue(name), tmp_path / "page.html")
    (tmp_path / "frame.html").write_text(
        f"<iframe src='page.html' width='{width}' height='800' style='border:0'></iframe><p></p>"
        "<script>onload = () => { const d = document.querySelector('iframe').contentDocument;"
        "const e = d.documentElement; const measured = [e.clientWidth, e.scrollWidth,"
        "d.querySelectorAll('circle').length, getComputedStyle(d.querySelector('h1')).fontSize];"
        "document.querySelector('p').textContent = JSON.stringify(measured); }</script>"
    )
    dom = browser(
        (tmp_path / "frame.html").as_uri(), "--allow-file-access-from-files", "--dump-dom"
    )
    inner, scroll, circles, size = json.loads(re.search(r"<p>(.*?)</p>", dom)[1])
    assert inner > width - 20 and scroll == inner
    assert circles > 30 and size == "25.6px"
