"""Learning-rate schedules that PyTorch does not have in this form."""

import inspect
import logging
import math
from collections.abc import Callable
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

_log = logging.getLogger(__name__)


def cosine(optimizer: Optimizer, total_steps: int, warmup_steps: int = 0) -> LambdaLR:
    """Linear warm-up from 0, then half a cosine from the optimizer's learning rate down to 0 at `total_steps`.

    Source: Loshchilov and Hutter 2017, arXiv:1608.03983 (without restarts).
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if 0 < total_steps <= warmup_steps:
        message = (
            "warmup_steps=%d in a run of %d steps: the learning rate never reaches its full value; warm up for less"
        )
        _log.warning(message, warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return (1 + math.cos(math.pi * min(1.0, progress))) / 2

    return LambdaLR(optimizer, factor)


def some_length(make_scheduler: Callable[..., Any]) -> dict[str, int]:
    """The option `total_steps` of a long run, for a scheduler that is only tried out; empty if it takes none."""
    return {"total_steps": 10**6} if "total_steps" in inspect.signature(make_scheduler).parameters else {}
