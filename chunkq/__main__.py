"""`python -m chunkq` is the `chunkq` command."""

import sys

from chunkq.cli import main

sys.exit(main())
