"""The server: endpoint and page behind one guard, on a socket of its own, until it is told to stop."""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llava.command import errors_of_users
from llava.serve.web.endpoint import Endpoint
from llava.serve.web.engine import Engine
from llava.serve.web.guard import LEAST_TOKEN, LOOPBACK, App, Guard

if TYPE_CHECKING:
    from fastapi import FastAPI
    from uvicorn import Server

logger = logging.getLogger(__name__)

INSTALL = "pip install 'llava-babylm[web]'"


@dataclass(frozen=True)
class ServerOptions:
    """Where the server listens, and who may ask it; the fields are flags."""

    host: str = LOOPBACK[0]
    port: int = 7860
    token: str | None = None
    allow_remote_urls: bool = False
    share: bool = False

    def check(self) -> None:
        """A ValueError for a server that strangers could use."""
        if not 0 <= self.port < 2**16:
            raise ValueError(f"--port is {self.port}; it must be from 0 to {2**16 - 1}")
        open_to = "--share" if self.share else "" if self.host in LOOPBACK else f"--host {self.host}"
        if open_to and self.token is None:
            raise ValueError(
                f"{open_to} lets others reach the server; say with --token_file who may use it, or leave it out"
            )
        if self.token is not None and len(self.token) < LEAST_TOKEN:
            raise ValueError(f"the token has {len(self.token)} characters; it must have at least {LEAST_TOKEN}")
        if self.token is not None and not self.token.isascii():
            raise ValueError("the token has characters that are not ASCII, which no header can hold")


def read_token(path: str) -> str:
    """The token that a file holds, without white space around it."""
    token = Path(path).read_text(encoding="utf-8").strip()
    if not token or any(character.isspace() for character in token):
        raise ValueError(f"--token_file {path!r} must hold one token, without spaces in it")
    return token


def build_app(
    engine: Engine, options: ServerOptions, add_page: Callable[[FastAPI], FastAPI] | None = None
) -> tuple[App, Endpoint]:
    """The application: the guard around the endpoint and, where there is one, the page.

    Raises:
        ValueError: a package that serves is not installed.
    """
    try:
        from fastapi import FastAPI
    except ImportError as error:
        raise ValueError(f"serving needs fastapi and uvicorn: {INSTALL}") from error
    # No documents of the interface: their page loads scripts from elsewhere.
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    endpoint = Endpoint(engine, options.allow_remote_urls)
    endpoint.add_to(app)
    if add_page is not None:
        app = add_page(app)
    hosts = {*LOOPBACK, options.host}
    return Guard(app, options.token, sorted(hosts), engine.uploads.limits.max_request_bytes), endpoint


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens; a ValueError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"--host {host} --port {port}: {reason}; give another --port, or 0 for any") from error


class RunningServer:
    """A server in a thread, for tests and programs; ``with`` stops it.

    Attributes:
        url: where it is.
    """

    def __init__(self, app: App, host: str = LOOPBACK[0], port: int = 0) -> None:
        self._socket = open_socket(host, port)
        self._server = build_server(app)
        self.url = address_of(self._socket)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)

    def __enter__(self) -> RunningServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)
        with suppress(OSError):
            self._socket.close()


def build_server(app: App | None) -> Server:
    """uvicorn for an application; it writes no log of its own, as the guard's has what may be written."""
    try:
        from uvicorn import Config, Server
    except ImportError as error:
        raise ValueError(f"serving needs fastapi and uvicorn: {INSTALL}") from error
    # Its lines have queries in them.
    logging.getLogger("uvicorn.access").disabled = True
    logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
    settings: Mapping[str, Any] = {
        "app": app,
        "log_config": None, "access_log": False, "server_header": False, "timeout_graceful_shutdown": 3,
        "proxy_headers": False, "ws": "none", "lifespan": "on",
    }  # fmt: skip
    return Server(Config(**settings))


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Whether a line is not of a connection that was open when the server was told to stop, as every page holds one."""
    is_cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not is_cancelled and not record.getMessage().rstrip().endswith("asyncio.exceptions.CancelledError")


def share(port: int) -> str:
    """A public address of this machine's port, through Gradio's servers, for as long as the process lives.

    Raises:
        ValueError: there is none to be had.
    """
    from gradio.networking import setup_tunnel

    try:
        return str(setup_tunnel(LOOPBACK[0], port, secrets.token_urlsafe(32), None, None))
    # Gradio asks its server for one with a library of its own choice, and turns some errors into RuntimeErrors.
    except errors_of_users() as error:
        raise ValueError(f"--share: Gradio gives no public address: {error}") from error


def address_of(listening: socket.socket) -> str:
    """The http address of a socket."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def name_models(paths: Sequence[str]) -> list[str]:
    """Names of checkpoints: of their folders; where two are alike, with the folder above."""
    names = [Path(path).resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = ["/".join(Path(path).resolve().parts[-2:]) for path in paths]
    if len(set(names)) < len(names):
        raise ValueError(f"the models are the same folder, {paths[0]}; give it once, or two that differ")
    return names
