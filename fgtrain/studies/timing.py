"""Clocks of the studies."""

import time
from collections.abc import Callable

import torch


def cpu_seconds(run: Callable[[], object]) -> float:
    """CPU time of the process during a call."""
    began = time.process_time()
    run()
    return time.process_time() - began


def synchronize(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
