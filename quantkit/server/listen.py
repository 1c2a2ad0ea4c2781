"""The process around the app: its socket, and an end that lets running requests finish."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from quantkit.errors import OutputError

if TYPE_CHECKING:  # an address that is taken is said before the runtime is imported
    from fastapi import FastAPI

    from quantkit.runtime.engine_thread import EngineThread

_WRITING = 5
"""Seconds for responses to reach their clients once the engine has ended."""


def open_socket(host: str, port: int) -> socket.socket:
    """A socket bound to the address; nobody can connect before the server listens on it.

    Raises:
        OutputError: the address is taken, or is not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OutputError(f"cannot listen on {host}: {error.strerror}") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OutputError(f"cannot listen on {host}, port {port}: {error.strerror}; give another --port or --host") from error
    return listener


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Serves until it is told to end. At the first signal new requests get a 503 and running ones go on, for shutdown_timeout seconds at most.

    Args:
        ready: called when clients can connect.
    """

    def __init__(self, app: FastAPI, thread: EngineThread, *, shutdown_timeout: float = 30, ready: Callable[[], None] | None = None) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_WRITING))
        self._engine, self._shutdown_timeout, self._ready = thread, shutdown_timeout, ready
        self._is_ending = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._ready is not None:
            self._ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The second signal ends at once."""
        if self._is_ending:
            self.should_exit = self.force_exit = True
        self.end()

    def end(self) -> None:
        """End in order; returns at once, `run` returns when it is done."""
        if not self._is_ending:
            self._is_ending = True
            threading.Thread(target=self._end, name="quantkit-shutdown", daemon=True).start()

    def _end(self) -> None:
        self._engine.drain(self._shutdown_timeout)
        self._engine.stop()
        self.should_exit = True


def serve(app: FastAPI, thread: EngineThread, listener: socket.socket, **options: Any) -> None:
    """Serve on the socket until a signal ends it."""
    Server(app, thread, **options).run(sockets=[listener])
