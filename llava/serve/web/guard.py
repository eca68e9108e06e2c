"""What every request passes before page or endpoint see it: who asks, from where, and how much is sent.

Without a token the server is this machine's alone, and any page that its user has open could ask it in his name: so the
host must be a local one (a foreign name that resolves to 127.0.0.1 is refused) and the origin the server itself. With a
token each request brings it as ``Authorization: Bearer``, or the cookie that a browser gets for it at ``/login``. The
cookie is a random number of this process; the token is in no address, no cookie and no log.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "llava_session"
LEAST_TOKEN = 8
_MOST_LOGIN = 4096
_DRAIN_SECONDS = 10.0
_LOGIN_WAIT = 0.5
"""Seconds before a wrong token is answered: guessing is slow."""

# The page may load nothing from anywhere else, whatever is in it: that a server behind a firewall shows everything, and
# that no one is told who looks at it.
_POLICY = (
    "default-src 'self' data: blob:; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'; object-src 'none'"
)
_HEADERS = [
    (b"content-security-policy", _POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"same-origin"),
]
_LOGIN = """<!doctype html><html lang="en"><meta charset="utf-8"><title>llava</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>body{{font:16px sans-serif;max-width:22em;margin:15vh auto;padding:0 1em}}input,button{{font:inherit;
width:100%;box-sizing:border-box;padding:.5em;margin:.3em 0}}p{{color:#b00020}}</style>
<form method="post" action="{root}/login"><label>Token of this server
<input type="password" name="token" autofocus autocomplete="current-password"></label>
<button>Open</button>{message}</form></html>"""


def error_body(message: str, kind: str, code: str | None, param: str | None = None) -> bytes:
    """An error as OpenAI's API has it."""
    error = {"message": message, "type": kind, "param": param, "code": code}
    # Of what a client sent, halves of characters may be in it.
    return json.dumps({"error": error}, ensure_ascii=False).encode("utf-8", "backslashreplace")


class Guard:
    """ASGI middleware; see the module.

    Args:
        app: what is behind it.
        token: that requests must bring; None lets local ones in without.
        hosts: names of the server that a request may come under where there is no token.
        max_bytes: most bytes of a request.
    """

    def __init__(self, app: App, token: str | None, hosts: Sequence[str], max_bytes: int) -> None:
        self._app, self._token, self._max_bytes = app, token, max_bytes
        self._hosts = {host.lower() for host in hosts}
        self._cookie = secrets.token_urlsafe(32)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # The page needs no websocket.
            await send({"type": "websocket.close", "code": 1008})
            return
        status, began = 500, time.monotonic()

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                named = {name.lower() for name, _ in message.get("headers", [])}
                added = [(name, value) for name, value in _HEADERS if name not in named]
                message = {**message, "headers": [*message.get("headers", []), *added]}
            await send(message)

        try:
            await self._handle(scope, receive, send_with_headers)
        finally:
            # The path alone: no query, no header, nothing of the content. Escaped, as it is the visitor's text.
            path = scope["path"].encode("unicode_escape").decode("ascii")[:200]
            logger.info("%s %s %d %.2f s", scope["method"], path, status, time.monotonic() - began)

    async def _handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refuse(scope, headers)
        if refusal is not None:
            status, message, code = refusal
            if status == 413:
                await self._read_on(receive)
            await respond(send, status, error_body(message, "invalid_request_error", code))
        elif self._token is not None and scope["path"] == "/login":
            await self._log_in(scope, receive, send)
        elif not self._is_known(headers):
            await self._ask_for_token(scope, headers, send)
        else:
            await self._app(scope, receive, send)

    def _refuse(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, str] | None:
        """Status, message and code for a request that nobody gets an answer to."""
        if self._token is None:
            host = _host_of(headers.get("host", ""))
            if host not in self._hosts:
                return 403, "this server answers to its own name alone; take 127.0.0.1 or localhost", "wrong_host"
            origin = headers.get("origin")
            if origin is not None and _place_of(origin) != headers.get("host", "").lower():
                return 403, "another page's request is not answered", "wrong_origin"
        length = headers.get("content-length")
        # In blocks it may be of any length, whatever a Content-Length beside them says.
        if "transfer-encoding" in headers:
            return 411, "a request with a body needs a Content-Length, and no Transfer-Encoding", "length_required"
        if length is not None and (not length.isdecimal() or int(length) > self._max_bytes):
            most = self._max_bytes / 2**20
            return 413, f"the request has more than {most:.0f} MiB; --max_upload_mb sets the limit", "request_too_large"
        return None

    async def _read_on(self, receive: Receive) -> None:
        """Let a client send what is too large, up to a point, and keep none of it.

        One that is answered while it sends sees a broken connection, and not the answer.
        """

        async def read() -> None:
            left = 4 * self._max_bytes
            while left > 0:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                left -= len(message.get("body", b""))

        try:
            await asyncio.wait_for(read(), _DRAIN_SECONDS)
        except asyncio.TimeoutError:
            return

    def _is_known(self, headers: dict[str, str]) -> bool:
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _equal(given.strip(), self._token):
            return True
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return cookie is not None and _equal(cookie.value, self._cookie)

    async def _ask_for_token(self, scope: Scope, headers: dict[str, str], send: Send) -> None:
        if scope["method"] == "GET" and "text/html" in headers.get("accept", ""):
            await respond(send, 401, self._login_page(scope), [(b"content-type", b"text/html; charset=utf-8")])
            return
        message = "this server needs its token: send it as Authorization: Bearer (api_key of OpenAI's client)"
        body = error_body(message, "authentication_error", "invalid_api_key")
        await respond(send, 401, body, [(b"www-authenticate", b"Bearer")])

    def _login_page(self, scope: Scope, message: str = "") -> bytes:
        note = f"<p>{message}</p>" if message else ""
        return _LOGIN.format(root=scope.get("root_path", ""), message=note).encode()

    async def _log_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        """``/login``: a form, and the cookie for the right token."""
        html = [(b"content-type", b"text/html; charset=utf-8")]
        if scope["method"] != "POST":
            await respond(send, 200, self._login_page(scope), html)
            return
        body = b""
        while len(body) <= _MOST_LOGIN:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        given = parse_qs(body[:_MOST_LOGIN].decode("utf-8", "replace")).get("token", [""])[0]
        assert self._token is not None
        if not _equal(given.strip(), self._token):
            await asyncio.sleep(_LOGIN_WAIT)
            logger.warning("a wrong token was given at /login")
            await respond(send, 401, self._login_page(scope, "This is not the token."), html)
            return
        secure = "; Secure" if scope.get("scheme") == "https" else ""
        cookie = f"{COOKIE}={self._cookie}; Path=/; HttpOnly; SameSite=Strict{secure}"
        location = (scope.get("root_path", "") or "") + "/"
        await respond(send, 303, b"", [(b"location", location.encode()), (b"set-cookie", cookie.encode())])


def _host_of(header: str) -> str:
    """The name in a Host header, without its port and the brackets of IPv6."""
    try:
        return (urlsplit(f"//{header}").hostname or "").lower()
    except ValueError:
        return ""


def _place_of(origin: str) -> str:
    """Host and port of an Origin header; "" of one that has none, which is no host's."""
    try:
        return urlsplit(origin).netloc.lower()
    except ValueError:
        return ""


def _equal(given: str, expected: str) -> bool:
    """Compared in a time that tells nothing of where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), expected.encode("utf-8", "replace"))


async def respond(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]] = ()) -> None:
    """Send a whole response; JSON unless the headers say otherwise."""
    named = {name for name, _ in headers}
    own = [(b"content-length", str(len(body)).encode())]
    own += [] if b"content-type" in named else [(b"content-type", b"application/json")]
    # What was not read of the request is not taken for the next one.
    own += [(b"connection", b"close")] if status in (411, 413) else []
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
