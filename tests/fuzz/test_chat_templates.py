"""Chat templates come with tokenizers, from strangers: each writes conversations as formats do, or is refused."""

from __future__ import annotations

import resource
import time
from unittest import mock

import pytest
from fuzzing import attempt, cases, names
from hypothesis import example, given
from hypothesis import strategies as st
from test_fuzz_conversations import chats, make_vision

from llava.constants import IGNORE_INDEX
from llava.data.formats import CHAT, build_format, template_limits
from llava.data.formats.base import label_segments
from llava.data.placeholders import expand_placeholders
from llava.types import Turn
from tests.data.formats.test_formats import CHATML, CONTROL, GEMMA, LLAMA_2, LLAMA_3, gpt2_tokenizer  # noqa: F401

_PIECES = st.sampled_from((
    "<|im_start|>", "<|im_end|>", "\n", " ", "  ", "user: ", "a", "{{ bos_token }}", "{{ eos_token }}",
    "{{ message.role }}", "{{ message.content }}", "{{ message['content'] | trim }}", "{{ message.content | upper }}",
    "{{ message.content[:3] }}", "{{ message.content * 2 }}", "{{ message.content | tojson }}",
    "{{ messages[0].content }}", "{{ messages[9].content }}", "{{ messages[-1].content }}", "{{ loop.index }}",
    "{{ loop.index / 0 }}", "{{ messages | length }}", "{{ nothing }}", "{{ nothing.at.all }}",
    "{{ raise_exception('no') }}", "{{ 'a' * 3 }}", "{{ 2 ** 3 }}", "{{ range(3) | list }}",
    "{{ message | items | list }}", "{{ ''.__class__.__mro__ }}", "{{ message.content.__class__ }}",
    "{{ message.pop('role') }}", "{{ messages.append(1) }}", "{{ namespace(x=1).x }}", "{% set x = 1 %}",
    "{% include 'a' %}", "{% import 'a' as b %}", "{% extends 'a' %}", "{{ self }}", "{{ cycler('a', 'b').next() }}",
    "{{ [1, 2][5] }}", "{{ {'a': 1}['b'] }}", "{{ 'a' + 1 }}", "{{ 'é'.encode('ascii') }}", "{{ '%d' % 'a' }}",
    "{{ 'a'.center(10) }}", "{{ (1).__add__(2) }}", "{{ '{0.a}'.format(1) }}", "{{ int('x') }}", "{{ 'a' | int }}",
    "{{ dict(a=1) }}", "{{ lipsum() }}", "{{ message.content.split('@')[7] }}", "{{ x | nofilter }}",
    "{% if message.role == 'user' %}u{% endif %}", "{% if loop.first %}first{% endif %}",
    "{% if not loop.last %}\n{% endif %}", "{% if loop.last and add_generation_prompt %}g{% endif %}",
    "{%- if true -%} b {%- endif -%}", "{# note #}", "{% for x in [] %}", "{% endfor %}", "{% endif %}", "{{", "}}",
    "{%", "@@turn0@@", "@@turn1@@", "{{ '@@turn' ~ loop.index0 ~ '@@' }}", "</s>",
    "{% generation %}{{ message.content }}{% endgeneration %}", "{% break %}", "{% continue %}", "{{ caller() }}",
    "\x00", "\u2028", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ 'a' * 10**12 }}", "{{ 'a' * 10**30 }}",
))  # fmt: skip


@st.composite
def templates(draw: st.DrawFn) -> str:
    """A template made of pieces, within a loop over the turns or without; or a real one with a piece put in."""
    pieces = draw(st.lists(_PIECES, max_size=4))
    if draw(st.booleans()):
        real = draw(st.sampled_from((CHATML, GEMMA, LLAMA_2, LLAMA_3)))
        place = draw(st.integers(0, len(real)))
        return real[:place] + "".join(pieces[:2]) + real[place:]
    before, behind = draw(_PIECES), draw(_PIECES)
    inside = [*pieces, "{{ message.content }}"] if draw(st.booleans()) else pieces
    around = ("", "") if draw(st.integers(0, 9)) == 0 else ("{% for message in messages %}", "{% endfor %}")
    return f"{before}{around[0]}{''.join(draw(st.permutations(inside)))}{around[1]}{behind}"


