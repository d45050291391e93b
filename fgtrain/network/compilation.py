"""torch.compile, with the same results as the uncompiled model.

`compile=true`, or `model.compile()` in your own training loop, has these effects:

- for `fwdgrad`, `fwdgrad_lowrank`, `forward_exact` and `local_guess`, the forward pass is compiled together with its
  derivatives;
- for `backprop`, `forward_in_time`, `spsa` and `mezo`, the model is compiled as usual in PyTorch;
- all other methods run uncompiled. Of these, `gauss_newton` tries to compile and warns once.

Compilation takes 5 to 30 seconds for every shape of a batch. After eight shapes, derivatives run uncompiled. It pays
off for small networks and long runs; scripts/results/README.md has the measurements.
"""

import sys
from typing import Any

import torch
from torch import nn

from fgtrain.errors import ConfigError

OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Compiler options: without this one, Dropout uses the compiler's own generator and draws other masks."""


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile `model` in place; parameters keep their names.

    Passes along directions in the weights are compiled with their derivatives (`fgtrain.forward_ad.compiled`). Passes
    without derivatives are compiled too: backpropagation, zeroth-order methods, validation. Activity perturbation runs
    the uncompiled model. Dropout draws the same masks as uncompiled, and other results agree to rounding.

    Args:
        model: any module.
        device: the device of the model; the compiler is tested once on it.

    Raises:
        ConfigError: torch.compile does not work on this machine.
    """
    require_compiler(device, "compile=true")
    model.compile(options=OPTIONS)


def require_compiler(device: torch.device, setting: str) -> None:
    """Raise a ConfigError that names `setting` if torch.compile does not work on this machine."""
    try:
        torch.compile(torch.cos, options=OPTIONS)(torch.zeros(16, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        missing = "" if sys.platform != "linux" else " (on a CPU it needs a C++ compiler, such as g++)"
        raise ConfigError(
            f"{setting}: torch.compile fails here{missing}: {reason}; use {setting.replace('true', 'false')}"
        ) from error
