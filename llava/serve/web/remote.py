"""Media at addresses of the web, for ``--allow_remote_urls``: fetched from public addresses alone, and within limits.

A request could otherwise have the server read what only the server reaches: services of its own machine and network. So
the name is resolved here, each address that it has must be a public one, and the connection goes to an address that was
looked at, not to whatever the name means a moment later. The same holds behind every redirection.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import SplitResult, urljoin, urlsplit

from llava.serve.web.uploads import MIB, UploadError, UploadTooLargeError

_REDIRECTIONS = 3
_REDIRECTED = (301, 302, 303, 307, 308)
_BLOCK = 2**16
Address = tuple[str, int]


def fetch(url: str, limit: int, seconds: float = 20.0) -> tuple[bytes, str]:
    """The bytes at an http or https address, and the name that its path ends with.

    Args:
        url: of a request.
        limit: most bytes.
        seconds: that all of it may take.

    Raises:
        UploadError: the address is not public, answers with an error, or takes too long.
        UploadTooLargeError: it has more bytes.
    """
    deadline = time.monotonic() + seconds
    for _ in range(_REDIRECTIONS + 1):
        parts = _split(url)
        try:
            found = _get(parts, limit, deadline)
        except (OSError, http.client.HTTPException) as error:
            raise UploadError(f"{_shown(parts)}: cannot be fetched: {error or type(error).__name__}") from error
        if isinstance(found, bytes):
            return found, parts.path
        url = urljoin(url, found)
    raise UploadError(f"{_shown(parts)}: redirects more than {_REDIRECTIONS} times")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0
    except ValueError as error:
        raise UploadError(f"the address {url[:80]!r} cannot be read: {error}") from error
    if parts.scheme not in ("http", "https") or not is_whole or not url.isprintable() or " " in url:
        raise UploadError(f"the address {url[:80]!r} is none of http or https")
    if parts.username is not None or parts.password is not None:
        raise UploadError("an address with a user name or a password is not fetched")
    return parts


def _shown(parts: SplitResult) -> str:
    """An address for messages, without its query, which may hold a secret."""
    return f"{parts.scheme}://{parts.hostname}{parts.path}"[:120]


def _get(parts: SplitResult, limit: int, deadline: float) -> bytes | str:
    """The body at an address, or where it redirects to."""
    host, port = str(parts.hostname), parts.port or (443 if parts.scheme == "https" else 80)
    address = find_public_address(host, port)
    connection = http.client.HTTPConnection(host, port)
    connection.sock = _connect(address, host, parts.scheme == "https", deadline)
    try:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        connection.request("GET", target, headers={"Accept": "image/*, video/*", "User-Agent": "llava"})
        answer = connection.getresponse()
        if answer.status in _REDIRECTED:
            return answer.headers.get("Location", "")
        if answer.status != 200:
            raise UploadError(f"{_shown(parts)}: answers with status {answer.status}")
        blocks, size = [], 0
        while block := answer.read1(_BLOCK):
            blocks.append(block)
            size += len(block)
            if size > limit:
                raise UploadTooLargeError(
                    f"{_shown(parts)}: has more than {limit // MIB} MiB; raise --max_upload_mb, or give another"
                )
            # A server that sends a byte now and then would never run into the socket's own limit.
            if time.monotonic() > deadline:
                raise TimeoutError("it takes too long")
        return b"".join(blocks)
    finally:
        connection.close()


def _connect(address: Address, host: str, is_secure: bool, deadline: float) -> socket.socket:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    connection = socket.create_connection(address, timeout=left)
    if not is_secure:
        return connection
    try:
        # The certificate is that of the name, though the connection goes to the address.
        return ssl.create_default_context().wrap_socket(connection, server_hostname=host)
    except OSError:
        connection.close()
        raise


def find_public_address(host: str, port: int) -> Address:
    """The first address of a host; an UploadError if any of its addresses is one of a private or special network."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise UploadError(f"{host[:80]}: there is no such host") from error
    addresses = [str(entry[4][0]) for entry in found]
    for address in addresses:
        if not is_public(address):
            raise UploadError(f"{host[:80]}: lies in a private or special network, which is not fetched from")
    return addresses[0], port


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, also where an IPv4 address is written inside of IPv6."""
    number = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(number, ipaddress.IPv6Address):
        inner = number.ipv4_mapped or number.sixtofour or (number.teredo[1] if number.teredo else None)
        if inner is not None:
            return inner.is_global and not inner.is_multicast
        # Of NAT64 the last 32 bits are an IPv4 address.
        if number in ipaddress.ip_network("64:ff9b::/96"):
            return is_public(str(ipaddress.IPv4Address(int(number) & 0xFFFFFFFF)))
    return number.is_global and not number.is_multicast
