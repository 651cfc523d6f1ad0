"""Who may ask: the person who was given the link, from the page itself. One middleware before every route.

A server on 127.0.0.1 is reached by every user of the machine, and by every site that a browser has open. So

* a random token opens it. The first visit trades it for a cookie that scripts cannot read, that other sites cannot
  send, and that counts for one path only: cookies know no ports, and other servers of this machine would get it
  otherwise. The path is a hash of the token, so that it cannot be guessed either.
* ``Host`` must be this machine by name, which ends DNS rebinding; its port is free, because ssh forwards ports.
* ``Origin`` must be this page's own where there is one, and whatever changes or computes must have one. Of the others
  ``Sec-Fetch-Site`` says where they come from.
* no other site may read, frame, open or embed an answer, and the page can load nothing but itself.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

__all__ = ["POLICY", "Guard", "place_of"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_COOKIE = "gradsketch"
_NAMES = ("127.0.0.1", "localhost", "::1")
_MOST_BYTES = 1 << 20
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
_AGAIN = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="color-scheme" content="light dark">
<meta name="viewport" content="width=device-width, initial-scale=1"><title>gradsketch explore</title><main>
<h1>This page is private</h1><p>Open the link that <code>gradsketch explore</code> printed. To come back to where you
were, put what stands behind # in this address behind it. If a link on another site led you here,
<a href="?">try again</a>.</p></main></html>"""


def place_of(token: str) -> str:
    """Return the path that the page lives under, with a slash at both ends."""
    return f"/{hashlib.sha256(token.encode()).hexdigest()[:16]}/"


class Guard:
    """An ASGI middleware that lets nobody through but who holds the token; the path is taken off before the app."""

    def __init__(self, app: App, token: str) -> None:
        self.app, self.token, self.place = app, token, place_of(token)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, _with_headers(send))
        # Of a WebSocket there is none: it is not accepted, which closes it.

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = _refusal(scope["method"], headers)
        if refusal is not None:
            await _plain(send, 403, refusal)
        elif scope["path"] == "/" and self._is_token(_parameter(scope, "token")):
            cookie = f"{_COOKIE}={self.token}; Path={self.place}; HttpOnly; SameSite=Strict"
            await _plain(send, 303, "", {"location": self.place, "set-cookie": cookie})
        elif not (scope["path"].startswith(self.place) and self._is_token(_cookie(headers))):
            await _plain(send, 403, _AGAIN, {"content-type": "text/html; charset=utf-8"})
        elif _length(headers) > _MOST_BYTES:
            await _plain(send, 413, "too much at once")
        else:
            path = scope["path"][len(self.place) - 1 :]
            await self.app({**scope, "path": path, "raw_path": path.encode()}, receive, send)

    def _is_token(self, came: str) -> bool:
        return secrets.compare_digest(came.encode(), self.token.encode())


def _refusal(method: str, headers: dict[str, str]) -> str | None:
    """Return why a request is refused whoever sends it, or None."""
    if method not in ("GET", "HEAD", "POST"):
        return "no such method"
    host = headers.get("host", "")
    try:
        name = urlsplit(f"//{host}").hostname
    except ValueError:
        name = None
    if name not in _NAMES:
        return "not a name of this machine"
    origin = headers.get("origin")
    if origin is None and method == "POST":
        return "no Origin"
    if origin is not None and origin != f"http://{host}":
        return "from another site"
    # A link on another site may lead here; what follows is stopped by the cookie, which is not sent along.
    navigates = headers.get("sec-fetch-mode") == "navigate" and headers.get("sec-fetch-dest") == "document"
    if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and not navigates:
        return "from another site"
    return None


def _length(headers: dict[str, str]) -> int:
    """Return the length of a body; one of unknown length counts as too long."""
    if "transfer-encoding" in headers:
        return _MOST_BYTES + 1
    length = headers.get("content-length", "0")
    return int(length) if length.isdecimal() and len(length) < 20 else _MOST_BYTES + 1


def _parameter(scope: Scope, name: str) -> str:
    query: str = scope["query_string"].decode("latin-1")
    return parse_qs(query).get(name, [""])[0]


def _cookie(headers: dict[str, str]) -> str:
    try:
        found = SimpleCookie(headers.get("cookie", "")).get(_COOKIE)
    except CookieError:
        return ""
    return "" if found is None else str(found.value)


def _with_headers(send: Send) -> Send:
    """Return a ``send`` that puts the headers of every answer in place of the app's own."""

    async def sends(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            own = [(n, v) for n, v in message.get("headers", []) if n.decode("latin-1").lower() not in _HEADERS]
            message = {**message, "headers": [*own, *((n.encode(), v.encode()) for n, v in _HEADERS.items())]}
        await send(message)

    return sends


async def _plain(send: Send, status: int, text: str, more: dict[str, str] | None = None) -> None:
    headers = {"content-type": "text/plain; charset=utf-8", **(more or {})}
    body = text.encode()
    headers["content-length"] = str(len(body))
    start = {"type": "http.response.start", "status": status}
    await send({**start, "headers": [(name.encode(), value.encode()) for name, value in headers.items()]})
    await send({"type": "http.response.body", "body": body})
