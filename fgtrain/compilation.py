"""torch.compile, with the numbers of a model that is not compiled."""

import sys
from typing import Any

import torch
from torch import nn

from fgtrain.errors import ConfigError


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile `model` in place; parameters keep their names.

    What is compiled are passes without forward-mode derivatives: backpropagation, zeroth-order methods, validation. A
    compiled function drops the tangent of a dual tensor without a word, so passes that carry tangents run the model as
    it was written. Dropout draws the masks it would draw uncompiled, and other numbers agree to rounding.

    Args:
        model: any module.
        device: where it will run; the compiler is tried there once.

    Raises:
        ConfigError: torch.compile does not work on this machine.
    """
    options: dict[str, Any] = {"fallback_random": True}  # else Dropout has a generator of the compiler's own
    try:
        torch.compile(torch.cos, options=options)(torch.zeros(16, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        missing = "" if sys.platform != "linux" else " (on a CPU it needs a C++ compiler, such as g++)"
        raise ConfigError(f"compile=true: torch.compile fails here{missing}: {reason}; use compile=false") from error
    model.compile(options=options)
