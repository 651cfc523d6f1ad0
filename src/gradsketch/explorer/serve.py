"""The page on a port of this machine, until Ctrl-C."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Callable

from gradsketch.errors import InputError
from gradsketch.explorer.session import Session

__all__ = ["require_web", "serve"]


def require_web() -> None:
    """Find out whether what serves the page is installed.

    Raises:
        InputError: it is not.
    """
    try:
        import fastapi  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"no module named {error.name}",
            "FastAPI and uvicorn, which serve the page",
            "Run pip install 'gradsketch[web]'",
        ) from error


def serve(session: Session, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page on 127.0.0.1 until a signal ends it; ``ready`` gets the one link that opens it.

    Raises:
        InputError: the port is taken, or uvicorn is not installed.
    """
    require_web()
    import uvicorn

    from gradsketch.explorer.server import create_app

    token = secrets.token_urlsafe(32)
    with _bound(port) as bound:
        config = uvicorn.Config(
            create_app(session, token),
            log_level="error",
            access_log=False,  # its lines would hold the token
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=1,
        )
        ready(f"http://127.0.0.1:{bound.getsockname()[1]}/?token={token}")
        uvicorn.Server(config).run(sockets=[bound])


def _bound(port: int) -> socket.socket:
    bound = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
        bound.listen()
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(f"--port {port} ({error})", "a free port", "Type --port 0 for any") from error
    return bound
