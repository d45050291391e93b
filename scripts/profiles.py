"""fgtrain profiles, from a checkout: python scripts/profiles.py --methods backprop fwdgrad."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("profiles"))
