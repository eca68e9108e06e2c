"""Self-contained HTML pages: text, tables, pictures and charts in one file that opens from disk, without a network.

A page is made of ``Markup``; whatever else is put into one is text, and is escaped there, so that no caption, file name
or sample can add an element. Its policy forbids scripts and everything from elsewhere all the same.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GOOD, WARNING, BAD = "good", "warning", "bad"
"""Kinds of a ``note``."""
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, orders of direction and halves of characters: a page shows them as escapes."""
_EMPTY_ELEMENTS = ("img", "br", "hr", "meta")
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1280px; padding: 16px 24px 48px; color: #202124; background: #faf9f6;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.6em; line-height: 1.25; margin: .4em 0 } h2 { font-size: 1.25em; margin: 2em 0 .6em;
  border-bottom: 1px solid #dedcd6; padding-bottom: .2em } h3 { font-size: 1.05em; margin: 1.2em 0 .4em }
nav a { display: inline-block; margin-right: 1.1em; color: #1a56b0 }
p { margin: .5em 0; max-width: 75em } .faint { color: #5f6368 }
.wide { overflow-x: auto } table { border-collapse: collapse; margin: .6em 0; overflow-wrap: normal }
th, td { padding: 3px 14px 3px 0; text-align: left; vertical-align: top; border-bottom: 1px solid #e9e7e1 }
th { color: #5f6368; font-weight: 600 } .number { text-align: right; font-variant-numeric: tabular-nums }
td.text { min-width: 9em; overflow-wrap: anywhere }
pre { white-space: pre-wrap; background: #f1efe9; padding: 10px 12px; border-radius: 4px;
  font-size: 13px; margin: .5em 0 }
.note { border-left: 4px solid #888; padding: 6px 12px; margin: .5em 0; background: #f1efe9; white-space: pre-line }
.note.good { border-color: #188038 } .note.warning { border-color: #e37400; background: #fdf3e3 }
.note.bad { border-color: #c5221f; background: #fceceb }
.row { display: flex; flex-wrap: wrap; gap: 10px; align-items: flex-start } .row > figure { margin: 0; max-width: 100% }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); gap: 18px 28px }
figure { margin: .5em 0 } figure img { display: block; max-width: 100%; height: auto; border-radius: 3px }
figcaption { font-size: 13px; color: #5f6368 } svg { display: block; width: 100%; height: auto }
svg text { font: 12.5px system-ui, sans-serif; fill: #5f6368 } .keys { display: flex; flex-wrap: wrap; gap: 2px 16px }
.key::before { content: ""; display: inline-block; width: 11px; height: 11px; border-radius: 2px; margin-right: 6px;
  background: var(--colour) } details { margin: .6em 0 } summary { cursor: pointer; color: #1a56b0 }
.bar { background: #4f7fc0; height: 13px; min-width: 1px; border-radius: 2px }
td.bars { width: 45%; min-width: 90px; vertical-align: middle }
.marked { background: var(--colour); border-radius: 2px; padding: 0 1px; white-space: pre-wrap }
@media (max-width: 600px) { body { padding: 10px 12px 32px; font-size: 14px } th, td { padding-right: 9px } }
"""


class Markup(str):
    """HTML that a page has as it is."""

    __slots__ = ()


def escape(value: object) -> Markup:
    """A value as text of a page; ``Markup`` stays as it is. What cannot be seen is shown as its escape in Python."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(_UNSEEN.sub(lambda found: ascii(found[0])[1:-1], str(value))))


def tag(name: str, /, *content: object, **attributes: object) -> Markup:
    """An element.

    Args:
        content: within it, escaped where it is not Markup.
        attributes: an underscore at the end of a name is left out (class_), others are hyphens; None is no attribute.
    """
    given = {key.rstrip("_").replace("_", "-"): str(value) for key, value in attributes.items() if value is not None}
    words = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    if name in _EMPTY_ELEMENTS:
        return Markup(f"<{name}{words}>")
    return Markup(f"<{name}{words}>{join(content)}</{name}>")


def join(content: Iterable[object]) -> Markup:
    """Several things one behind the other."""
    return Markup("".join(map(escape, content)))


def page(title: str, sections: Sequence[tuple[str, Sequence[object]]], lead: Sequence[object] = ()) -> str:
    """A whole document, as UTF-8 can hold it.

    Args:
        sections: each with its title and what is below it; an empty one is left out.
        lead: what comes before them.
    """
    filled = [(number, *section) for number, section in enumerate(sections) if section[1]]
    head = join(
        [
            tag("meta", charset="utf-8"),
            tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
            tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
            tag("title", title),
            tag("style", Markup(_STYLE)),
        ]
    )
    links = [tag("a", name, href=f"#s{number}") for number, name, _ in filled]
    body = join(
        [
            tag("h1", title),
            *lead,
            tag("nav", *links),
            *(tag("section", tag("h2", name, id=f"s{number}"), *content) for number, name, content in filled),
        ]
    )
    return f"<!DOCTYPE html>\n{tag('html', tag('head', head), tag('body', body), lang='en')}\n"


def paragraph(*content: object, faint: bool = False) -> Markup:
    """A paragraph."""
    return tag("p", *content, class_="faint" if faint else None)


def note(kind: str, *content: object) -> Markup:
    """A box that catches the eye: ``GOOD``, ``WARNING`` or ``BAD``; lines of text stay lines."""
    return tag("div", *content, class_=f"note {kind}")


def code(text: str) -> Markup:
    """A command or another text whose lines and spaces count."""
    return tag("pre", text)


def mark(text: str, colour: str, title: str | None = None) -> Markup:
    """A piece of text on a colour (#rrggbb), with what is said of it while the pointer is there."""
    return tag("span", text, class_="marked", style=f"--colour:{colour}", title=title)


def details(summary: object, *content: object, is_open: bool = False) -> Markup:
    """What is shown when its summary is clicked on."""
    return tag("details", tag("summary", summary), *content, open="open" if is_open else None)


def table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """A table; numbers stand at the right, with their thousands apart, and None is an empty cell."""
    rows = list(rows)
    # A column of numbers has its heading at the right too.
    right = [all(_is_number(row[column]) for row in rows) for column in range(len(head))]
    titles = [tag("th", name, class_="number" if right[i] else None) for i, name in enumerate(head)]
    top = tag("thead", tag("tr", *titles)) if any(head) else ""
    body = tag("tbody", *(tag("tr", *map(_cell, row)) for row in rows))
    return tag("div", tag("table", top, body), class_="wide")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: object) -> Markup:
    if value is None:
        return tag("td")
    if isinstance(value, (int, float)) and _is_number(value):
        return tag("td", f"{value:,}" if isinstance(value, int) else f"{value:,.4g}", class_="number")
    return tag("td", value, class_="text" if len(str(value)) > 30 else None)


def bars(entries: Sequence[tuple[object, float]]) -> Markup:
    """A histogram: a line for each entry, with its value and a bar as long as that."""
    most = max((value for _, value in entries), default=0) or 1
    bar = [tag("div", class_="bar", style=f"width:{max(value, 0) / most:.2%}") for _, value in entries]
    rows = [
        tag("tr", _cell(name), _cell(value), tag("td", drawn, class_="bars"))
        for (name, value), drawn in zip(entries, bar, strict=True)
    ]
    return tag("table", *rows, style="width:100%")


def figure(picture: Image, caption: object = "", max_side: int = 320, lossless: bool = False) -> Markup:
    """A picture within the page, made smaller where it is larger than ``max_side``; as PNG if ``lossless``."""
    small = picture.convert("RGB")
    small.thumbnail((max_side, max_side))
    file = io.BytesIO()
    small.save(file, format="PNG" if lossless else "JPEG", **({} if lossless else {"quality": 82}))
    kind, data = "png" if lossless else "jpeg", base64.b64encode(file.getvalue()).decode("ascii")
    text = html.unescape(re.sub("<[^>]*>", "", escape(caption)))
    image = tag("img", src=f"data:image/{kind};base64,{data}", alt=text, width=small.width, height=small.height)
    return tag("figure", image, tag("figcaption", caption) if caption else "")


def row(*content: object) -> Markup:
    """Things beside each other, as many as there is room for."""
    return tag("div", *content, class_="row")


def grid(*content: object) -> Markup:
    """Charts or lists beside each other, in columns of one width: two on a desk, one on a phone."""
    return tag("div", *(tag("div", item) for item in content), class_="grid")
