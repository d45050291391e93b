"""fgtrain: train neural networks with backpropagation or forward gradients, swapped by one word.

From forward mode to forward gradients
======================================

>>> import torch
>>> from torch import nn
>>> import fgtrain

**Forward mode** carries a derivative along with the value. A dual number holds a value and its derivative in one
direction. Every operation acts on both, so one pass gives f(x) and the directional derivative f'(x) v. The first axis
of a tangent counts the directions:

>>> square = nn.ParameterDict({"x": torch.tensor(3.0)})
>>> v = {"x": torch.tensor([1.0])}
>>> value, derivative = fgtrain.directional_derivatives(square, lambda m: m["x"] ** 2, v)
>>> value.item(), derivative.item()  # x^2 and 2 x v at x = 3
(9.0, 6.0)

It costs about one more forward pass at any depth and stores nothing. It gives the derivative in one direction only.

**Reverse mode** runs backwards from the loss and gives the derivatives for all inputs at once. It multiplies a vector
from the left by the Jacobian of every layer. It must first run forwards and store the input of every layer:

>>> x = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
>>> outputs = torch.stack([x[0] * x[1], x[1] * x[2]])
>>> (vjp,) = torch.autograd.grad(outputs, x, grad_outputs=torch.tensor([1.0, 1.0]))
>>> vjp.tolist()  # (1, 1) times the Jacobian [[x1, x0, 0], [0, x2, x1]]
[2.0, 4.0, 2.0]

**The forward gradient** (Baydin et al. 2022, arXiv:2202.08587) takes the derivative d = grad f . v in a random
direction v and uses g = d v. If the entries of v are independent with mean 0 and variance 1, then E[v v^T] = I and

    E[g] = E[v v^T] grad f = grad f.

So g is an unbiased estimate of the gradient from one forward pass. The mean over many directions approaches the
gradient:

>>> beale = fgtrain.tasks.Beale()
>>> point = fgtrain.tasks.Points(beale)
>>> exact = fgtrain.Backprop()(point, lambda m: beale.losses(m, None)).grads["points"]
>>> estimator = fgtrain.ForwardGradient(num_tangents=10_000)
>>> generator = torch.Generator().manual_seed(0)
>>> mean = estimator(point, lambda m: beale.losses(m, None), generator=generator).grads["points"]
>>> bool((mean - exact).norm() < 0.1 * exact.norm())
True

A single g is noisy. With n parameters its squared error is (n + 1) ||grad f||^2, and the mean over K directions divides
that by K. Training therefore needs smaller steps and more of them, and the more so the larger the model is. The rest of
fgtrain deals with that noise: better directions, better places to perturb, and measurements of the error. `python
scripts/train.py task=rosenbrock method=fwdgrad` shows it on a function of two variables, where the noise hardly
matters: the run draws its path over the contours of the function.

Rarer traps
===========

The README lists the common traps of forward mode. Three more:

- A loss that takes derivatives in its input (a PINN, a gradient penalty) needs forward mode over reverse mode. Dual
  tensors can do that in plain PyTorch. fgtrain does the same in its slower reference engine; `ActivityPerturbation` and
  `FDFA` refuse such a loss.
- In plain PyTorch, `h.requires_grad` is False under forward mode, as in evaluation, and a hook of `h.register_hook` is
  never called. In fgtrain it is True, as in training, and a hook on a gradient is refused.
- An exact last layer (`exact_head`) has a wrong gradient if examples are mixed after it, as by BatchNorm or a
  contrastive loss. fgtrain refuses this.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fgtrain.estimators import (
        FDFA,
        SPSA,
        ActivityPerturbation,
        Backprop,
        CheckpointedBackprop,
        Estimate,
        ForwardExact,
        ForwardGradient,
        ForwardInTime,
        GaussNewton,
        GradientEstimator,
        Highway,
        LocalGuess,
        LocalLosses,
        MeZO,
        SecondOrder,
        write_grads,
    )
    from fgtrain.forward_ad import directional_derivatives
    from fgtrain.random import draw_seeds
    from fgtrain.tangents import Coordinate, LowRank, Normal, Rademacher, Sphere, Tangents

__version__ = "0.2.0"

__all__ = [
    "FDFA",
    "SPSA",
    "ActivityPerturbation",
    "Backprop",
    "CheckpointedBackprop",
    "Coordinate",
    "Estimate",
    "ForwardExact",
    "ForwardGradient",
    "ForwardInTime",
    "GaussNewton",
    "GradientEstimator",
    "Highway",
    "LocalGuess",
    "LocalLosses",
    "LowRank",
    "MeZO",
    "Normal",
    "Rademacher",
    "SecondOrder",
    "Sphere",
    "Tangents",
    "directional_derivatives",
    "draw_seeds",
    "tasks",
    "write_grads",
]


def __getattr__(name: str) -> Any:
    """The names above and the parts of the package are loaded at their first use, because PyTorch takes seconds."""
    for part in ("estimators", "forward_ad", "random", "tangents") if name in __all__ else ():
        module = import_module(f"fgtrain.{part}")
        if hasattr(module, name):
            return globals().setdefault(name, getattr(module, name))  # found without this function from now on
    if find_spec(f"fgtrain.{name}") is not None:
        return import_module(f"fgtrain.{name}")
    raise AttributeError(f"module 'fgtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
