"""`python -m unisd` is `unisd`."""

import sys

from unisd.cli import main

if __name__ == "__main__":
    sys.exit(main())
