"""Running the server until somebody ends it."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import uvicorn

from spikellm.core.errors import RequestError
from spikellm.serving.engine import Engine

_LAST = 5  # seconds for answers that say that the server is being stopped
Ready = Callable[[], None]


def bound(host: str, port: int) -> socket.socket:
    """A socket of this address, which does not listen yet.

    Raises:
        RequestError: the port is taken or not allowed, or the host is not of this machine.
    """
    if not 0 <= port < 65536:
        raise RequestError(f"port {port}; expected 0 (any that is free) to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        found = socket.socket(family, kind, protocol)
    except OSError as error:
        raise RequestError(f"host {host}: {error.strerror or error}") from None
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise RequestError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another --port"
            " or --host"
        ) from None
    return found


def address_of(place: socket.socket) -> str:
    """Where a socket is bound, as the start of an address."""
    host, port = place.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: Any, engine: Engine, place: socket.socket, grace: float, ready: Ready) -> None:
    """Serve until SIGINT or SIGTERM, or until the engine has failed; requests under way have
    ``grace`` seconds to end.

    Args:
        place: see :func:`bound`.
        ready: called when requests are taken.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                ready()

        async def on_tick(self, counter: int) -> bool:
            return await super().on_tick(counter) or not engine.alive

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            asyncio.get_running_loop().call_later(grace, engine.wind_up)
            await super().shutdown(sockets=sockets)

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=math.ceil(grace) + _LAST,
        server_header=False,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with _ended_quietly(), closing(place):
        Server(config).run(sockets=[place])


@contextmanager
def _ended_quietly() -> Iterator[None]:
    """The signals that end a server are raised once more behind it; here that is its normal end."""
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    for one in before:
        signal.signal(one, lambda *_: None)
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
