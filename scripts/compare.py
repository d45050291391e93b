"""fgtrain compare, from a checkout: python scripts/compare.py methods=[backprop,fwdgrad] seeds=5 budget=60s."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("compare"))
