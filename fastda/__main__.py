"""`python -m fastda` is the command `fastda`."""

import sys

from .cli import main

sys.exit(main())
