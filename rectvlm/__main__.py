"""`python -m rectvlm`, for launchers that start modules."""

import sys

from rectvlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
