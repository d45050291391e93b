"""fgtrain bench, from a checkout: python scripts/bench.py --models mlp cnn."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("bench"))
