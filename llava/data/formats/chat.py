"""Conversations with markup around their turns, of which only the assistant's are learned.

The markup depends on the roles alone. It is written once for each order of roles, tokenised once, and
every conversation of these roles puts its own contents into the gaps: no text is tokenised to find a
boundary. ``<user>ciao<end>\\n<assistant>salve<end>\\n`` with two turns becomes::

    before turn 0    <user>                    not learned
    turn 0           ciao                      not learned
    before turn 1    <end>\\n<assistant>        not learned
    turn 1           salve                     learned
    behind           <end> end-of-text         learned
"""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava.constants import VISUAL_TOKENS
from llava.data.formats.base import CHAT, FORMATS, Format, Segment, split_at_spans, visual_ids
from llava.data.formats.template_limits import TemplateLimitError, check_template, run_bounded
from llava.messages import shorten_text
from llava.types import Role, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NEWLINE = "\n"
_PROBE: tuple[Role, ...] = ("user", "assistant", "user", "assistant")


@dataclass(frozen=True)
class Frame:
    """The tokenised markup of conversations with certain roles.

    ``before[i]`` stands before turn i and ``spaces[i]`` ("" or " ") begins that turn's text, since
    tokenizers tie a space to the word behind it; ``has_markup[i]`` is whether ``before[i]`` has any
    text of the format. ``closing`` stands behind the last turn and ends with the end of text.
    """

    before: list[list[Segment]]
    spaces: list[str]
    has_markup: list[bool]
    closing: list[Segment]

    @property
    def num_tokens(self) -> int:
        return sum(len(segment.ids) for gap in [*self.before, self.closing] for segment in gap)


@dataclass(frozen=True)
class _Piece:
    """A stretch of a turn: its text, or visual tokens; ``inside`` is whether text stands before it."""

    turn: int
    text: str
    visual: bool
    inside: bool


