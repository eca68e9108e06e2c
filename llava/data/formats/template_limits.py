"""Limits of chat templates: programs of a stranger's, which the sandbox keeps from files, but not from endless work."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

from llava.compat import namespace_values
from llava.messages import shorten

if TYPE_CHECKING:
    import jinja2

T = TypeVar("T")

_LONGEST_TEMPLATE = 200_000
_LARGEST = 1_000_000
_LARGEST_FACTOR = 100
_LONG_NUMBER = re.compile(r"\d{7,}")
_MOST_LINES = 100_000
_MOST_CHARACTERS = 10_000_000
_SECONDS = 10.0
_OWN_TAG = re.compile(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}")
"""A tag of transformers' own, which marks answers."""
_TEMPLATE_FILE = "<template>"


class TemplateLimitError(ValueError):
    """A template that would work for too long, or write too much."""


def check_template(template: str) -> None:
    """A TemplateLimitError for a template with operations that make gigabytes at once, which no counting would stop.

    Powers, large factors and numbers of seven digits are refused; loops are counted as they run (``run_bounded``).
    """
    import jinja2

    if len(template) > _LONGEST_TEMPLATE:
        raise TemplateLimitError(f"it has {len(template):,} characters")
    try:
        known = _OWN_TAG.sub("", template)
        tree = jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(known)
    except jinja2.TemplateSyntaxError:
        return  # Rendering it says what is wrong.
    if next(tree.find_all(jinja2.nodes.Pow), None) is not None:
        raise TemplateLimitError("it raises to a power (**)")
    for product in tree.find_all(jinja2.nodes.Mul):
        sides = (product.left, product.right)
        if not any(_is_small(side) for side in sides) or any(_has_product(side) for side in sides):
            raise TemplateLimitError(f"it multiplies (*) by something else than a number up to {_LARGEST_FACTOR}")
    growth = 1.0
    for old, new in _replacements(tree):
        growth *= max(len(new) / max(len(old), 1), 1.0) if old else math.inf
    if growth > _LARGEST_FACTOR:
        raise TemplateLimitError("what it replaces would make texts many times as long")
    for constant in tree.find_all(jinja2.nodes.Const):
        value = constant.value
        if (isinstance(value, int) and abs(value) > _LARGEST) or (
            isinstance(value, str) and _LONG_NUMBER.search(value)
        ):
            raise TemplateLimitError(f"it has the number {shorten(value)}")


def _replacements(tree: jinja2.nodes.Template) -> Iterator[tuple[str, str]]:
    """What the template replaces, and by what, where it says so: x.replace(old, new) and x|replace(old, new)."""
    import jinja2

    calls = [(getattr(call.node, "attr", ""), call.args) for call in tree.find_all(jinja2.nodes.Call)]
    calls += [(one.name, one.args) for one in tree.find_all(jinja2.nodes.Filter)]
    for name, arguments in calls:
        if name == "replace" and len(arguments) >= 2:
            old, new = (getattr(argument, "value", None) for argument in arguments[:2])
            yield (old if isinstance(old, str) else " "), (new if isinstance(new, str) else "")


def _is_small(node: jinja2.nodes.Node) -> bool:
    value = getattr(node, "value", None)
    return isinstance(value, int | float) and abs(value) <= _LARGEST_FACTOR


def _has_product(node: jinja2.nodes.Node) -> bool:
    import jinja2

    return isinstance(node, jinja2.nodes.Mul) or next(node.find_all(jinja2.nodes.Mul), None) is not None


def run_bounded(render: Callable[[], T]) -> T:
    """What ``render`` gives; a TemplateLimitError once a template has run too many lines, or holds too long a text.

    Jinja compiles a template to Python, so its lines can be counted as a debugger does, in any thread. Only templates
    are: all else runs at its own speed.
    """
    lines, written, end = 0, 0, time.monotonic() + _SECONDS

    def count(frame: FrameType, event: str, argument: Any) -> Callable[..., Any]:
        nonlocal lines, written
        lines += 1
        # A template yields what it writes, piece by piece; they are joined when it is through.
        written += len(argument) if event == "return" and isinstance(argument, str) else 0
        if lines > _MOST_LINES:
            raise TemplateLimitError(f"it runs more than {_MOST_LINES:,} lines; does it end?")
        if time.monotonic() > end:
            raise TemplateLimitError(f"it runs for more than {_SECONDS:g} seconds")
        if written > _MOST_CHARACTERS or any(_length(value) > _MOST_CHARACTERS for value in frame.f_locals.values()):
            raise TemplateLimitError(f"it makes a text of more than {_MOST_CHARACTERS:,} characters")
        return count

    def enter(frame: FrameType, event: str, argument: Any) -> Callable[..., Any] | None:
        return count(frame, event, argument) if frame.f_code.co_filename == _TEMPLATE_FILE else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        return render()
    finally:
        sys.settrace(before)


def _length(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):  # A macro joins the pieces of such a list.
        return len(value) + sum(len(piece) for piece in value if isinstance(piece, str))
    return max(map(_length, namespace_values(value)), default=0)
