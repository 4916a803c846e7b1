"""``python -m asga`` is the command ``asga``."""

import sys

from asga.cli import main

if __name__ == "__main__":
    sys.exit(main())
