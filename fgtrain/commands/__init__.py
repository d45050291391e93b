"""The programs of the command line: `fgtrain train`, `fgtrain compare` and so on, one module each."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # before a command imports torch: silences its profiler
