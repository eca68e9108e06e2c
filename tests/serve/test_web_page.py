"""The page in a browser: skipped where there is no Gradio, no Playwright or no Chromium (``make install-web``)."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from fond import Fond
from test_web_engine import make_captioner
from transformers import LogitsProcessorList

from llava.serve.generate import Captioner
from llava.serve.web.engine import Engine, Job, QueueLimits
from llava.serve.web.server import RunningServer, ServerOptions, build_app
from llava.serve.web.uploads import UploadLimits, Uploads

for package in ("gradio", "fastapi", "uvicorn", "playwright"):
    pytest.importorskip(package, reason=f"the page's test needs {package}: make install-web")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
if CHROMIUM is None:
    pytest.skip("the page's test needs Chromium (apt-get install chromium)", allow_module_level=True)

WAIT = 120_000
LIMITS = UploadLimits(max_upload_mb=1, decode_timeout=60)


@pytest.fixture(scope="module")
def captioners(load_tiny) -> dict[str, Captioner]:
    grounded = make_captioner(load_tiny, grounding="lape", num_temporal_tokens=21, num_spatial_tokens=41)
    brackets = [grounded.tokenizer.convert_tokens_to_ids("[")]
    generate = grounded.answer_prompts

    def with_boxes(prompts, room, sub_bin, options):
        fond = LogitsProcessorList([Fond(brackets, 30.0), *options["logits_processor"]])
        return generate(prompts, room, sub_bin, {**options, "logits_processor": fond})

    grounded.answer_prompts = with_boxes
    return {"plain": make_captioner(load_tiny), "grounded": grounded}


@contextmanager
def serve(captioners: dict[str, Captioner], port: int = 0, **options) -> Iterator[tuple[str, Engine]]:
    from llava.serve.web.page import Page

    engine = Engine(captioners, Uploads(LIMITS), QueueLimits(max_new_tokens=24))
    app, endpoint = build_app(engine, ServerOptions(**options), Page(engine).add_to)
    with RunningServer(app, port=port) as server:
        yield server.url, engine
    endpoint.close()
    engine.close()


@pytest.fixture(scope="module")
def server(captioners):
    with serve(captioners) as running:
        yield running


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def open_tab(browser) -> Iterator[Callable]:
    """A function that opens the page in a tab of its own, and records whom it asks."""
    contexts = []

    def open_tab(url: str):
        contexts.append(browser.new_context())
        tab = contexts[-1].new_page()
        tab.set_default_timeout(WAIT)
        tab.asked = set()
        tab.on("request", lambda request: tab.asked.add(urlsplit(request.url).netloc))
        tab.goto(url)
        tab.wait_for_selector("#ask")
        tab.wait_for_selector("#media input[type=file]", state="attached")
        tab.wait_for_timeout(1000)
        return tab

    yield open_tab
    for context in contexts:
        context.close()


def drop(tab, path: Path, expected: str = "#frames0 img") -> None:
    tab.set_input_files("#media input[type=file]", str(path))
    tab.wait_for_selector(f"{expected}, #message .note")
    assert tab.locator(expected).count(), tab.inner_text("#message")


def answer_of(tab, number: int = 0) -> str:
    return tab.input_value(f"#answer{number} textarea")


def test_a_clip_is_captioned_and_looked_into(
    server, open_tab, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = Job.take

    def take_slowly(job, token) -> None:
        time.sleep(0.1)
        take(job, token)

    url, engine = server
    clips = [path for path in (shared_data / "video").rglob("*") if path.suffix in (".mp4", ".webm", ".mkv")]
    clip = min(clips, key=lambda path: path.stat().st_size)
    tab = open_tab(url)
    drop(tab, clip)
    labels = tab.locator("#frames0 figcaption").all_inner_texts()
    assert len(labels) == 3
    assert labels[0] == "0.00 s"
    assert tab.locator("#frames1 img").count() == 3
    # The upload is gone as soon as it is decoded.
    assert [path for path in engine.uploads.folder.rglob("*") if path.is_file()] == []
    monkeypatch.setattr(Job, "take", take_slowly)
    tab.click("#ask")
    told = []
    while not tab.locator("#tokens1 label").count():
        if answer_of(tab) not in told[-1:]:
            told.append(answer_of(tab))
        tab.wait_for_timeout(20)
    assert len(told) > 3, "the answer streams in"
    assert told[-1].startswith(told[-2])
    tab.locator("#tokens0 label").nth(1).click()
    tab.wait_for_selector("#maps0 img")
    assert tab.locator("#maps0 img").count() == 3
    assert "of the attention was on images and videos" in tab.inner_text("#maps0")
    # The grounded model points, and its boxes are drawn.
    assert "[0." in answer_of(tab, 1)
    assert tab.locator("#places1 img").count() == 1
    assert tab.locator("#places0 img").count() == 0
    tab.fill("#sentence textarea", "Una ragazza <b>unisce</b> le mani")
    tab.click("#score")
    tab.wait_for_selector("#scores table")
    scores = tab.inner_text("#scores")
    assert scores.count("without it") >= 2
    assert "<b>unisce</b>" in scores, "what is typed is text"
    assert tab.asked == {urlsplit(url).netloc}, "nobody else is asked"


def test_files_that_cannot_be_used_are_named(server, open_tab, media_dir: Path, tmp_path: Path) -> None:
    tab = open_tab(server[0])
    clip = (media_dir / "a.mp4").read_bytes()
    for name, data, message in (
        ("half.mp4", clip[: len(clip) // 2], "half.mp4: "),
        ("cat.png", clip, "cat.png: its name says that it is an image, but its content is a video"),
        ("page.mp4", b"<script>alert(1)</script>", "page.mp4: its content is no video of a kind that is read"),
    ):
        (tmp_path / name).write_bytes(data)
        drop(tab, tmp_path / name, f"#message .note:has-text('{name}')")
        assert message in tab.inner_text("#message")
        assert str(server[1].uploads.folder) not in tab.inner_text("#message")
        assert tab.locator("#frames0 img").count() == 0
        tab.click("#media button[aria-label='Clear'], #media button[aria-label='Remove this file']", force=True)
        tab.wait_for_selector("#message .note", state="detached")
    (tmp_path / "large.mp4").write_bytes(bytes(2**20 + 1000))
    tab.set_input_files("#media input[type=file]", str(tmp_path / "large.mp4"))
    tab.wait_for_selector("text=/exceed|larger|maximum/i")


def test_two_tabs_keep_apart(server, open_tab, media_dir: Path) -> None:
    first, second = open_tab(server[0]), open_tab(server[0])
    drop(first, media_dir / "a.mp4")
    drop(second, media_dir / "a.png")
    second.fill("#question textarea", "Una ragazza")
    first.click("#ask")
    second.click("#ask")
    for tab, frames in ((first, 3), (second, 1)):
        tab.wait_for_selector("#tokens0 label")
        assert tab.locator("#frames0 img").count() == frames
    assert answer_of(first) != answer_of(second)


def test_a_server_that_is_started_anew(captioners, open_tab, media_dir: Path) -> None:
    plain = {"plain": captioners["plain"]}
    with serve(plain) as (url, _):
        tab = open_tab(url)
        drop(tab, media_dir / "a.png")
        tab.click("#ask")
        tab.wait_for_selector("#tokens0 label")
        before = answer_of(tab)
    with serve(plain, int(urlsplit(url).port)):
        tab.click("#ask")
        # The old tab is not answered as if nothing had been dropped.
        tab.wait_for_selector("#message .note, .toast-body")
        assert answer_of(tab) in ("", before)
        tab.reload()
        tab.wait_for_selector("#ask")
        drop(tab, media_dir / "a.png")
        tab.click("#ask")
        tab.wait_for_selector("#tokens0 label")
        assert answer_of(tab) == before


def test_a_token_opens_the_page(captioners, browser, media_dir: Path) -> None:
    with serve({"plain": captioners["plain"]}, token="a-token-that-nobody-guesses") as (url, _):
        context = browser.new_context()
        tab = context.new_page()
        tab.set_default_timeout(WAIT)
        tab.goto(url)
        assert tab.locator("#ask").count() == 0
        tab.fill("input[name=token]", "wrong-token")
        tab.click("button")
        tab.wait_for_selector("text=This is not the token.")
        tab.fill("input[name=token]", "a-token-that-nobody-guesses")
        tab.click("button")
        tab.wait_for_selector("#ask")
        drop(tab, media_dir / "a.png")
        tab.click("#ask")
        tab.wait_for_selector("#tokens0 label")
        context.close()
