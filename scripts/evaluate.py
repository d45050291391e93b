"""fgtrain evaluate, from a checkout: python scripts/evaluate.py runs/mine --split test."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("evaluate"))
