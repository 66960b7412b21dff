"""Run the `chunkq` command: `python -m chunkq`."""

import sys

from chunkq.cli import main

sys.exit(main())
