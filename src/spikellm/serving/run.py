"""Running the server until somebody ends it."""

from __future__ import annotations

import ipaddress
import logging
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import uvicorn

from spikellm.core.errors import RequestError

_LOCAL = ("localhost", "127.0.0.1", "::1", "[::1]")


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_names(host: str) -> Sequence[str]:
    """Names that requests may give as the server's: on the loopback only its own, so that no page
    of a stranger talks to it by a name that leads here.
    """
    return (*_LOCAL, host) if is_loopback(host) else ("*",)


def bound(host: str, port: int) -> socket.socket:
    """A socket that listens.

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
        found.listen(1024)
    except OSError as error:
        found.close()
        raise RequestError(
            f"cannot listen at {host} port {port}: {error.strerror or error}; choose another --port"
            " or --host"
        ) from None
    return found


def address_of(listening: socket.socket) -> str:
    """Where a socket listens, as the start of an address."""
    host, port = listening.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"


def run(app: Any, listening: socket.socket, grace: float, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM; requests under way have ``grace`` seconds to end.

    Args:
        ready: called when requests are taken.
    """

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            if self.started:
                ready()

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        timeout_graceful_shutdown=max(1, round(grace)),
        server_header=False,
    )
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    with _ended_quietly(), closing(listening):
        Server(config).run(sockets=[listening])


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
