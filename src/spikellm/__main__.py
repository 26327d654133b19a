"""``python -m spikellm``."""

import sys

from spikellm.cli import main

sys.exit(main())
