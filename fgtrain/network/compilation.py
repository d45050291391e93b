"""torch.compile, with the numbers of a model that is not compiled.

`compile=true`, or `model.compile()` in a training loop of your own:

- `fwdgrad`, `fwdgrad_lowrank` and `local_guess` have their pass compiled together with its derivatives;
- `backprop`, `spsa` and `mezo` are compiled as PyTorch does it;
- `activity` and `second_order` run as written.

Compiling takes 5 to 30 seconds for every shape of a batch. After eight shapes, derivatives run as written. It pays for
small networks and long runs; scripts/results/README.md has the measurements.
"""

import sys
from typing import Any

import torch
from torch import nn

from fgtrain.errors import ConfigError

OPTIONS: dict[str, Any] = {"fallback_random": True}
"""Of the compiler: without this Dropout has a generator of the compiler's own, and draws other masks."""


def compile_model(model: nn.Module, device: torch.device) -> None:
    """Compile `model` in place; parameters keep their names.

    Passes along directions in the weights are compiled with their derivatives (`fgtrain.forward_ad.compiled`), and so
    are passes without any: backpropagation, zeroth-order methods, validation. Activity perturbation runs the model as
    it was written. Dropout draws the masks it would draw uncompiled, and other numbers agree to rounding.

    Args:
        model: any module.
        device: where it will run; the compiler is tried there once.

    Raises:
        ConfigError: torch.compile does not work on this machine.
    """
    try:
        torch.compile(torch.cos, options=OPTIONS)(torch.zeros(16, device=device))
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        missing = "" if sys.platform != "linux" else " (on a CPU it needs a C++ compiler, such as g++)"
        raise ConfigError(f"compile=true: torch.compile fails here{missing}: {reason}; use compile=false") from error
    model.compile(options=OPTIONS)
