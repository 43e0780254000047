"""The server's process: its socket, its signals, and uvicorn around the application."""

from __future__ import annotations

import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.types import ASGIApp

from qhybrid.errors import ServingError

_GRACE_SECONDS = 5  # beyond what a request may take, for the last bytes to go out


def bind(host: str, port: int) -> socket.socket:
    """A socket that has the address and does not listen yet, so that nobody connects before the model is loaded.

    Raises:
        ServingError: the address is in use, or is none of this machine's.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except BaseException:
            bound.close()
            raise
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServingError(
            f"cannot serve on {host} port {port}: {reason}",
            hint="--port takes another, and 0 a free one" if isinstance(error, OSError) else None,
        ) from None
    return bound


def url_of(bound: socket.socket) -> str:
    """The address of a bound socket, as in http://127.0.0.1:8000."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """uvicorn, which says when it is ready.

    SIGTERM or SIGINT stops it from taking connections and lets requests finish; a second SIGINT does not wait.
    """

    def __init__(self, app: ASGIApp, timeout_seconds: float, ready: Callable[[], None] = lambda: None) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=30,
                timeout_graceful_shutdown=int(timeout_seconds) + _GRACE_SECONDS,
            )
        )
        self._ready = ready

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # the requests that are given up now would each be shown as an error
            logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
        super().handle_exit(sig, frame)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()


def serve(app: ASGIApp, bound: socket.socket, timeout_seconds: float, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, and finish what was begun.

    Raises:
        ServingError: another process has begun to listen on the address.
    """
    # uvicorn raises the signal once more when all is done; a server that was asked to stop has not failed.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    try:
        Server(app, timeout_seconds, ready).run(sockets=[bound])
    except OSError as error:
        raise ServingError(f"cannot serve on {url_of(bound)}: {error.strerror or error}") from None
