"""The OpenAI-compatible endpoint: ``/v1/chat/completions``, ``/v1/models`` and ``/v1/files``.

Handlers are coroutines; what takes long (fetching, decoding, writing prompts) runs in a few threads of their own, and
tokens come from the model's thread. A request has its place in the queue from before its media are decoded until its
answer is sent or nobody waits for it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from llava.data.images import is_picture_file
from llava.serve.generate import Request
from llava.serve.web.chat import Chat, ChatError, MediaPart, parse_chat
from llava.serve.web.engine import BusyError, Delta, Done, Engine, Event, Failed, UnknownModelError
from llava.serve.web.guard import Receive, Scope, Send, error_body
from llava.serve.web.remote import fetch
from llava.serve.web.uploads import FileStore, StoredFile, Upload, UploadError, UploadTooLargeError, read_data_url

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response
    from starlette.routing import Route

logger = logging.getLogger(__name__)

T = TypeVar("T")
_DECODERS = 4
_POLL = 0.5
"""Seconds after which it is looked whether somebody still waits."""
_RETRY_SECONDS = "2"


@dataclass
class ApiError(Exception):
    """An error as OpenAI's API has it."""

    status: int
    message: str
    kind: str = "invalid_request_error"
    code: str | None = None
    param: str | None = None


def to_api_error(error: Exception) -> ApiError:
    """What a client is told of an error of this library."""
    if isinstance(error, ApiError):
        return error
    message = str(error)
    if isinstance(error, BusyError):
        return ApiError(429, message, "rate_limit_error", "rate_limit_exceeded")
    if isinstance(error, UnknownModelError):
        return ApiError(404, message, code="model_not_found", param="model")
    if isinstance(error, UploadTooLargeError):
        return ApiError(413, message, code="request_too_large")
    if isinstance(error, ChatError):
        return ApiError(400, message, code=error.code, param=error.param)
    return ApiError(400, message)


class _Stream:
    """An ASGI response of server-sent events; ``close`` is called however it ends, and if it never begins."""

    def __init__(self, chunks: AsyncIterator[str], close: Callable[[], None]) -> None:
        self._chunks, self._close = chunks, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        from starlette.responses import StreamingResponse

        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        try:
            response = StreamingResponse(self._chunks, media_type="text/event-stream", headers=headers)
            await response(scope, receive, send)
        finally:
            self._close()


