"""The undocumented parts of PyTorch that fgtrain uses, in one place.

The engine needs them to run code on duals as if they were plain tensors, and to call functions without a public name. A
release that changes one of them breaks only this file, and tests/test_private_api.py shows which. Functions for the
compiler are here too; the compiler is imported at its first use, since that takes seconds.
"""

import logging
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from threading import get_ident
from typing import Any

import torch
import torch._functorch.autograd_function
import torch._functorch.pyfunctorch
import torch.autograd.forward_ad
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._C import _autograd
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_flatten as tree_flatten
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map as tree_map
from torch.utils._pytree import tree_map_only as tree_map_only
from torch.utils._pytree import tree_unflatten as tree_unflatten
from torch.utils.checkpoint import checkpoint

# Above: PyTorch's functions for trees of arguments, and the mode that intercepts every operation.

plain_tensors = torch._C.DisableTorchFunctionSubclass
"""A context in which tensor subclasses' `__torch_function__` is not called. It has no public name."""

no_overrides = torch._C.DisableTorchFunction
"""A context in which neither subclasses nor modes override functions. It has no public name."""

overrides_of_tensors = torch._C._EnableTorchFunction
"""A context that undoes `plain_tensors`. It has no public name."""

no_torch_function = torch._C._disabled_torch_function_impl
"""For subclasses that override only operations below `__torch_function__`; PyTorch's tutorials use it."""

set_grad_enabled = torch._C._set_grad_enabled
"""torch.set_grad_enabled without its context object, whose creation takes longer than a small operation's rule."""

is_inside_transform = torch._C._functorch.is_functorch_wrapped_tensor
"""Whether a transform of torch.func has wrapped a tensor, whose tangent is then not accessible."""

outside_transforms = torch._functorch.pyfunctorch.temporarily_clear_interpreter_stack
"""A context in which code runs as outside of torch.vmap and the other transforms of torch.func."""


def without_tangents() -> Any:
    """A context in which PyTorch's forward mode computes values only. It has no public name."""
    return torch.autograd.forward_ad._set_fwd_grad_enabled(False)


custom_function_call = torch._functorch.autograd_function.custom_function_call
"""The function that `__torch_function__` receives for a custom autograd.Function inside a transform of torch.func."""

FUNCTION_OWNERS = (torch, Tensor, torch._C._nn)
"""Where PyTorch may define a function of one name; torch._C._nn holds the C++ functions of torch.nn.functional."""

REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__get__
"""The function that `__torch_function__` receives when a model reads `x.requires_grad`."""

DATA: Any = vars(torch._C.TensorBase)["data"].__get__
"""The function that `__torch_function__` receives when a model reads `x.data`."""

SET_REQUIRES_GRAD: Any = vars(torch._C.TensorBase)["requires_grad"].__set__
"""The function that `__torch_function__` receives when a model sets `x.requires_grad`."""

SET_DATA: Any = vars(torch._C.TensorBase)["data"].__set__
"""The function that `__torch_function__` receives when a model sets `x.data`."""

safe_softmax = torch._safe_softmax
"""Softmax with zeros in fully masked rows, as in scaled_dot_product_attention."""

standard_gamma = torch._standard_gamma
"""The function that torch.distributions.Gamma samples with."""

standard_gamma_grad = torch._standard_gamma_grad
"""The derivative of such a sample in its concentration."""

pack_padded_sequence = torch._C._VariableFunctions._pack_padded_sequence
"""The function that torch.nn.utils.rnn.pack_padded_sequence calls."""

pad_packed_sequence = torch._C._VariableFunctions._pad_packed_sequence
"""The function that torch.nn.utils.rnn.pad_packed_sequence calls."""

BatchOrInstanceNorm = nn.modules.batchnorm._NormBase
"""The base of batch and instance norms."""

FOREACH = {name.removeprefix("_foreach_"): f for name, f in vars(torch).items() if name.startswith("_foreach_")}
"""The functions of lists of tensors, by the name of the function of one tensor."""

foreach_norm = torch._foreach_norm
"""The norms of many tensors in one launch, as torch.optim's own kernels compute them."""

foreach_copy = torch._foreach_copy_
"""Copies many tensors in one launch."""


def gradient_hooks(p: Tensor) -> tuple[Any, Any]:
    """The hooks of `register_hook` and of `register_post_accumulate_grad_hook`; empty or None if there are none."""
    return p._backward_hooks, p._post_accumulate_grad_hooks


