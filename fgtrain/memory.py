"""Memory measurements, and settings of the C library's allocator for repeated allocations of large tensors."""

import ctypes
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # names of glibc's malloc.h
_LARGEST = 2**31 - 1


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
    table = Path("/proc/meminfo")
    found = (
        re.search(r"MemAvailable:\s+(\d+) kB", table.read_text()) if device.type == "cpu" and table.exists() else None
    )
    return None if found is None else int(found[1]) * 2**10


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
            operations takes minutes. It is known to about 1 MiB, and 0.1 at least.
    """
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    if is_long and sys.platform.startswith("linux"):
        return_freed_memory()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the peak, becomes VmRSS
        resident = _kib_of_process("VmRSS")
        step()
        return max(0.1, (_kib_of_process("VmHWM") - resident) / 2**10)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as recorded:
        step()
    assert recorded.profiler is not None
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    return peak / 2**20


def _kib_of_process(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1])


def _of_glibc(name: str) -> Any:
    """A function of glibc; None with another C library."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):
        return None