class ConversationFormat(Format):
    """A format that puts markup around turns.

    Args:
        tokenizer: of the model.

    Raises:
        ValueError: the tokenizer cannot write this format.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer)
        markup = self.markup(_PROBE)  # Two rounds show all markup that there is between turns.
        self._encoder = PieceEncoder(tokenizer, self.prefix_ids, "".join(markup))
        self._control = control_tokens(tokenizer)
        # What ends an answer: the text behind the last one, up to its first control token.
        self._turn_end = self._through_control(markup[-1]) or markup[-1]
        self._frames: dict[tuple[Role, ...], Frame] = {}

    @abstractmethod
    def markup(self, roles: Sequence[Role]) -> list[str]:
        """The text before each turn, and behind the last one: one more than there are roles."""

    @property
    def stop_token_ids(self) -> list[int]:
        end = self._encoder.encode_markup(self._through_control(self._turn_end))[-1:]
        return list(dict.fromkeys([*super().stop_token_ids, *end]))

    def check(self, turns: Sequence[Turn]) -> None:
        roles = [turn.role for turn in turns]
        if not roles:
            raise ValueError("there are no turns; a conversation has one or more")
        start = int(roles[:1] == ["system"])
        for i, role in enumerate(roles[start:]):
            expected = ("user", "assistant")[i % 2]
            if role != expected:
                raise ValueError(
                    f"turn {start + i + 1} is the {role}'s, but must be the {expected}'s: a chat format takes an "
                    "optional system turn, then user and assistant in turn; mend the sample, or take --plain_lm true"
                )
        self._frame(roles)  # A chat template may refuse roles: better now than in a worker.

    def has_target(self, turns: Sequence[Turn]) -> bool:
        self.check(turns)
        answers = [split_at_spans(turn.text) for turn in turns if turn.role == "assistant"]
        return bool(answers) and all(any(piece.strip() for piece, visual in answer if not visual) for answer in answers)

    def encode(self, turns: Sequence[Turn]) -> list[Segment]:
        self.check(turns)
        frame = self._frame([turn.role for turn in turns])
        return _without_empty([*self._encode_turns(turns, frame), *frame.closing])

    def encode_prompt(self, turns: Sequence[Turn]) -> list[Segment]:
        # Written with an empty answer, whose text is then left out: a prompt ends exactly where training had answers.
        asked = [*turns, Turn("assistant", "")]
        self.check(asked)
        frame = self._frame([turn.role for turn in asked])
        return _without_empty([*self._encode_turns(turns, frame), *frame.before[len(turns)]])

    def count_tokens(self, conversations: Sequence[Sequence[Turn]]) -> list[int]:
        frames = [self._frame([turn.role for turn in turns]) for turns in conversations]
        pieces = [
            [piece for piece in self._pieces(turns, frame) if not piece.visual]
            for turns, frame in zip(conversations, frames, strict=True)
        ]
        encoded = iter(self._encode_pieces([piece for of_one in pieces for piece in of_one]))
        return [
            frame.num_tokens + sum(len(next(encoded)) for _ in of_one)
            for frame, of_one in zip(frames, pieces, strict=True)
        ]

    def _encode_turns(self, turns: Sequence[Turn], frame: Frame) -> list[Segment]:
        """The turns, with the markup before each."""
        pieces = self._pieces(turns, frame)
        encoded = iter(self._encode_pieces([piece for piece in pieces if not piece.visual]))
        contents: list[list[Segment]] = [[] for _ in turns]
        for piece in pieces:
            ids = visual_ids(piece.text, self.tokenizer) if piece.visual else next(encoded)
            learned = turns[piece.turn].role == "assistant"
            contents[piece.turn].append(Segment(ids, piece.visual, supervised=learned))
        return [
            segment for before, content in zip(frame.before, contents, strict=False) for segment in (*before, *content)
        ]

    def _pieces(self, turns: Sequence[Turn], frame: Frame) -> list[_Piece]:
        """The contents of the turns, cut at spans."""
        pieces, inside = [], False  # A span ends a text: tokenizers treat what follows as a beginning.
        for i, turn in enumerate(turns):
            inside = inside or frame.has_markup[i]
            for text, visual in split_at_spans(frame.spaces[i] + self.content(turn)):
                pieces.append(_Piece(i, text, visual, inside))
                inside = not visual
        return pieces

    def _encode_pieces(self, pieces: Sequence[_Piece]) -> list[list[int]]:
        return self._encoder.encode_contents([piece.text for piece in pieces], [piece.inside for piece in pieces])

    def _frame(self, roles: Sequence[Role]) -> Frame:
        key = tuple(roles)
        if key not in self._frames:
            self._frames[key] = self._build_frame(key)
        return self._frames[key]

    def _build_frame(self, roles: tuple[Role, ...]) -> Frame:
        *texts, closing = self.markup(roles)
        # A space before a turn goes to its text: " salve" is one token, " " and "salve" would be two.
        spaces = [" " if text.endswith(" ") else "" for text in texts]
        texts = [text.removesuffix(" ") for text in texts]
        before = [[Segment(self._encoder.encode_start(texts[0]), supervised=False, markup=True)]]
        for role, text in zip(roles, texts[1:], strict=False):
            before.append(self._behind_answer(text) if role == "assistant" else [self._given(text)])
        return Frame(before, spaces, [bool(text) for text in texts], self._close(roles[-1], closing))

    def _given(self, text: str) -> Segment:
        return Segment(self._encoder.encode_markup(text), supervised=False, markup=True)

    def _behind_answer(self, text: str) -> list[Segment]:
        """Markup behind an assistant's turn: what ends the turn is learned, the rest is not."""
        end = self._turn_end if text.startswith(self._turn_end) else self._through_control(text)
        ids, end_ids = self._encoder.encode_markup(text), self._encoder.encode_markup(end)
        # A tokenizer may merge the end with what follows; then the two are tokenised apart.
        if ids[: len(end_ids)] == end_ids:
            return [Segment(end_ids, markup=True), Segment(ids[len(end_ids) :], supervised=False, markup=True)]
        return [Segment(end_ids, markup=True), self._given(text[len(end) :])]

    def _close(self, last: Role, text: str) -> list[Segment]:
        """The end of a sample: that of the last turn, then the end of text, unless that is what ended the turn."""
        markup = self._behind_answer(text)[0] if last == "assistant" else self._given(text)
        eos = self.tokenizer.eos_token_id
        # Formats that end turns with the end of text (v1) would have it twice.
        ids = markup.ids[:-1] if markup.ids[-1:] == [eos] else markup.ids
        return [Segment(ids, supervised=markup.supervised, markup=True), Segment([eos], markup=True)]

    def _through_control(self, text: str) -> str:
        """The text up to and with its first control token; empty if it has none."""
        match = self._control.search(text) if self._control else None
        return text[: match.end()] if match else ""


