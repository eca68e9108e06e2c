"""The page: a picture or a clip is dropped, a caption or an answer streams in, and what the model saw is shown.

Gradio draws it. What it shows of models is plain HTML of ``llava.html``, where all text is escaped, with pictures
inside: nothing that is shown lies in a file. An upload is decoded when it comes and deleted at once; the frames stay
with the visitor's session in memory.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.data.placeholders import escape_placeholders
from llava.html import BAD, WARNING, Markup, figure, mark, note, paragraph, row, table, tag
from llava.messages import explain_error, is_out_of_memory
from llava.serve.explain import (
    Attention,
    LabelledPicture,
    Likelihood,
    Word,
    draw_heat_maps,
    draw_places,
    heat_maps,
    look_again,
    perplexity,
    score_sentence,
    shown_frames,
)
from llava.serve.generate import Captioner, Prompt, Request
from llava.serve.web.engine import BusyError, Delta, Done, Engine, Failed, Settings
from llava.serve.web.server import INSTALL
from llava.serve.web.uploads import Upload, UploadError, clean_name
from llava.types import VisualInput

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio import Blocks

logger = logging.getLogger(__name__)

SESSION_SECONDS = 3600
_LOADERS = 4
_EVERY = 0.05
"""Seconds between two updates of a text that streams in."""
_FRAME_SIDE = 168
_GONE = "is not here: it could not be read, the server was started anew, or an hour has passed; drop it again"
_STYLE = """
.llava-frames figure { margin: 0 } .llava-frames .row, .llava-frames.row { display: flex; flex-wrap: wrap; gap: 8px }
.llava-frames figcaption { font-size: 12px; opacity: .75; text-align: center }
.llava-frames img { border-radius: 4px; max-width: 100%; height: auto }
.llava-frames .note { border-left: 4px solid #c5221f; padding: 6px 12px; border-radius: 3px;
  background: rgba(197, 34, 31, .12); overflow-wrap: anywhere } .llava-frames .note.warning { border-color: #e37400 }
.llava-frames p { margin: .3em 0; font-size: 14px } .llava-frames .faint { opacity: .7; font-size: 12.5px }
.llava-frames table { border-collapse: collapse; margin: .4em 0; font-size: 14px }
.llava-frames table, .llava-frames table * { border-width: 0 !important }
.llava-frames th, .llava-frames td { padding: 2px 14px 2px 0; text-align: left }
.llava-frames .marked { background: var(--colour); color: #202124; border-radius: 3px; padding: 1px 3px; margin: 1px }
.llava-frames figure img { min-width: 112px; image-rendering: auto } .llava-head p { font-size: 15px }
.llava-tokens label { padding: 2px 7px !important; min-width: 0 } .llava-tokens label input { display: none }
.llava-tokens label:has(input:checked) { background: #f97316; color: #fff }
.llava-frames:not(:has(p)):not(:has(figure)):not(:has(table)):not(:has(.note)) { display: none }
.llava-tokens label span { margin-left: 0 !important } #media .download, #media a { pointer-events: none }
footer { display: none !important }
"""


@dataclass
class Answered:
    """An answer that can be looked into."""

    prompt: Prompt
    done: Done
    attention: Attention | None = None


@dataclass
class Session:
    """What the server keeps of a visitor: the frames of what was dropped, and the last answers, by model."""

    media: dict[str, list[VisualInput]] = field(default_factory=dict)
    answers: dict[str, Answered] = field(default_factory=dict)


def import_gradio(folder: Path) -> Any:
    """Gradio, told to keep its files in a folder and to report to nobody; a ValueError as from ``check_gradio``."""
    # Before it is imported: it reads them then. The first would send what is used, and look for newer releases.
    settings = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(folder),
        "GRADIO_EXAMPLES_CACHE": str(folder),
    }
    os.environ.update(settings)
    check_gradio()
    import gradio

    return gradio


def check_gradio() -> None:
    """A ValueError where Gradio is not installed; it is not imported."""
    if importlib.util.find_spec("gradio") is None:
        raise ValueError(f"the page needs gradio: {INSTALL}; or give --no_page for the endpoint alone")


class Page:
    """The page of an engine's models.

    Args:
        engine: that answers.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._models = list(engine.captioners)
        self._folder = engine.uploads.folder / "page"
        self._folder.mkdir(mode=0o700)
        self._gradio = import_gradio(self._folder)

    def add_to(self, app: FastAPI) -> FastAPI:
        """The application with the page at its root."""
        gradio = self._gradio
        # The system's own letters: Gradio's themes fetch theirs from elsewhere, unless they are told names alone.
        letters = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
        theme = gradio.themes.Default(font=letters, font_mono=["ui-monospace", "Consolas", "monospace"])
        return gradio.mount_gradio_app(
            app, self._build(), path="/", theme=theme, css=_STYLE, footer_links=[], run_history=False, show_error=False,
            max_file_size=self._engine.uploads.limits.max_bytes, enable_monitoring=False, pwa=False, ssr_mode=False,
            mcp_server=False,
        )  # type: ignore[no-any-return]  # fmt: skip

    def _build(self) -> Blocks:
        gradio = self._gradio
        title = " and ".join(self._models)
        blocks = gradio.Blocks(
            title=title, analytics_enabled=False, fill_width=True, delete_cache=(300, SESSION_SECONDS)
        )
        with blocks:
            session = gradio.State(None, time_to_live=SESSION_SECONDS, delete_callback=lambda _: None)
            gradio.HTML(
                paragraph(tag("b", title), ": what it says of a picture or a clip, what it saw, and where it looked"),
                elem_classes="llava-frames llava-head",
            )
            # Text of the page itself, which outlives the server: so it is known that a file was there.
            name = gradio.Textbox("", visible=False)
            with gradio.Row():
                with gradio.Column(scale=2, min_width=280):
                    file = gradio.File(label="Picture or clip: drop it here", height=150, elem_id="media")
                    asked = gradio.Textbox(
                        label="Question, or how the text begins (may be empty)",
                        lines=2,
                        max_lines=6,
                        elem_id="question",
                    )
                    with gradio.Row():
                        ask = gradio.Button("Ask", variant="primary", elem_id="ask", min_width=80)
                        stop = gradio.Button("Stop", elem_id="stop", min_width=80)
                    message = gradio.HTML(elem_id="message", elem_classes="llava-frames")
                    with gradio.Accordion("Decoding", open=False):
                        most = self._engine.limits.max_new_tokens
                        length = gradio.Slider(1, most, min(64, most), step=1, label="Longest answer, in tokens")
                        heat = gradio.Slider(0, 2, 0, step=0.1, label="Temperature (0: the likeliest token each time)")
                    sentence = gradio.Textbox(
                        label="How likely is this sentence?", lines=2, max_lines=4, elem_id="sentence"
                    )
                    score = gradio.Button("Score", elem_id="score")
                    scores = gradio.HTML(elem_id="scores", elem_classes="llava-frames")
                columns = [self._build_column(model, number) for number, model in enumerate(self._models)]
            frames = [column["frames"] for column in columns]
            answers = [
                part for column in columns for part in (column[n] for n in ("answer", "places", "tokens", "maps"))
            ]
            # The functions of the page are no interface of the server: that is the endpoint.
            own = {"api_visibility": "private"}
            file.upload(self._open, [file], [session, name, message, *frames, *answers, scores],
                        concurrency_limit=_LOADERS, preprocess=False, **own)  # fmt: skip
            file.clear(self._clear, [], [session, name, message, *frames, *answers, scores], **own)
            running = [
                trigger(self._ask, [session, name, asked, length, heat], [session, message, *answers],
                        concurrency_limit=self._engine.limits.max_batch, **own)
                for trigger in (ask.click, asked.submit)
            ]  # fmt: skip
            stop.click(None, None, None, cancels=running, **own)
            for model, column in zip(self._models, columns, strict=True):
                column["tokens"].input(self._looker(model), [session, column["tokens"]], [column["maps"]], **own)
            score.click(self._score, [session, name, asked, sentence], [scores], **own)
        blocks.queue(max_size=self._engine.limits.max_queue, api_open=False)
        return blocks  # type: ignore[no-any-return]

    def _build_column(self, model: str, number: int) -> dict[str, Any]:
        gradio = self._gradio
        with gradio.Column(scale=3, min_width=320):
            answer = gradio.Textbox(label=model, lines=3, max_lines=12, interactive=False, elem_id=f"answer{number}")
            return {
                "answer": answer,
                "places": gradio.HTML(elem_id=f"places{number}", elem_classes="llava-frames"),
                "frames": gradio.HTML(elem_id=f"frames{number}", elem_classes="llava-frames"),
                "tokens": gradio.Radio(
                    [], label="Where it looked when it wrote", visible=False, elem_id=f"tokens{number}",
                    elem_classes="llava-tokens",
                ),
                "maps": gradio.HTML(elem_id=f"maps{number}", elem_classes="llava-frames"),
            }  # fmt: skip

    # What happens. Each gives the values of its outputs, in the order of ``_build``.

    def _no_answers(self) -> list[Any]:
        tokens = self._gradio.update(choices=[], value=None, visible=False)
        return ["", "", tokens, ""] * len(self._models)

    def _nothing(self) -> list[Any]:
        """No frames, no answers and no scores."""
        return [*([""] * len(self._models)), *self._no_answers(), ""]

    def _clear(self) -> list[Any]:
        return [None, "", "", *self._nothing()]

    def _open(self, dropped: object) -> list[Any]:
        """Decode what was dropped, for each model, and delete the file.

        Args:
            dropped: what the browser says of it: where the upload lies, and its name.
        """
        given = dropped if isinstance(dropped, dict) else {}
        path, name = str(given.get("path") or ""), clean_name(str(given.get("orig_name") or given.get("path") or ""))
        if not path:
            return self._clear()
        # The browser says where: it may be anything, and Gradio does not look at it here.
        if self._folder.resolve() not in Path(path).resolve().parents:
            return [None, "", _error(UploadError(f"{name}: this is no upload")), *self._nothing()]
        session, shown = Session(), []
        try:
            kind = self._engine.uploads.find_kind(path, name)
            for model in self._models:
                session.media[model] = self._engine.load(model, [Upload(path, name, kind)])
                shown.append(_frames(shown_frames(session.media[model]), "What the model saw"))
        except ValueError as error:
            return [None, name, _error(error), *self._nothing()]
        finally:
            # With the folder that Gradio has made for it.
            shutil.rmtree(Path(path).parent, ignore_errors=True)
        return [session, name, "", *shown, *self._no_answers(), ""]

    def _request(self, model: str, session: Session | None, name: str, asked: str) -> Request:
        """What is asked of a model; a ValueError where a file was dropped that is not there any more."""
        if name and session is None:
            raise UploadError(f"{name}: {_GONE}")
        if not name and not asked.strip():
            raise UploadError("drop a picture or a clip, or write something")
        return Request(session.media.get(model, ()) if session is not None else (), escape_placeholders(asked.strip()))

    def _ask(self, session: Session | None, name: str, asked: str, length: float, heat: float) -> Iterator[list[Any]]:
        """The answers of the models, one after the other, as they grow."""
        answers = self._no_answers()
        settings = Settings(max_new_tokens=int(length), temperature=float(heat))
        session_now = session
        yield [session, "", *answers]
        try:
            requests = [self._request(model, session, name, asked) for model in self._models]
            session_now = Session(session.media if session is not None else {})
            with self._engine.admit():
                for number, (model, request) in enumerate(zip(self._models, requests, strict=True)):
                    for text, finished in self._stream(model, request, settings):
                        answers[4 * number] = text
                        if finished is not None:
                            session_now.answers[model] = finished
                            answers[4 * number + 1 : 4 * number + 4] = self._show(model, finished)
                        yield [session_now, "", *answers]
        except (ValueError, BusyError) as error:
            yield [session_now, _error(error), *answers]

    def _stream(self, model: str, request: Request, settings: Settings) -> Iterator[tuple[str, Answered | None]]:
        """The text so far, at most some times a second; the last one with the whole answer."""
        prompt, settings = self._engine.prepare(model, request, settings)
        text, shown = "", 0.0
        events = self._engine.stream(model, prompt, settings)
        try:
            for event in events:
                if isinstance(event, Failed):
                    raise UploadError(f"{model}: {event.message}")
                if isinstance(event, Done):
                    yield event.text, Answered(prompt, event)
                    return
                assert isinstance(event, Delta)
                text += event.text
                if time.monotonic() - shown > _EVERY:
                    shown = time.monotonic()
                    yield text, None
        finally:
            events.close()  # type: ignore[attr-defined]

    def _show(self, model: str, answered: Answered) -> list[Any]:
        """Boxes and spans, the tokens that can be looked into, and no heat map yet."""
        captioner, media, done = self._engine.captioners[model], answered.prompt.media, answered.done
        places: Markup | str = ""
        if not done.text:
            places = paragraph("It ended its answer without a word.", faint=True)
        elif media and captioner.vision is not None:
            picture = draw_places(done.answer, media[-1], captioner.vision)
            if picture is not None:
                places = row(figure(picture, "What the answer points at", 960))
        choices = [(_token_name(captioner, i), place) for place, i in enumerate(done.ids)] if media else []
        return [places, self._gradio.update(choices=choices, value=None, visible=bool(choices)), ""]

    def _looker(self, model: str) -> Callable[[Session | None, int | None], str]:
        """The function that shows where a model looked when it wrote a token."""

        def look(session: Session | None, token: int | None) -> str:
            answered = None if session is None else session.answers.get(model)
            if token is None:
                return ""
            if answered is None or not 0 <= int(token) < len(answered.done.ids):
                return note(BAD, "the server no longer has this answer; ask again")
            try:
                return self._engine.call(_look, self._engine.captioners[model], answered, int(token)).result()
            except (ValueError, RuntimeError) as error:
                return _error(error)

        return look

    def _score(self, session: Session | None, name: str, asked: str, sentence: str) -> str:
        """How likely each model finds a sentence, with what was dropped and without."""
        parts: list[Markup] = []
        try:
            with self._engine.admit():
                for model in self._models:
                    request = self._request(model, session, name, asked)
                    scored: Future[Likelihood] = self._engine.call(
                        score_sentence, self._engine.captioners[model], request, sentence
                    )
                    parts.append(_likelihood(scored.result(), model if len(self._models) > 1 else ""))
        except (ValueError, BusyError, RuntimeError) as error:
            return _error(error)
        return Markup("".join(parts))


# Pieces of the page.


def _error(error: Exception) -> Markup:
    """A line for people; a fault of the program goes to the log, and is said to be one."""
    if isinstance(error, BusyError | ValueError):
        return note(BAD, explain_error(error))
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return note(BAD, "the device has no memory for this")
    logger.error("the page failed", exc_info=error)
    return note(BAD, "the server failed; its log says why")


def _frames(pictures: Sequence[LabelledPicture], title: str) -> Markup:
    many = f", {len(pictures)} frames" if len(pictures) > 1 else ""
    return Markup(
        paragraph(f"{title}{many}", faint=True) + row(*(figure(one, label, _FRAME_SIDE) for one, label in pictures))
    )


def _token_name(captioner: Captioner, token: int) -> str:
    text = str(captioner.tokenizer.decode([token]))
    return text.strip() or repr(text)[1:-1].replace(" ", "␣") or "␣"


def _look(captioner: Captioner, answered: Answered, token: int) -> Markup:
    """In the model's thread: the heat maps of a token."""
    if answered.attention is None:
        answered.attention = look_again(captioner, answered.prompt, answered.done.ids)
    maps, what_is_missing = heat_maps(captioner, answered.attention, token)
    share = answered.attention.share(token)
    word = answered.attention.tokens[token].strip()
    said = f"“{word}”: {share:.0%} of the attention was on images and videos, the rest on text"
    pictures = row(*(figure(one, label, _FRAME_SIDE) for one, label in draw_heat_maps(answered.prompt.media, maps)))
    about = (
        "The mean over all layers and heads when this token was chosen, followed back to the patches. The brightest "
        "patch of all frames has the most; a model may attend to a patch for other reasons than to name what is there."
    )
    missing = note(WARNING, what_is_missing) if what_is_missing else ""
    return Markup(paragraph(said) + missing + pictures + paragraph(about, faint=True))


def _likelihood(found: Likelihood, model: str) -> Markup:
    words, blind = found.words, found.blind_words
    head = ["", "log-probability", "perplexity a word"]
    rows: list[list[object]] = [["with it" if blind else "alone", f"{found.logprob:.2f}", f"{perplexity(words):.1f}"]]
    parts = [tag("p", tag("b", model))] if model else []
    if blind is not None:
        assert found.blind_logprob is not None
        rows.append(["without it", f"{found.blind_logprob:.2f}", f"{perplexity(blind):.1f}"])
        parts.append(table(head, rows))
        gain = found.logprob - found.blind_logprob
        what = "likelier" if gain > 0 else "less likely"
        parts.append(paragraph(f"With what it was shown the sentence is {what}, by {abs(gain):.2f} nats."))
        # Words are one for one: the same sentence twice.
        parts.append(tag("p", *(_gain(*pair) for pair in zip(words, blind, strict=False))))
        parts.append(
            paragraph("Green words are likelier with it, red ones without it; hold the pointer over one.", faint=True)
        )
    else:
        parts.append(table(head, rows))
    return Markup("".join(parts))


def _gain(word: Word, blind: Word) -> Markup:
    gain = word.logprob - blind.logprob
    strength = min(abs(gain) / 3, 1.0)
    # From paper to green or red.
    red, green, blue = (52, 168, 83) if gain > 0 else (234, 67, 53)
    colour = "#" + "".join(f"{round(250 + (channel - 250) * strength):02x}" for channel in (red, green, blue))
    return mark(word.text, colour, f"{word.logprob:.2f} with it, {blind.logprob:.2f} without")