class Endpoint:
    """The handlers; ``add_to`` puts them into an application.

    Args:
        engine: that answers.
        allow_remote_urls: whether media at addresses of the web are fetched.
    """

    def __init__(self, engine: Engine, allow_remote_urls: bool = False) -> None:
        self._engine, self._allow_remote_urls = engine, allow_remote_urls
        self._files = FileStore(engine.uploads)
        self._threads = ThreadPoolExecutor(_DECODERS, "request")
        self._created = int(time.time())

    def add_to(self, app: Starlette) -> None:
        """Add routes, and errors in OpenAI's form for everything under ``/v1``."""
        app.router.routes.extend(self._routes())
        app.add_exception_handler(ApiError, self._tell_error)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _routes(self) -> list[Route]:
        from starlette.routing import Route

        handlers = [
            ("/v1/models", self._list_models, "GET"),
            ("/v1/models/{model:path}", self._get_model, "GET"),
            ("/v1/chat/completions", self._complete, "POST"),
            ("/v1/files", self._list_files, "GET"),
            ("/v1/files", self._upload, "POST"),
            ("/v1/files/{file_id}", self._get_file, "GET"),
            ("/v1/files/{file_id}", self._delete_file, "DELETE"),
        ]
        routes = [Route(path, partial(self._answer, handler), methods=[method]) for path, handler, method in handlers]
        every = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        return [*routes, Route("/v1/{path:path}", partial(self._answer, self._say_unknown), methods=every)]

    async def _answer(self, handler: Callable[[HttpRequest], Any], request: HttpRequest) -> Any:
        """Run a handler; what is the request's fault becomes an error for the client."""
        try:
            return await handler(request)
        except (ValueError, BusyError) as error:
            raise to_api_error(error) from error

    async def _tell_error(self, request: HttpRequest, error: Exception) -> Response:
        from starlette.responses import Response as Answer

        assert isinstance(error, ApiError)
        body = error_body(error.message, error.kind, error.code, error.param)
        headers = {"Retry-After": _RETRY_SECONDS} if error.status == 429 else {}
        return Answer(body, error.status, headers, "application/json")

    async def _in_thread(self, function: Callable[..., T], *args: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    # Models and files.

    async def _say_unknown(self, request: HttpRequest) -> Response:
        raise ApiError(
            404, f"there is no {request.method} {request.url.path[:80]} here; there is /v1/chat/completions, "
            "/v1/models and /v1/files", code="unknown_url",
        )  # fmt: skip

    async def _list_models(self, request: HttpRequest) -> Response:
        return _json({"object": "list", "data": [self._describe(model) for model in self._engine.captioners]})

    async def _get_model(self, request: HttpRequest) -> Response:
        model = request.path_params["model"]
        self._engine.captioner(model)
        return _json(self._describe(model))

    def _describe(self, model: str) -> dict[str, object]:
        captioner = self._engine.captioners[model]
        is_grounded = captioner.syntax is not None
        about = {"context": captioner.context, "sees": captioner.vision is not None, "tells_boxes": is_grounded}
        return {"id": model, "object": "model", "created": self._created, "owned_by": "llava", "llava": about}

    async def _list_files(self, request: HttpRequest) -> Response:
        files = [_describe_file(stored) for stored in self._files.list()]
        return _json({"object": "list", "data": files, "has_more": False})

    async def _get_file(self, request: HttpRequest) -> Response:
        return _json(_describe_file(self._find_file(request.path_params["file_id"])))

    async def _delete_file(self, request: HttpRequest) -> Response:
        file_id = request.path_params["file_id"]
        self._find_file(file_id)
        return _json({"id": file_id, "object": "file", "deleted": self._files.delete(file_id)})

    def _find_file(self, file_id: str, param: str | None = None) -> StoredFile:
        stored = self._files.get(file_id)
        if stored is None:
            raise ApiError(
                404, f"there is no file {file_id!r:.80}; files are kept for an hour", code="file_not_found", param=param
            )
        return stored

    async def _upload(self, request: HttpRequest) -> Response:
        from starlette.datastructures import UploadFile
        from starlette.exceptions import HTTPException

        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise ApiError(400, "a file comes as multipart/form-data with the field file", param="file")
        try:
            async with request.form(max_files=1, max_fields=8) as form:
                file = form.get("file")
                if not isinstance(file, UploadFile):
                    raise ApiError(400, "the form has no file in its field file", param="file")
                data = await file.read()
        except HTTPException as error:
            raise ApiError(400, str(error.detail), param="file") from error
        return _json(_describe_file(await self._in_thread(self._files.add, data, file.filename or "")))

    # Answers.

    async def _complete(self, request: HttpRequest) -> Any:
        """``POST /v1/chat/completions``."""
        if "json" not in request.headers.get("content-type", ""):
            raise ApiError(400, "the request must come as application/json")
        try:
            body = json.loads(await request.body())
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the request is not JSON: {error}") from error
        chat = parse_chat(body, self._engine.limits.max_new_tokens)
        self._engine.captioner(chat.model)  # Before anything is decoded for it.
        places = ExitStack()
        try:
            places.enter_context(self._engine.admit())
            answer = await self._begin(chat, places)
            if not chat.stream:
                return _json(await answer.wait(request))
            # Before the status is sent: what fails at once is an error, not a stream.
            first = await answer.next()
            if isinstance(first, Failed):
                raise _failure(first)
            return _Stream(answer.chunks(first, chat.include_usage), places.pop_all().close)
        finally:
            places.close()

    async def _begin(self, chat: Chat, places: ExitStack) -> _Running:
        """Decode, and put into the queue; leaving ``places`` cancels it."""
        prompt, settings, frames = await self._in_thread(self._prepare, chat)
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def tell(event: Event) -> None:
            # From the model's thread; a server that stops has no loop any more.
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        job = self._engine.submit(chat.model, prompt, settings, tell)
        places.callback(job.cancel)
        return _Running(chat.model, len(prompt.ids), frames, events)

    def _prepare(self, chat: Chat) -> tuple[Any, Any, list[list[float]]]:
        """In a thread: the prompt of a request, how it is decoded, and the times of the frames of its media."""
        limits = self._engine.uploads.limits
        if len(chat.media) > limits.max_media:
            raise ChatError(
                f"the request has {len(chat.media)} images and videos, but at most {limits.max_media} are taken",
                "messages",
            )
        with self._engine.uploads.holding() as held:
            for part in chat.media:
                held.append(self._fetch(part))
            media = self._engine.load(chat.model, held)
        separator = self._engine.captioners[chat.model].text_format.media_separator
        waiting = iter(media)
        turns = [message.to_turn([next(waiting).kind for _ in message.media], separator) for message in chat.messages]
        system = turns.pop(0).text if turns[0].role == "system" else ""
        *history, last = turns
        request = Request(media, last.text, system, history=tuple(history))
        prompt, settings = self._engine.prepare(chat.model, request, chat.settings)
        return prompt, settings, [[round(time, 3) for time in item.times] for item in media]

    def _fetch(self, part: MediaPart) -> Upload:
        """The file of a part of a message."""
        uploads = self._engine.uploads
        if part.source == "file":
            upload = self._files.copy(self._find_file(part.value, part.param))
        elif part.source == "data":
            data, name = read_data_url(part.value, uploads.limits.max_bytes)
            upload = uploads.write(data, part.name or name)
        elif self._allow_remote_urls:
            upload = uploads.write(*fetch(part.value, uploads.limits.max_bytes))
        else:
            raise ChatError(
                f"{part.param}: addresses of the web are not fetched; send the file as a data: address or upload it to "
                "/v1/files, or start the server with --allow_remote_urls", part.param, "remote_url_refused",
            )  # fmt: skip
        # Animated pictures are clips, and sent as images.
        if part.claimed in (None, upload.kind) or (upload.kind == "video" and is_picture_file(upload.path)):
            return upload
        uploads.delete(upload)
        raise UploadError(f"{part.param}: {part.claimed}_url, but its content is of another kind: {upload.kind}")


@dataclass
class _Running:
    """A request that is in the queue or being answered."""

    model: str
    num_prompt: int
    frames: list[list[float]]
    events: asyncio.Queue[Event]

    def __post_init__(self) -> None:
        self._head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.model}

    async def next(self) -> Event:
        return await self.events.get()

    async def wait(self, request: HttpRequest) -> dict[str, object]:
        """The whole answer; an ApiError where there is none, or where the client has gone."""
        while True:
            try:
                event = await asyncio.wait_for(self.next(), _POLL)
            except asyncio.TimeoutError:
                if await request.is_disconnected():
                    raise ApiError(499, "the client has gone") from None
                continue
            if isinstance(event, Failed):
                raise _failure(event)
            if isinstance(event, Done):
                message = {"role": "assistant", "content": event.text, "refusal": None}
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish_reason(event)}
                whole = {"object": "chat.completion", "choices": [choice], "usage": self._usage(event)}
                return self._head | whole | {"llava": self._about(event)}

    async def chunks(self, event: Event, include_usage: bool) -> AsyncIterator[str]:
        """The server-sent events of a stream whose first event is there."""
        yield self._chunk({"role": "assistant", "content": ""})
        while isinstance(event, Delta):
            yield self._chunk({"content": event.text})
            event = await self.next()
        if isinstance(event, Failed):
            error = _failure(event)
            yield f"data: {error_body(error.message, error.kind, error.code).decode()}\n\n"
            return
        yield self._chunk({}, _finish_reason(event), {"llava": self._about(event)})
        if include_usage:
            yield _event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": self._usage(event)})
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: Mapping[str, object], reason: str | None = None, more: Mapping[str, object] = {}) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _event(self._head | {"object": "chat.completion.chunk", "choices": [choice]} | dict(more))

    def _usage(self, done: Done) -> dict[str, int]:
        return {
            "prompt_tokens": self.num_prompt,
            "completion_tokens": done.num_tokens,
            "total_tokens": self.num_prompt + done.num_tokens,
        }

    def _about(self, done: Done) -> dict[str, object]:
        """What OpenAI's form has no field for."""
        return {
            "text_with_bins": done.answer.text,
            "boxes": [box._asdict() for box in done.answer.boxes],
            "spans": [span._asdict() for span in done.answer.spans],
            "frame_times": self.frames,
        }


def _finish_reason(done: Done) -> str:
    return "length" if done.reason == "length" else "stop"


def _failure(event: Failed) -> ApiError:
    return ApiError(400, event.message) if event.is_users else ApiError(500, event.message, "server_error")


def _describe_file(stored: StoredFile) -> dict[str, object]:
    return {
        "id": stored.id, "object": "file", "bytes": stored.size, "created_at": stored.created,
        "filename": stored.upload.name, "purpose": "vision", "status": "processed",
    }  # fmt: skip


def _event(value: Mapping[str, object]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _json(value: Mapping[str, object]) -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse(value)
