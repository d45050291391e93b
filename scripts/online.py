"""fgtrain online, from a checkout: python scripts/online.py --quick."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("online"))
