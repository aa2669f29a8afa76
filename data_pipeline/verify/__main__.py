"""The command `python -m data_pipeline.verify`."""

import sys

from data_pipeline.verify.verify import main

if __name__ == "__main__":
    sys.exit(main())
