"""fgtrain replay, from a checkout: python scripts/replay.py runs/mine weights.pt."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("replay"))
