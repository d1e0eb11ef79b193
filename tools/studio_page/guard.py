"""Which requests are answered: those of this page in a browser of this machine, of a bounded size.

A page of another site cannot read what a server on 127.0.0.1 answers, but it can send requests there, and with a name
that it lets point to 127.0.0.1 (DNS rebinding) it could read as well. So the Host header must name this server, and
the headers that a browser adds by itself, Origin and Sec-Fetch-Site, must be those of the page.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from ldm.errors import UserError, plain
from ldm.files.documents import parse_json

LOCAL = ("127.0.0.1", "localhost", "[::1]")
MAX_JSON = 256 << 10  # bytes of a request
MAX_UPLOAD = 32 << 20  # bytes of an image

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not answered, with the status of HTTP and why."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


def host_names(host: str, port: int, others: Iterable[str] = ()) -> frozenset[str]:
    """Return the values of the Host header that are answered.

    Args:
        host: The address that the server listens on.
        port: Its port.
        others: More names, each with a port of its own if it has one.
    """
    names = [*LOCAL, *([] if _is_wildcard(host) else [f"[{host}]" if ":" in host else host])]
    names += [name for name in others if not _has_port(name)]
    allowed = {f"{name}:{port}" for name in names} | {name for name in others if _has_port(name)}
    if port == 80:  # browsers leave it out
        allowed.update(names)
    return frozenset(name.lower() for name in allowed)


def check_origin(method: str, headers: Mapping[str, str], hosts: frozenset[str]) -> None:
    """Raise Refused unless a request names this server and comes from its page, or from no page."""
    host = headers.get("host", "").lower()
    if host not in hosts:
        raise Refused(
            403, f'this page is not served as "{plain(host, 80)}": open it as it was printed, or --allow_hosts'
        )
    site, mode = headers.get("sec-fetch-site", ""), headers.get("sec-fetch-mode", "")
    if site not in ("", "same-origin", "none") and not (method == "GET" and mode == "navigate"):
        raise Refused(403, "the request comes from the page of another site")
    origin = headers.get("origin")
    if origin is not None and origin.lower() != f"http://{host}":
        raise Refused(403, "the request comes from the page of another site")


class Guard:
    """Refuses requests as `check_origin` says, and adds HEADERS to all answers.

    Args:
        app: What answers the others.
        hosts: See `host_names`.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            check_origin(scope["method"], Headers(scope=scope), self.hosts)
        except Refused as refused:
            await JSONResponse({"error": str(refused)}, refused.status)(scope, receive, send_with_headers)
        else:
            await self.app(scope, receive, send_with_headers)


async def read_body(request: Request, kind: str, most: int) -> bytes:
    """Return the body of a request. Raises Refused if it is of another kind or has more than `most` bytes."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != kind:  # a form of another site cannot send JSON without asking first
        raise Refused(415, f"the request must be {kind}")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Refused(413, f"the request has more than {most:,} bytes")
    return bytes(body)


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object in a request. Raises Refused or UserError."""
    raw = await read_body(request, "application/json", MAX_JSON)
    try:
        content = parse_json(raw.decode("utf-8"), "the request")
    except UnicodeDecodeError:
        raise UserError("the request is not UTF-8") from None
    if not isinstance(content, dict):
        raise UserError("the request is no JSON object")
    return content


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:  # a name
        return False


def _has_port(name: str) -> bool:
    return name.rpartition("]")[2].rpartition(":")[2].isdigit() and ":" in name.rpartition("]")[2]
