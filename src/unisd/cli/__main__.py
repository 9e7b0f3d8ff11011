import sys

from unisd.cli.main import main

sys.exit(main())
