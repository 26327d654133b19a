"""The command line: each command is a file that parses, calls and prints. No logic."""

from spikellm.cli.application import app
from spikellm.core.registry import import_parts

__all__ = ["app"]

import_parts(__name__, __path__)
