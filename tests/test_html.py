"""Pages: text stays text, nothing comes from elsewhere, and charts and tables say what they were given."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from llava.chart import Line, Point, draw_svg
from llava.html import (
    BAD,
    Markup,
    bars,
    code,
    details,
    escape,
    figure,
    grid,
    join,
    mark,
    note,
    page,
    paragraph,
    row,
    table,
    tag,
)

HOSTILE = "</figcaption><script>alert(1)</script><img src=x onerror=\"f('&')\">"
RAW = "clip\x1b[31m\x00\x85\udcff\ud83d\u202egpj.mp4"
SHOWN = "clip\\x1b[31m\\x00\\x85\\udcff\\ud83d\\u202egpj.mp4"


class Reader(HTMLParser):
    """The elements of a page and its text, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == [], "an element is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "hr"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def everything(text: str) -> list[Markup]:
    """One of each thing that a page can have, with a text wherever one fits."""
    picture = Image.new("RGB", (64, 32), (200, 40, 40))
    return [
        paragraph(text, faint=True), note(BAD, text), code(text), mark(text, "#ffee88", text), row(text), grid(text),
        details(text, text), table([text, "n"], [[text, 3], [None, 4]]), bars([(text, 2), ("b", 0)]),
        figure(picture, text), figure(picture, tag("b", text)), draw_svg([Line(text, [Point(1, 2.0)])], text, text),
        tag("a", text, title=text),
    ]  # fmt: skip


@pytest.mark.parametrize("text", [HOSTILE, RAW])
def test_text_stays_text(text: str) -> None:
    document = page(text, [(text, everything(text)), (text, [])], [text])
    assert document.encode("utf-8")  # Lone surrogates could not be written.
    reader = Reader(document)
    # Title and heading, lead, link, section, two of details, mark and bars, three in the other eight and more.
    shown = HOSTILE if text is HOSTILE else SHOWN
    assert reader.text.count(shown) >= 18
    names = {name for name, _ in reader.elements}
    assert names.isdisjoint({"script", "iframe", "link", "object", "form"})
    assert not [key for _, attributes in reader.elements for key in attributes if key.startswith("on")]
    plain = Reader(page("t", [("t", everything("t")), ("t", [])], ["t"]))
    assert [name for name, _ in reader.elements] == [name for name, _ in plain.elements]


def test_nothing_comes_from_elsewhere() -> None:
    reader = Reader(page("t", [("t", everything("t"))]))
    sources = [
        value for _, attributes in reader.elements for key, value in attributes.items() if key in ("src", "href")
    ]
    assert {str(source).partition(":")[0] for source in sources} == {"#s0", "data"}
    policy = next(attributes for _, attributes in reader.elements if "http-equiv" in attributes)
    assert policy["content"] == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_pictures_are_bounded_and_whole() -> None:
    drawn = figure(Image.effect_noise((1200, 800), 60), "a frame", max_side=160)
    assert 'width="160" height="107"' in drawn
    assert len(drawn) < 30_000
    exact = Image.new("RGB", (30, 20), (1, 2, 3))
    encoded = re.search(r"base64,([^\"]+)", figure(exact, lossless=True))[1]
    assert Image.open(io.BytesIO(base64.b64decode(encoded))).getpixel((3, 3)) == (1, 2, 3)


def test_tables_tell_numbers_from_text() -> None:
    text = table(["name", "count"], [["a", 1234567], ["b", 0.123456]])
    assert '<th class="number">count</th>' in text
    assert '<td class="number">1,234,567</td>' in text
    assert '<td class="number">0.1235</td>' in text
    assert escape(True) == "True"
    assert join(["<", Markup("<b>")]) == "&lt;<b>"


def test_a_chart_goes_through_its_points_and_leaves_gaps() -> None:
    drawn = draw_svg([Line("loss", [Point(0, 4.0), Point(1, math.nan), Point(2, 3.0), Point(3, 2.0)])], "Loss", "steps")
    path = re.search(r'd="(M[^"]+)" fill="none"', drawn)[1]
    pieces = [[float(n) for n in re.findall(r"[\d.]+", piece)] for piece in path.split("M")[1:]]
    assert [len(piece) for piece in pieces] == [2, 4]
    # Later is further right, and less is lower: y grows downwards.
    assert pieces[0][0] < pieces[1][0] < pieces[1][2]
    assert pieces[0][1] < pieces[1][1] < pieces[1][3]
    assert "loss: 2" in drawn
    assert "nothing yet" in draw_svg([Line("loss", [Point(0, math.inf)])], "Loss", "steps")


def test_a_long_line_is_thinned_and_keeps_its_spikes() -> None:
    points = [Point(step, 50.0 if step == 7777 else 2.0 + step % 7 / 10) for step in range(20_000)]
    drawn = draw_svg([Line("loss", points)], "Loss", "steps")
    assert len(drawn) < 20_000
    path = re.search(r'd="(M[^"]+)" fill="none"', drawn)[1]
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert sum(height < 40 for height in heights) == 1  # The spike is the highest, at the top.


def test_a_logarithmic_chart_has_equal_room_for_equal_factors() -> None:
    drawn = draw_svg([Line("norm", [Point(0, 0.01), Point(1, 1.0), Point(2, 100.0)])], "Norm", "steps", log_y=True)
    first, second, third = map(float, re.findall(r'cy="([\d.]+)"', drawn))
    assert first - second == pytest.approx(second - third, abs=0.2)
    assert draw_svg([Line("norm", [Point(0, 0.0), Point(1, 1.0)])], "Norm", "steps", log_y=True)  # 0 has no logarithm
