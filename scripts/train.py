"""fgtrain train, from a checkout: python scripts/train.py method=fwdgrad."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train"))
