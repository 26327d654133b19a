"""Warnings in one line, each once in a process; of several ranks only one gives them."""

from __future__ import annotations

import logging

_log = logging.getLogger("spikellm")
_said: set[str] = set()


def say_once(message: str, topic: str | None = None) -> None:
    """A warning, the first time in this process that there is one of its topic.

    Args:
        topic: the message itself by default.
    """
    from spikellm.core import distributed

    topic = message if topic is None else topic
    if topic not in _said and distributed.is_main():
        _said.add(topic)
        _log.warning("spikellm: %s", message)