GLOBAL_BACKWARD_HOOKS = (
    torch.nn.modules.module._global_backward_hooks,
    torch.nn.modules.module._global_backward_pre_hooks,
)
"""The backward hooks of all modules: two dictionaries."""


def backward_hooks(module: nn.Module) -> tuple[Mapping[int, Any], ...]:
    """The backward hooks of a module: two dictionaries, which keep up with later changes."""
    return module._backward_hooks, module._backward_pre_hooks


def is_compiled(model: nn.Module) -> bool:
    """Whether a call of `model` runs compiled: `model.compile()` was called, or it is the result of `torch.compile`.

    Inside `eager_functions`, or after `torch.compiler.set_stance("force_eager")`, no model is.
    """
    if model._compiled_call_impl is None and not is_wrapped(model):
        return False
    return torch._dynamo.eval_frame._stance.stance != "force_eager"


def is_wrapped(model: Any) -> bool:
    """Whether `model` is the result of `torch.compile`."""
    return hasattr(model, "_orig_mod")


def is_compiled_function(function: Any) -> bool:
    """Whether `function` is the result of `torch.compile` on a function."""
    return hasattr(function, "_torchdynamo_orig_callable")


def eager_functions() -> Any:
    """A context in which compiled functions run uncompiled, because compiled ones drop tangents silently."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def compile_graph(graph: fx.GraphModule, inputs: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Compile a graph of plain tensors, without tracing it again as torch.compile would."""
    import torch._inductor

    return torch._inductor.compile(graph, inputs, options=options)


def no_fake_tensor_cache() -> Any:
    """A context in which shapes are computed without the cache.

    The strides that the cache stores for an operation may be wrong for the same operation under forward mode.
    """
    import torch._dynamo.config

    return torch._dynamo.config.patch(fake_tensor_cache_enabled=False)


@contextmanager
def no_report_of_refused_shapes() -> Generator[None]:
    """A context in which PyTorch raises errors of shapes that do not fit or depend on values, without printing them."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def release_frames(error: BaseException) -> None:
    """Free what the calls that led to a caught error hold.

    A tensor that is printed while an operation of it fails leaves a guard in its frame, which sets the dispatcher of
    the thread to an earlier state when it is freed. A guard of our own restores the present state.
    """
    make_guard: Any = torch._C._DisableFuncTorch
    guard = make_guard()
    traceback.clear_frames(error.__traceback__)
    del guard


@contextmanager
def saved_tensor_hooks_as_they_were() -> Generator[None]:
    """Undo a ban on saved-tensor hooks, which activation checkpointing needs.

    A refused pass may end inside a transform of torch.func, whose ban would otherwise remain.
    """
    autograd: Any = _autograd
    ban = autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        yield
    finally:
        if ban is None:
            autograd._saved_tensors_hooks_enable()
        else:
            autograd._saved_tensors_hooks_disable(ban)


class reentrant_checkpoints_replaced:  # noqa: N801 - a context manager used like a function
    """A context in which this thread's activation checkpoints with `use_reentrant=True` run without it.

    The reentrant variant hides the parameters in it: torch.autograd.grad and forward mode see constants.
    """

    def __enter__(self) -> None:
        self._thread, self._before = get_ident(), torch.utils.checkpoint.CheckpointFunction
        vars(torch.utils.checkpoint)["CheckpointFunction"] = self

    def __exit__(self, *_: object) -> None:
        vars(torch.utils.checkpoint)["CheckpointFunction"] = self._before

    def apply(self, function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        """Stand for `CheckpointFunction.apply`."""
        if get_ident() != self._thread:
            return self._before.apply(function, preserve, *args)
        return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=preserve)


@contextmanager
def calls_replaced(calls: Mapping[nn.Module, Callable[..., Any]]) -> Generator[None]:
    """A context in which calling one of these modules calls its function in `calls` instead of `forward` and hooks."""
    before = {module: vars(module).get("_compiled_call_impl") for module in calls}
    try:
        for module, call in calls.items():
            vars(module)["_compiled_call_impl"] = call
        yield
    finally:
        for module, call in before.items():
            vars(module)["_compiled_call_impl"] = call


def set_group_timeout(timeout: timedelta) -> None:
    """Give the default process group another deadline; the function has a public name only in some releases."""
    set_timeout: Any = getattr(dist, "set_timeout", None) or vars(dist.distributed_c10d)["_set_pg_timeout"]
    set_timeout(timeout)


def call_of(module: nn.Module) -> Callable[..., Any]:
    """The function that a call of the module runs, including its hooks."""
    return module._compiled_call_impl or module._call_impl
