"""The OpenAI-compatible endpoint over a real socket: answers, streams, uploads, limits and errors."""

from __future__ import annotations

import base64
import http.client
import json
import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from test_web_engine import make_captioner

from llava.serve.generate import Captioner, Request
from llava.serve.web import remote
from llava.serve.web.engine import Engine, QueueLimits
from llava.serve.web.server import RunningServer, ServerOptions, build_app
from llava.serve.web.uploads import UploadError, UploadLimits, Uploads, UploadTooLargeError
from llava.types import Media

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason=f"the endpoint needs {package}: the extra web")

TOKEN = "a-token-that-nobody-guesses"
LIMITS = UploadLimits(max_upload_mb=1, decode_timeout=60, max_media=2)


class Client:
    """Requests without a client library, so that what is sent is what the test says."""

    def __init__(self, url: str) -> None:
        self.host = urlsplit(url).netloc

    def ask(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict[str, str], bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=60)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        kind = {"Content-Type": "application/json"} if data is not None else {}
        connection.request(method, path, data, {**kind, **names})
        answer = connection.getresponse()
        found = answer.status, dict(answer.getheaders()), answer.read()
        connection.close()
        return found

    def json(self, method: str, path: str, body: object = None, **headers: str) -> tuple[int, dict]:
        status, _, data = self.ask(method, path, body, **headers)
        return status, json.loads(data)

    def chat(self, *content: object, **more: object) -> tuple[int, dict]:
        messages = [{"role": "user", "content": list(content)}]
        return self.json("POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, **more})


@pytest.fixture(scope="module")
def captioner(load_tiny) -> Captioner:
    return make_captioner(load_tiny)


@pytest.fixture(scope="module")
def serve(captioner: Captioner):
    """A function that serves the tiny model on a free port."""
    running: list = []

    def start(queue: QueueLimits | None = None, **options) -> tuple[Client, Engine]:
        engine = Engine({"tiny": captioner, "other": captioner}, Uploads(LIMITS), queue or QueueLimits(), gather=0.2)
        app, endpoint = build_app(engine, ServerOptions(**options))
        server = RunningServer(app).__enter__()
        running.append((server, endpoint, engine))
        return Client(server.url), engine

    yield start
    for server, endpoint, engine in running:
        server.__exit__()
        endpoint.close()
        engine.close()


@pytest.fixture(scope="module")
def client(serve) -> Client:
    return serve()[0]


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def data_url(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def image(path: Path) -> dict:
    return {"type": "image_url", "image_url": {"url": data_url(path, "image/png")}}


def events(data: bytes) -> Iterator[dict | str]:
    for block in data.decode().strip().split("\n\n"):
        value = block.removeprefix("data: ")
        yield value if value == "[DONE]" else json.loads(value)


def test_an_answer_is_the_captioners(client: Client, captioner: Captioner, media_dir: Path) -> None:
    # The words first, as clients send them: training had the picture first, and so has the prompt.
    status, answer = client.chat(text("Un uomo"), image(media_dir / "a.png"), max_tokens=12)
    assert status == 200, answer
    request = Request([Media("image", str(media_dir / "a.png"))], "Un uomo")
    (expected,) = captioner.answer([request], max_new_tokens=12)
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": str(expected), "refusal": None}
    assert choice["finish_reason"] in ("stop", "length")
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(captioner.prompts.write(request).ids)
    assert 0 < usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert answer["llava"]["frame_times"] == [[0.0]]
    video = {"type": "video_url", "video_url": {"url": data_url(media_dir / "a.mp4", "video/mp4")}}
    status, answer = client.chat(video, max_completion_tokens=4)
    assert (status, answer["llava"]["frame_times"]) == (200, [[0.0, 0.75, 1.375]])


def test_a_stream_tells_the_same(client: Client, media_dir: Path) -> None:
    asked = (text("Un uomo"), image(media_dir / "a.png"))
    _, whole = client.chat(*asked, max_tokens=12)
    messages = [{"role": "user", "content": list(asked)}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 12, "stream": True}
    _, headers, data = client.ask("POST", "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    assert headers["content-type"].startswith("text/event-stream")
    *chunks, last, usage, done = events(data)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    told = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert told == whole["choices"][0]["message"]["content"]
    assert last["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert last["llava"] == whole["llava"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert {chunk["id"] for chunk in [*chunks, last, usage]} == {last["id"]}


def test_eight_at_once_are_batched_and_none_is_mixed_up(serve, captioner: Captioner) -> None:
    client, engine = serve()
    words = ["Un uomo", "Una ragazza", "Il gatto", "una stella", "Un ragazzo", "il cane", "la strada", "sul divano"]
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda asked: client.chat(text(asked), max_tokens=8), words))
    expected = [str(captioner.answer([Request([], asked)], max_new_tokens=8)[0]) for asked in words]
    assert [answer["choices"][0]["message"]["content"] for _, answer in found] == expected
    assert sum(engine.batch_sizes) == 8
    assert max(engine.batch_sizes) > 2


def test_uploaded_files(client: Client, media_dir: Path) -> None:
    status, stored = upload(client, "a.png", (media_dir / "a.png").read_bytes())
    assert (status, stored["filename"], stored["purpose"]) == (200, "a.png", "vision")
    by_id = {"type": "file", "file": {"file_id": stored["id"]}}
    _, direct = client.chat(image(media_dir / "a.png"), max_tokens=6)
    for _ in range(2):  # It stays for the next request.
        _, answer = client.chat(by_id, max_tokens=6)
        assert answer["choices"] == direct["choices"]
    assert client.json("GET", "/v1/files")[1]["data"] == [stored]
    assert client.json("GET", f"/v1/files/{stored['id']}") == (200, stored)
    assert client.json("DELETE", f"/v1/files/{stored['id']}")[1]["deleted"] is True
    status, answer = client.chat(by_id)
    assert (status, answer["error"]["code"]) == (404, "file_not_found")
    assert answer["error"]["param"] == "messages[0].content[0].file.file_id"


def upload(client: Client, name: str, data: bytes) -> tuple[int, dict]:
    head = f'--x\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    purpose = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nvision\r\n'
    body = purpose + head + data + b"\r\n--x--\r\n"
    return client.json("POST", "/v1/files", body, Content_Type="multipart/form-data; boundary=x")


def test_models(client: Client) -> None:
    status, listed = client.json("GET", "/v1/models")
    assert (status, [model["id"] for model in listed["data"]]) == (200, ["tiny", "other"])
    status, model = client.json("GET", "/v1/models/other")
    assert (status, model["id"], model["llava"]) == (200, "other", {"context": 512, "sees": True, "tells_boxes": False})
    status, answer = client.json("GET", "/v1/models/none")
    assert (status, answer["error"]["code"]) == (404, "model_not_found")
    status, answer = client.chat(text("Un uomo"), model="none")
    assert (status, answer["error"]["param"]) == (404, "model")
    assert answer["error"]["message"] == "there is no model 'none'; there is tiny, other"


PIXEL = "data:image/png;base64,iVBORw0KGgo="


@pytest.mark.parametrize(
    ("body", "message", "param"),
    [
        (b"{", "the request is not JSON", None),
        ([1], "must be a JSON object", None),
        ({"messages": []}, "model must be a text", "model"),
        ({"messages": []} | {"model": "tiny"}, "at least one message", "messages"),
        ({"temprature": 1}, "unknown field 'temprature'", "temprature"),
        ({"n": 2}, "n is 2, which this server does not do; leave it out", "n"),
        ({"logprobs": True}, "does not do", "logprobs"),
        ({"response_format": {"type": "json_object"}}, "does not do", "response_format"),
        ({"max_tokens": 0}, "max_tokens is 0; it must be from 1 to 512", "max_tokens"),
        ({"max_tokens": 10**9}, "from 1 to 512", "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "give one", "max_tokens"),
        ({"temperature": float("nan")}, "temperature must be a number", "temperature"),
        ({"temperature": 3}, "from 0 to 2", "temperature"),
        ({"top_p": 0}, "above 0", "top_p"),
        ({"seed": "a"}, "seed must be a whole number", "seed"),
        ({"stop": ["a"] * 5}, "up to 4", "stop"),
        ({"stream": "yes"}, "stream must be true or false", "stream"),
        ({"stream_options": {}}, "requests with stream", "stream_options"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role is 'tool'; known: system", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must be the user's", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
         "known: text, image_url", "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "<im_patch> x"}]},
         "'<im_patch>', which only", "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
         "no data: address", "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}]},
         "no data: address", "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}]}]},
         "not fetched; send the file as a data: address", "messages[0].content[0].image_url"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}]},
         "image.png: cannot be read as an image", None),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}] * 3}]},
         "has 3 images and videos, but at most 2", "messages"),
        ({"messages": [{"role": "user", "content": "il gatto " * 400}]}, "but the context of tiny is 512", None),
    ],
)  # fmt: skip
def test_what_cannot_be_meant(client: Client, body: object, message: str, param: str | None) -> None:
    if isinstance(body, dict) and "model" not in body:
        given = {"model": "tiny", "messages": [{"role": "user", "content": "Un uomo"}]}
        body = body if body == {"messages": []} else {**given, **body}
    status, answer = client.json("POST", "/v1/chat/completions", body)
    assert status == 400, answer
    error = answer["error"]
    assert message in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_disguised_and_broken_files(client: Client, media_dir: Path) -> None:
    clip, picture = media_dir / "a.mp4", media_dir / "a.png"
    status, answer = client.chat({"type": "image_url", "image_url": {"url": data_url(clip, "image/png")}})
    assert status == 400
    assert "its name says that it is an image, but its content is a video" in answer["error"]["message"]
    status, answer = client.chat({"type": "video_url", "video_url": {"url": data_url(picture, "application/x-y")}})
    assert (status, "of another kind: image" in answer["error"]["message"]) == (400, True)
    status, answer = upload(client, "cat.mp4", b"<html>")
    assert (status, answer["error"]["message"][:35]) == (400, "cat.mp4: its content is no video of")
    half = clip.read_bytes()[: clip.stat().st_size // 2]
    status, stored = upload(client, "half.mp4", half)
    if status == 200:
        status, stored = client.chat({"type": "file", "file": {"file_id": stored["id"]}})
    assert status == 400
    assert stored["error"]["message"].startswith("half.mp4: ")
    status, answer = client.json("POST", "/v1/files", b"x", Content_Type="text/plain")
    assert (status, answer["error"]["param"]) == (400, "file")


def test_what_is_too_large(client: Client) -> None:
    status, answer = client.chat(text("x" * 3 * 2**20))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    large = base64.b64encode(bytes(2**20 + 3)).decode()
    status, answer = client.chat({"type": "image_url", "image_url": {"url": f"data:image/png;base64,{large}"}})
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    status, answer = upload(client, "a.png", bytes(2**20 + 3))
    assert (status, answer["error"]["code"]) == (413, "request_too_large")
    connection = http.client.HTTPConnection(client.host, timeout=60)
    connection.request("POST", "/v1/chat/completions", iter([b"{}"]), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 411
    connection.close()


def test_a_full_queue_is_status_429(serve) -> None:
    client, engine = serve(QueueLimits(max_queue=1))
    with engine.admit():
        status, headers, data = client.ask(
            "POST", "/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
        )
    assert (status, json.loads(data)["error"]["code"], headers["retry-after"]) == (429, "rate_limit_exceeded", "2")
    assert client.chat(text("x"), max_tokens=1)[0] == 200


def test_a_client_that_leaves_frees_its_place(serve) -> None:
    client, _ = serve(QueueLimits(max_queue=1))
    for stream in (True, False):
        connection = http.client.HTTPConnection(client.host, timeout=60)
        body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 490, "stream": stream}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        if stream:
            connection.getresponse().read(20)
        time.sleep(0.1)
        connection.sock.close()
        connection.close()
        deadline = time.monotonic() + 20
        while client.chat(text("x"), max_tokens=1)[0] == 429:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_nothing_is_left_of_a_request(serve, media_dir: Path) -> None:
    client, engine = serve()
    client.chat(image(media_dir / "a.png"), max_tokens=1)
    client.chat({"type": "image_url", "image_url": {"url": PIXEL}})
    assert list(engine.uploads.folder.iterdir()) == []


def test_conversations(client: Client, captioner: Captioner) -> None:
    messages = [
        {"role": "system", "content": "Il cane"}, {"role": "user", "content": "Un uomo"},
        {"role": "assistant", "content": "una stella"}, {"role": "user", "content": "Il gatto"},
    ]  # fmt: skip
    status, answer = client.json(
        "POST", "/v1/chat/completions", {"model": "tiny", "messages": messages, "max_tokens": 4}
    )
    assert status == 200
    (expected,) = captioner.answer([Request([], "Il cane Un uomo una stella Il gatto")], max_new_tokens=4)
    assert answer["choices"][0]["message"]["content"] == str(expected)


# Who may ask.


def test_local_servers_answer_local_requests_alone(client: Client) -> None:
    assert client.json("GET", "/v1/models", Host="localhost:1")[0] == 200
    status, answer = client.json("GET", "/v1/models", Host="evil.example")
    assert (status, answer["error"]["code"]) == (403, "wrong_host")
    status, answer = client.json("GET", "/v1/models", Origin="https://evil.example")
    assert (status, answer["error"]["code"]) == (403, "wrong_origin")
    assert client.json("GET", "/v1/models", Origin=f"http://{client.host}")[0] == 200
    status, headers, _ = client.ask("GET", "/v1/models")
    assert "default-src 'self'" in headers["content-security-policy"]
    assert "server" not in headers
    status, answer = client.json("GET", "/v1/engines")
    assert (status, answer["error"]["code"]) == (404, "unknown_url")


def test_a_token_is_asked_for_and_never_logged(serve, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client, _ = serve(token=TOKEN)
        status, answer = client.json("GET", "/v1/models")
        assert (status, answer["error"]["code"]) == (401, "invalid_api_key")
        assert client.json("GET", "/v1/models", Authorization="Bearer wrong")[0] == 401
        assert client.json("GET", "/v1/models", Authorization=f"Bearer {TOKEN}", Host="any.example")[0] == 200
        assert client.json("GET", f"/v1/models?token={TOKEN}")[0] == 401
        status, _, page = client.ask("GET", "/", Accept="text/html")
        assert (status, b'name="token"' in page) == (401, True)
        form = {"Content_Type": "application/x-www-form-urlencoded"}
        assert client.ask("POST", "/login", b"token=wrong", **form)[0] == 401
        status, headers, _ = client.ask("POST", "/login", f"token={TOKEN}".encode(), **form)
        assert (status, headers["location"]) == (303, "/")
        cookie = headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=Strict" in cookie
        assert TOKEN not in cookie
        assert client.json("GET", "/v1/models", Cookie=cookie.partition(";")[0])[0] == 200
        assert client.json("GET", "/v1/models", Cookie="llava_session=wrong")[0] == 401
    assert "GET /v1/models 200" in caplog.text
    assert TOKEN not in caplog.text
    assert "wrong token" in caplog.text


def test_the_log_has_no_content(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        client.chat(text("un segreto"), max_tokens=1)
        client.ask("GET", "/v1/a%0Ab?key=segreto")
        deadline = time.monotonic() + 10
        while "404" not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.05)
    assert "segreto" not in caplog.text
    assert r"GET /v1/a\nb 404" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "--host 0.0.0.0 lets others reach the server"),
        ({"share": True}, "--share lets others reach the server"),
        ({"token": "short"}, "5 characters; it must have at least 8"),
        ({"port": 70000}, "--port is 70000"),
    ],
)
def test_servers_that_strangers_could_use(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ServerOptions(**options).check()
    ServerOptions("0.0.0.0", token=TOKEN).check()


# Addresses of the web.


def test_private_addresses_are_not_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    for host in ("127.0.0.1", "localhost", "[::1]", "169.254.169.254", "10.0.0.1", "192.168.1.1", "[::ffff:10.0.0.1]",
                 "[64:ff9b::a00:1]", "[fe80::1]", "0.0.0.0", "2130706433", "0x7f.1"):  # fmt: skip
        with pytest.raises(UploadError, match=r"private or special network|no such host|cannot be fetched"):
            remote.fetch(f"http://{host}/a.png", 10)
    for url in ("ftp://a.example/b", "http://user:secret@a.example/", "http://a.example:99999/", "http:///x"):
        with pytest.raises(UploadError):
            remote.fetch(url, 10)
    assert remote.is_public("8.8.8.8")
    assert remote.is_public("2606:4700:4700::1111")
    # One private address among public ones is enough.
    found = [(0, 0, 0, "", ("8.8.8.8", 80)), (0, 0, 0, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(remote.socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(UploadError, match="private"):
        remote.find_public_address("a.example", 80)


def test_what_is_fetched_is_limited(serve, media_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            away = {"/away": "http://127.0.0.2/x.png", "/loop": "/loop", "/moved": "/a.png"}.get(self.path)
            self.send_response(302 if away else 404 if self.path.startswith("/none") else 200)
            if away:
                self.send_header("Location", away)
            self.end_headers()
            if self.path in ("/a.png", "/a.png?key=secret"):
                self.wfile.write((media_dir / "a.png").read_bytes())

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    monkeypatch.setattr(remote, "is_public", lambda address: address == "127.0.0.1")
    base = f"http://127.0.0.1:{web.server_port}"
    expected = (media_dir / "a.png").read_bytes()
    assert remote.fetch(f"{base}/moved", 10**6) == (expected, "/a.png")
    with pytest.raises(UploadTooLargeError):
        remote.fetch(f"{base}/a.png", 100)
    for path, message in (("away", "private"), ("loop", "redirects more than"), ("none", "status 404")):
        with pytest.raises(UploadError, match=message):
            remote.fetch(f"{base}/{path}?key=secret" if path == "none" else f"{base}/{path}", 10**6)
    client, _ = serve(allow_remote_urls=True)
    part = {"type": "image_url", "image_url": {"url": f"{base}/a.png?key=secret"}}
    status, answer = client.chat(part, max_tokens=3)
    assert (status, answer["llava"]["frame_times"]) == (200, [[0.0]])
    web.shutdown()
    web.server_close()


# OpenAI's own client.


def test_openais_client(client: Client, media_dir: Path) -> None:
    openai = pytest.importorskip("openai", reason="its client is not installed")
    asked = openai.OpenAI(base_url=f"http://{client.host}/v1", api_key="none", max_retries=0)
    assert [model.id for model in asked.models.list()] == ["tiny", "other"]
    stored = asked.files.create(file=media_dir / "a.mp4", purpose="vision")
    content = [text("Un uomo"), {"type": "file", "file": {"file_id": stored.id}}]
    messages = [{"role": "user", "content": content}]
    whole = asked.chat.completions.create(model="tiny", messages=messages, max_tokens=12)
    stream = asked.chat.completions.create(model="tiny", messages=messages, max_tokens=12, stream=True)
    told = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert told == whole.choices[0].message.content
    with ThreadPoolExecutor(8) as threads:
        ask = lambda _: asked.chat.completions.create(model="tiny", messages=messages, max_tokens=12)  # noqa: E731
        answers = list(threads.map(ask, range(8)))
    assert {answer.choices[0].message.content for answer in answers} == {told}
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        asked.chat.completions.create(model="none", messages=messages)
    with pytest.raises(openai.BadRequestError, match="n is 3"):
        asked.chat.completions.create(model="tiny", messages=messages, n=3)
    with pytest.raises(openai.APIStatusError, match="at most 1 are taken") as caught:
        asked.files.create(file=("a.png", bytes(2**20 + 1)), purpose="vision")
    assert caught.value.status_code == 413
    assert asked.files.delete(stored.id).deleted


def _said(words: object = "Un uomo", **more: object) -> dict:
    return {"model": "tiny", "messages": [{"role": "user", "content": words}], "max_tokens": 2, **more}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (_said(temperature=10**400), "temperature"),
        (_said(max_tokens=10**400), "max_tokens"),
        (_said(seed=-(10**400)), "seed"),
        ({"model": "tiny", "messages": [{"role": [], "content": "a"}]}, "messages[0].role"),
        ({"model": "tiny", "messages": [{"role": {}, "content": "a"}]}, "messages[0].role"),
        (_said("a\ud800b"), "messages[0].content"),
        (_said(**{"a\ud800": 1}), "a\ud800"),
    ],
)
def test_odd_values_are_the_requests_fault(client: Client, body: dict, param: str) -> None:
    status, answer = client.json("POST", "/v1/chat/completions", body)
    assert (status, answer["error"]["param"]) == (400, param), answer
    assert len(answer["error"]["message"]) < 300


def test_an_origin_that_cannot_be_read_is_another_pages(client: Client) -> None:
    status, answer = client.json("GET", "/v1/models", Origin="http://[::1")
    assert (status, answer["error"]["code"]) == (403, "wrong_origin")


@pytest.mark.parametrize("names", [("Content-Length", "Transfer-Encoding"), ("Transfer-Encoding", "Content-Length")])
def test_no_body_in_blocks_gets_around_the_limit(client: Client, names: tuple[str, str]) -> None:
    values = {"Content-Length": "5", "Transfer-Encoding": "chunked"}
    connection = http.client.HTTPConnection(client.host, timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    for name in names:
        connection.putheader(name, values[name])
    connection.putheader("Content-Type", "application/json")
    connection.endheaders()
    data = json.dumps(_said()).encode()
    connection.send(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))
    assert connection.getresponse().status == 411
    connection.close()
