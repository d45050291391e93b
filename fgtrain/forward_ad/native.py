"""The reference engine: PyTorch's own forward mode, one pass per direction, for everything PyTorch can differentiate.

Parameters become dual numbers (p, v); every operation of the model then carries the pair (value, derivative along v)
and the loss comes out as (f, grad f . v). Nothing is stored for a backward pass, so memory is that of inference.
"""

import re
import sys
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.forward_ad.loss import RepeatedPass, check_losses
from fgtrain.tangents import Tangent, dense

LossFn = Callable[[Any], Tensor]

NO_TANGENT = (
    "the loss carries no tangent: it depends on no trainable parameter, or the model left PyTorch's forward-mode AD "
    "(.detach(), .item(), NumPy); check that loss_fn uses the model it is given"
)


def directional_derivatives(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]
) -> tuple[Tensor, Tensor]:
    """Losses and the K directional derivatives of their mean along `tangents`, without a backward pass.

    Args:
        model: any module. Its parameters, `.grad` and the global random state stay as they are; its buffers change as
            by one forward pass.
        loss_fn: maps the model to losses (B,) or ().
        tangents: {parameter name: (K, *p.shape)}; parameters left out have the direction 0.

    Returns:
        losses (B,) or (), and the derivatives (K,).

    Raises:
        UnsupportedOperation: an operation has no forward-mode derivative; says where and what to do.
        LossError: the loss depends on no parameter, or is not of shape (B,) or ().
        ValueError: a name that is no parameter.

    The derivative of x^2 at x = 3 along v = 1 is 6:

    >>> model = nn.ParameterDict({"x": torch.tensor(3.0)})
    >>> directional_derivatives(model, lambda m: m["x"] ** 2, {"x": torch.ones(1)})
    (tensor(9.), tensor([6.]))
    """
    losses, derivatives = jvp(model, loss_fn, tangents)
    return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)


def jvp(model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tangent]) -> tuple[Tensor, Tensor]:
    """As `directional_derivatives`, with the derivative of every example: losses (B,), derivatives (K, B)."""
    params = dict(model.named_parameters())
    unknown = sorted(tangents.keys() - params.keys())
    if unknown:
        raise ValueError(f"tangents for {', '.join(unknown)}, which the model's named_parameters() do not list")
    directions = {name: dense(tangent) for name, tangent in tangents.items()}
    num_tangents = len(next(iter(directions.values())))
    objective = _Objective(model, loss_fn)
    repeated = RepeatedPass(model) if num_tangents > 1 else None
    losses, derivatives = None, []
    with torch.inference_mode(False), torch.no_grad(), _forward_ad_kernels(model), _named_errors(model):
        for k in range(num_tangents):
            if repeated and k:
                repeated.rewind()
            with fwAD.dual_level():
                duals = {f"model.{n}": fwAD.make_dual(params[n].detach(), v[k]) for n, v in directions.items()}
                pair = fwAD.unpack_dual(check_losses(functional_call(objective, duals, ())))
                if pair.tangent is None:
                    raise LossError(NO_TANGENT)
                losses = pair.primal
                derivatives.append(pair.tangent)
    assert losses is not None
    return losses, torch.stack(derivatives)


class _Objective(nn.Module):
    """loss_fn(model) as a module, so that functional_call can swap the parameters of whatever loss_fn calls."""

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        super().__init__()
        self.model = model
        self.loss_fn = loss_fn

    def forward(self) -> Tensor:
        return self.loss_fn(self.model)


@contextmanager
def _forward_ad_kernels(model: nn.Module) -> Generator[None]:
    """Choose the kernels that have a forward-mode derivative where PyTorch would pick ones that have none."""
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        fastpath = torch.backends.mha.get_fastpath_enabled()
        stack.callback(torch.backends.mha.set_fastpath_enabled, fastpath)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.LSTM) for module in model.modules()):
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        if "torch._dynamo" in sys.modules:  # a compiled function drops tangents without a word
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _named_errors(model: nn.Module) -> Generator[None]:
    """Turn PyTorch's "no forward AD" errors into one sentence that names the module, the operation and the remedy."""
    try:
        yield
    except NotImplementedError as error:
        match = re.search(r"forward AD with (\S+) that|(jvp function for custom autograd.Function)", str(error))
        if match is None or isinstance(error, UnsupportedOperation):
            raise
        operation = match.group(1) or "a custom autograd.Function without jvp"
        raise UnsupportedOperation(
            f"{_where(model, error)} uses {operation}, which has no forward-mode derivative; replace that module, "
            "define jvp for it, or train with method=backprop"
        ) from error


def _where(model: nn.Module, error: BaseException) -> str:
    """The deepest module of `model` on the error's traceback."""
    names = {id(module): name for name, module in model.named_modules()}
    found, frame = "the loss function", error.__traceback__
    while frame is not None:
        owner = frame.tb_frame.f_locals.get("self")
        if id(owner) in names:
            path = names[id(owner)]
            found = f"module '{path}' ({type(owner).__name__})" if path else f"the model ({type(owner).__name__})"
        frame = frame.tb_next
    return found
