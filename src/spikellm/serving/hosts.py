"""Which names of the server a request may give."""

from __future__ import annotations

import ipaddress


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine can reach a host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def may_be_called(bound: str, header: str) -> bool:
    """Whether a request with this ``Host`` is answered by a server bound to ``bound``.

    On the loopback only names of the loopback are, so that no page of a stranger talks to it by a
    name that leads here; elsewhere any is.
    """
    if not is_loopback(bound):
        return True
    name = header.strip().lower()
    if name.startswith("["):
        name = name[1:].partition("]")[0]
    elif name.count(":") == 1:
        name = name.partition(":")[0]
    return is_loopback(name.rstrip("."))
