"""fgtrain calibrate, from a checkout: python scripts/calibrate.py --system pendulum."""

import sys

from fgtrain.__main__ import run

if __name__ == "__main__":
    sys.exit(run("calibrate"))