def _without_empty(segments: Sequence[Segment]) -> list[Segment]:
    return [segment for segment in segments if segment.ids]


# Pieces of text to ids.


class PieceEncoder:
    """Tokenises pieces of a sample so that they read as parts of one text.

    Tokenizers of SentencePiece's kind put a space before whatever they are given; within a text that
    space would be wrong. Such a tokenizer gets the piece behind a newline, whose ids are taken off again.

    Args:
        tokenizer: of the model.
        prefix_ids: what every sample begins with.
        markup: the text that a format writes around turns; no content becomes a control token of it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prefix_ids: list[int], markup: str) -> None:
        self.tokenizer = tokenizer
        self._prefix_ids = prefix_ids
        newline, letter, both = tokenizer([_NEWLINE, "a", _NEWLINE + "a"], add_special_tokens=False)["input_ids"]
        self._newline_ids = newline if both != newline + letter else []
        self._breaks = _break_points(tokenizer, markup)

    def encode_start(self, text: str) -> list[int]:
        """Ids of the text that a sample begins with: exactly one beginning of text, where the tokenizer has that."""
        ids = self._encode([text], [False])[0]
        return ids if ids[:1] == self._prefix_ids else self._prefix_ids + ids

    def encode_markup(self, text: str) -> list[int]:
        """Ids of a format's own text, within a sample; control tokens are recognised."""
        return self._encode([text], [True])[0] if text else []

    def encode_contents(self, texts: Sequence[str], inside: Sequence[bool]) -> list[list[int]]:
        """Ids of what people wrote; a control token that they typed is plain text.

        Args:
            texts: any number, tokenised in one call.
            inside: for each whether text stands before it.
        """
        pieces = [self._breaks.split(text) if self._breaks else [text] for text in texts]
        flags = [within or i > 0 for of_text, within in zip(pieces, inside, strict=True) for i in range(len(of_text))]
        encoded = iter(self._encode([piece for of_text in pieces for piece in of_text], flags, typed=True))
        return [[i for _ in of_text for i in next(encoded)] for of_text in pieces]

    def _encode(self, texts: Sequence[str], inside: Sequence[bool], typed: bool = False) -> list[list[int]]:
        if not texts:
            return []
        options = {"add_special_tokens": False, "split_special_tokens": typed, "verbose": False}
        begin = self._newline_ids
        if not begin:
            return self.tokenizer(list(texts), **options)["input_ids"]
        # Behind a newline SentencePiece adds no space; the newline's ids are cut off again.
        shielded = [_NEWLINE + text if within else text for text, within in zip(texts, inside, strict=True)]
        encoded: list[list[int]] = self.tokenizer(shielded, **options)["input_ids"]
        return [
            ids[len(begin) :] if within and ids[: len(begin)] == begin else self.tokenizer(text, **options)["input_ids"]
            for ids, text, within in zip(encoded, texts, inside, strict=True)
        ]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str] | None:
    """Finds the tokenizer's own tokens, but for visual ones and white space; None if it has none."""
    tokens = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens} - set(VISUAL_TOKENS)
    # Longest first: an alternative that is the beginning of another would hide it.
    longest_first = sorted((token for token in tokens if token.strip()), key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def _break_points(tokenizer: PreTrainedTokenizerBase, markup: str) -> re.Pattern[str] | None:
    """Matches, with no width, behind the first character of each token of the markup that is added but not special.

    ``split_special_tokens`` spares such tokens, so that one that people typed would become markup.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if not token.special]
    tokens = [token for token in added if len(token.strip()) > 1 and token in markup]
    points = [f"(?<={re.escape(token[0])})(?={re.escape(token[1:])})" for token in tokens]
    return re.compile("|".join(points)) if points else None


# The tokenizer's own chat template.


@FORMATS.register(CHAT)
class ChatFormat(ConversationFormat):
    """What the Jinja template in the tokenizer's files writes.

    The template is run with stand-ins for the turns' texts, and its output is cut where these stand: a
    template that strips or rewrites texts cannot move a boundary.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            named = ", ".join(name for name in FORMATS if name != CHAT)
            raise ValueError(
                f"--version {CHAT} needs a chat template, and the tokenizer of {tokenizer.name_or_path!r} has none; "
                f"give --version one of: {named}"
            )
        templates = tokenizer.chat_template
        try:
            for template in templates.values() if isinstance(templates, dict) else [templates]:
                check_template(str(template))
        except TemplateLimitError as error:
            whose = f"the chat template of the tokenizer of {tokenizer.name_or_path!r}"
            raise ValueError(f"{whose} is not run: {error}; {_REMEDY}") from error
        super().__init__(tokenizer)
        self.fingerprint += f" {tokenizer.chat_template}"

    def markup(self, roles: Sequence[Role]) -> list[str]:
        import jinja2

        stand_ins = [f"@@turn{i}@@" for i in range(len(roles))]
        messages = [{"role": role, "content": text} for role, text in zip(roles, stand_ins, strict=True)]
        try:
            rendered = str(run_bounded(lambda: self.tokenizer.apply_chat_template(messages, tokenize=False)))
        except (jinja2.TemplateError, *_ERRORS_OF_TEMPLATES) as error:
            said = shorten_text(str(error), 300) or type(error).__name__
            raise ValueError(f"{self._whose()} refuses turns of {', '.join(roles)}: {said}; {_REMEDY}") from error
        return self._cut(rendered, stand_ins, roles)

    def _cut(self, rendered: str, stand_ins: Sequence[str], roles: Sequence[Role]) -> list[str]:
        """The pieces of a rendered conversation before, between and behind the stand-ins."""
        pieces: list[str] = []
        for i, stand_in in enumerate(stand_ins):
            # Sought in the pieces too: a template may write a turn before its place.
            times = sum(text.count(stand_in) for text in (*pieces, rendered))
            piece, found, rendered = rendered.partition(stand_in)
            if times != 1 or not found:
                what = "leaves out" if not times else "repeats" if times > 1 else "moves"
                raise ValueError(f"{self._whose()} {what} turn {i + 1} of {', '.join(roles)}; {_REMEDY}")
            pieces.append(piece)
        return [*pieces, rendered]

    def _whose(self) -> str:
        return f"the chat template of the tokenizer of {self.tokenizer.name_or_path!r}"


_ERRORS_OF_TEMPLATES = (
    ArithmeticError, AssertionError, AttributeError, LookupError, MemoryError, NameError, RuntimeError, SyntaxError,
    TypeError, ValueError,
)  # fmt: skip
"""What a template, which is a program of a stranger's, may raise beside Jinja's own errors."""
_REMEDY = "mend the samples or the template, or give --version a named format"
