"""`python -m unisd` is `unisd`."""

from __future__ import annotations

import sys

from unisd.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
