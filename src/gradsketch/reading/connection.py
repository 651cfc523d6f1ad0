"""Whether a service can be reached: asked once, in two seconds, where its own client tries for 25 or for 900."""

from __future__ import annotations

import socket
import sys
import threading
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["hub_reached", "offline", "reached"]

_SECONDS = 2.0
_SWITCHED = ("huggingface_hub.constants", "datasets.config")


def hub_reached() -> bool:
    """Whether the Hugging Face hub can be reached.

    huggingface_hub tries six times with growing pauses where a name cannot be looked up. These tries stay for what
    they are for, a connection that breaks in the middle of a download: only a hub that is not there at all is found
    out here. It is taken as not there where HF_HUB_OFFLINE says so.
    """
    try:
        from huggingface_hub import constants
    except ImportError:
        return True  # whoever wants something of the hub says what to install

    if constants.HF_HUB_OFFLINE:
        return False
    return reached(constants.ENDPOINT)


def reached(url: str) -> bool:
    """Whether a connection to a server, or to the proxy on the way to it, opens within two seconds."""
    return _answers(*_first_stop(url))


def _first_stop(url: str) -> tuple[str, int]:
    """Return host and port of the proxy that a URL is fetched through, or of its own server."""
    parts = urllib.parse.urlsplit(url)
    proxies = {} if urllib.request.proxy_bypass(parts.hostname or "") else urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy:
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    return parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)


def _answers(host: str, port: int) -> bool:
    """Whether a connection opens in time; looking a name up has no limit of its own, so another thread waits for it."""
    opened = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), _SECONDS).close()
        except OSError:
            return
        opened.set()

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(_SECONDS)
    return opened.is_set()


@contextmanager
def offline(is_so: bool) -> Iterator[None]:
    """Keep the hub's library, and whoever uses it, to what this disk has, where ``is_so``.

    Their arguments for one call do not reach all the requests that a call makes.
    """
    modules = [sys.modules[name] for name in _SWITCHED if name in sys.modules] if is_so else []
    before = [(module, module.HF_HUB_OFFLINE) for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        for module, value in before:
            module.HF_HUB_OFFLINE = value  # type: ignore[attr-defined]
