"""Memory measurements, and settings of the C library's allocator for repeated allocations of large tensors."""

import contextlib
import ctypes
import gc
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h
_LARGEST = 2**31 - 1
_RESIDENT, _PEAK = ("self/status", "VmRSS"), ("self/status", "VmHWM")  # the process's memory now, and at its peak


def keep_freed_memory() -> None:
    """Let the process keep freed memory for its next tensor of that size.

    By default glibc maps memory for every large tensor and returns it when the tensor is freed, and the kernel zeroes
    it page by page. This takes 15 to 35 % of a step's time on a CPU. Does nothing on other systems.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, _LARGEST)


def return_freed_memory() -> None:
    """Return the memory that `keep_freed_memory` kept to the system. Does nothing on other systems."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)


def free_memory(device: torch.device) -> int | None:
    """Available bytes on a device; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = _kib("meminfo", "MemAvailable") if device.type == "cpu" else None
    return None if available is None else available * 2**10


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error reports too little memory on any device."""
    of_cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    return of_cpu or isinstance(error, (torch.OutOfMemoryError, MemoryError))


def peak_mib(step: Callable[[], object], device: torch.device, *, is_long: bool = False) -> float:
    """Peak size in MiB of the live tensors during a step, above their size before it.

    Args:
        step: the step.
        device: the device of the tensors.
        is_long: on a CPU, measure the growth of the process's memory instead, since a profile of a step of thousands of
            operations takes minutes. The result is right to about 1 MiB and at least 0.1.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if is_long and _kib(*_PEAK) is not None:
        return_freed_memory()
        _forget_peak_of_process()
        resident = _kib(*_RESIDENT) or 0
        step()
        return max(0.1, ((_kib(*_PEAK) or 0) - resident) / 2**10)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak / 2**20


def forget_peak_memory() -> None:
    """Reset `peak_memory_mib`, because a sweep runs many trainings in one process."""
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # if it cannot be reset, the peak is the whole process's
        _forget_peak_of_process()


def peak_memory_mib() -> float:
    """Peak memory so far: of the accelerator if there is one, else of the process."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated() / 2**20
    if (peak := _kib(*_PEAK)) is not None:
        return peak / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _forget_peak_of_process() -> None:
    """Let the peak of the process's memory be its memory now."""
    Path("/proc/self/clear_refs").write_text("5")


def _kib(table: str, name: str) -> int | None:
    """An entry of a table in /proc; None on systems without it."""
    path = Path("/proc", table)
    found = re.search(rf"{name}:\s+(\d+) kB", path.read_text()) if path.exists() else None
    return None if found is None else int(found[1])


def _of_glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
