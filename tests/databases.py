"""PyTorch's own databases of modules and operations as problems: a model, a loss, and the gradient to find.

The parameters of a problem are the floating-point inputs of an operation, or the inputs and parameters of a module. Its
loss weights every output number.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

SAMPLES = {"module": 40, "operation": 4}
"""Most samples that are tried, from the first to the last in the order of the database."""

LARGEST = 100_000
"""Most numbers of the input of a sample of an operation."""


def seed(number: int) -> None:
    """Random numbers on the CPU; `torch.manual_seed` formats the stack for each kind of device that there is not."""
    torch.default_generator.manual_seed(number)


class Problem(NamedTuple):
    """A model, made anew by `build`, and its loss."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Any], Tensor]


class Called(nn.Module):
    """A function or module whose floating-point inputs are parameters."""

    def __init__(self, function: Callable[..., Any], args: Any, kwargs: Any, moving: Callable[[Tensor], bool]) -> None:
        super().__init__()
        self.function = function
        leaves, self._spec = tree_flatten((args, kwargs))
        self._leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.inputs = nn.ParameterDict(
            {
                str(i): nn.Parameter(leaf.detach().clone())
                for i, leaf in enumerate(leaves)
                if isinstance(leaf, Tensor) and moving(leaf)
            }
        )

    def forward(self) -> Any:
        leaves = [self.inputs.get(str(i), leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = tree_unflatten(
            [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], self._spec
        )
        return self.function(*args, **kwargs)


def weighed(outputs: Any) -> Tensor:
    """The sum of all floating-point outputs, each with a different weight."""
    total: Any = 0.0
    for out in tree_leaves(outputs):
        if not isinstance(out, Tensor) or not (out.is_floating_point() or out.is_complex()):
            continue
        out = torch.view_as_real(out.resolve_conj()) if out.is_complex() else out
        weights = torch.linspace(-1, 1.3, out.numel(), dtype=torch.float64).cos().view(out.shape).to(out.dtype)
        total = total + (out * weights).sum()
    return total


def is_real(x: Tensor) -> bool:
    return x.layout == torch.strided and x.dtype == torch.float64


def is_large(x: Any) -> bool:
    return isinstance(x, Tensor) and x.numel() > LARGEST


def modules() -> Iterator[tuple[str, Callable[[], list[Problem]]]]:
    """(name, its problems), in training and in evaluation mode."""
    for info in module_db:
        for training in (True, False):

            def problems(info: Any = info, training: bool = training) -> list[Problem]:
                seed(0)
                samples = info.module_inputs_func(info, "cpu", torch.float64, False, training)
                return [_of_module(info, s, training) for s in _spread(samples, SAMPLES["module"])]

            yield f"{info.name} {'train' if training else 'eval'}", problems


def _of_module(info: Any, sample: Any, training: bool) -> Problem:
    def build() -> nn.Module:
        seed(0)
        created, given = sample.constructor_input, sample.forward_input
        module = info.module_cls(*created.args, **created.kwargs).double().train(training)
        if info.is_lazy:
            module(*given.args, **given.kwargs)
        model = Called(module, copy.deepcopy(given.args), copy.deepcopy(given.kwargs), is_real)
        return model.train(training)

    return Problem(sample.desc, build, lambda model: weighed(model()))


def operations() -> Iterator[tuple[str, Callable[[], list[Problem]]]]:
    """(name, its problems), as a function, a method and in place."""
    for op in op_db:
        if op.supports_autograd and op.supports_dtype(torch.float64, "cpu"):
            variants = {"": op.op, " method": op.method_variant, " in place": op.inplace_variant}
            for suffix, function in variants.items():
                if function is not None and (suffix != " in place" or op.supports_inplace_autograd):

                    def problems(op: Any = op, function: Any = function) -> list[Problem]:
                        seed(0)
                        samples = list(op.sample_inputs_func(op, "cpu", torch.float64, True))
                        samples = [s for s in samples if not is_large(s.input)]
                        if function is op.inplace_variant:
                            samples = [s for s in samples if not s.broadcasts_input]
                        return [_of_operation(op, function, s) for s in _spread(samples, SAMPLES["operation"])]

                    yield op.full_name + suffix, problems


def _spread(samples: list[Any], most: int) -> list[Any]:
    """A limited number of samples, from the first to the last."""
    if len(samples) <= most:
        return samples
    return [samples[i * (len(samples) - 1) // (most - 1)] for i in range(most)]


def _of_operation(op: Any, function: Any, sample: Any) -> Problem:
    args, kwargs = (sample.input, *sample.args), sample.kwargs

    def called(*args: Any, **kwargs: Any) -> Any:
        out = op.gradcheck_wrapper(function, *args, **kwargs)
        return sample.output_process_fn_grad(out)

    return Problem(
        sample.summary()[:300],
        lambda: Called(called, args, kwargs, lambda x: is_real(x) and x.requires_grad),
        lambda model: weighed(model()),
    )
