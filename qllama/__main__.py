"""`python -m qllama`: the same as the `qllama` command."""

import sys

from qllama.cli import main

if __name__ == "__main__":
    sys.exit(main())
