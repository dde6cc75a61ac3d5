"""python -m jointopt"""

import sys

from jointopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