_GROWTH = st.sampled_from((
    "{% set ns.x = ns.x ~ ns.x %}", "{% set ns.x = ns.x + ns.x %}", "{% set ns.x = [ns.x, ns.x] | join %}",
    "{% set ns.x = '%s%s' | format(ns.x, ns.x) %}", "{% set ns.x = ns.x | replace('a', 'aaaa') %}",
    "{% set ns.x = ns.x | center(999999) %}", "{% set ns.x = ns.x * 99 %}",
    "{% set ns.x = ns.x | indent(9999, true) %}",
    "{% set ns.x = messages | tojson(indent=99999) %}", "{{ ns.x }}", "{{ ns.x | upper }}", "{{ range(99999) | list }}",
    "{{ range(99999) | join(ns.x) }}", "{{ range(99999) | sum }}", "{{ ns.x | length }}", "{{ ns.x | urlize }}",
    "{{ ns.x | wordcount }}", "{{ m(9) }}", "{% set ns.x = ns.x.ljust(99999) %}", "{% set ns.x = ns.x.zfill(999999) %}",
    "{% set ns.l = ns.l + ns.l %}", "{{ ns.l | batch(1) | list }}", "{% set ns.x = ns.x.join(ns.l) %}",
))  # fmt: skip


@st.composite
def hungry(draw: st.DrawFn) -> str:
    """A template that works for nothing: loops in loops, texts that double, and macros that call themselves."""
    inside = "".join(draw(st.lists(_GROWTH, min_size=1, max_size=3)))
    for _ in range(draw(st.integers(1, 3))):
        number = draw(st.sampled_from((2, 30, 999, 90_000)))
        way = draw(st.sampled_from(("loop", "loop", "macro", "set", "filter")))
        inside = {
            "loop": f"{{% for i in range({number}) %}}{inside}{{% endfor %}}",
            "macro": f"{{% macro q() %}}{inside}{{% endmacro %}}{{{{ q() }}}}",
            "set": f"{{% set y %}}{inside}{{% endset %}}{{{{ y | length }}}}",
            "filter": f"{{% filter upper %}}{inside}{{% endfilter %}}",
        }[way]
    start = (
        "{% set ns = namespace(x='a', l=['b', 'c']) %}"
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}"
        "{% for message in messages %}{{ message.content }}{% endfor %}"
    )
    return start + inside


@pytest.fixture(scope="module")
def tokenizer(gpt2_tokenizer):  # noqa: F811
    from llava.model.vocabulary import add_visual_tokens

    gpt2_tokenizer.add_special_tokens({"additional_special_tokens": CONTROL})
    add_visual_tokens(gpt2_tokenizer)
    return gpt2_tokenizer


TURNS = [Turn("user", "ciao"), Turn("assistant", "salve")]


@cases(offline=120, in_ci=3)
@example("{% set x = 'a' | center(999999) %}{% for i in range(9999) %}{{ x }}{% endfor %}{{ messages }}")  # 10 GB
@example("{% macro m() %}{% for i in range(9999) %}{{ 'a' | center(999999) }}{% endfor %}{% endmacro %}{{ m() }}")
@given(hungry())
def test_a_template_that_works_for_nothing_ends_soon_and_in_little_memory(tokenizer, template):
    tokenizer.chat_template = template
    before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with mock.patch.object(template_limits, "_SECONDS", 1.0):
        found = attempt(build_format, CHAT, tokenizer)
    assert time.monotonic() - begin < 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB
    assert not isinstance(found, ValueError) or names(found, "chat template")


@cases(offline=900, in_ci=60)
@example("{% for message in messages %}{{ loop.index / 0 }}{% endfor %}", TURNS, 20)
@example("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", TURNS, 20)
@example("{{ 'a' * 10**12 }}", TURNS, 20)
@example("{% for a in range(90000) %}{% for b in range(90000) %}{% endfor %}{% endfor %}", TURNS, 20)  # no end
@example("{{ {'a': 1}['b'] }}{{ messages[9].content }}", TURNS, 20)
@given(templates(), chats(), st.integers(2, 200))
def test_a_template_writes_conversations_or_is_refused_in_one_line(tokenizer, template, turns, max_length):
    tokenizer.chat_template = template or "{# none #}"
    text_format = attempt(build_format, CHAT, tokenizer)
    if isinstance(text_format, ValueError):
        assert names(text_format, "chat template", "--version")
        return
    written = expand_placeholders(turns, make_vision("none", 1, False))
    refused = attempt(text_format.check, written)
    if isinstance(refused, ValueError):
        assert names(refused, "chat template", "turn")
        assert isinstance(attempt(text_format.encode, written), ValueError)
        return
    ids, labels = label_segments(text_format.encode(written))
    assert all(label in (i, IGNORE_INDEX) for i, label in zip(ids, labels, strict=True))
    assert text_format.encode_all([written]) == [ids]
    if turns[-1].role == "assistant":
        # Whatever a template makes of earlier turns once there are more: what is asked last stands as in training.
        prompt = [i for segment in text_format.encode_prompt(written[:-1]) for i in segment.ids]
        assert ids[: len(prompt)] == prompt
        cut = attempt(text_format.encode_sample, written, max_length)
        assert isinstance(cut, ValueError) or sum(len(segment.ids) for segment in cut[0]) <= max_length
