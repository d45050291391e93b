"""The compiled engine: a pass of stacked duals, taken down once and run as one compiled function ever after.

A compiled function drops the tangent of a dual tensor without a word, so none is ever called with one. Instead

1. Dynamo takes down what the loss calls, with guards on everything it depends on: a loss, a model or a batch of another
   shape that does not pass the guards is taken down anew;
2. these calls run once on stacked duals of tensors without numbers, and what the rules did is taken down in turn: a
   graph of plain tensors, with inputs, parameters and directions going in, losses and derivatives coming out;
3. Inductor compiles that graph.

What cannot be taken down goes through the stacked engine as it is written.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fgtrain._torch import compile_graph, no_fake_tensor_cache, plain_tensors, saved_tensor_hooks_as_they_were
from fgtrain.errors import NoTangent, UserError
from fgtrain.forward_ad.dual import Dual, running_pass
from fgtrain.forward_ad.native import NO_TANGENT
from fgtrain.forward_ad.passes import NotIntercepted, TakenDown, check_losses
from fgtrain.network.compilation import OPTIONS
from fgtrain.network.parameters import slots_of
from fgtrain.tangents.directions import LowRankTangent, Tangent


def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The graph, compiled for inputs like these."""
    return compile_graph(graph, inputs, OPTIONS)


class CompiledPass:
    """The compiled engine of one model; called like `fgtrain.forward_ad.jvp`.

    Args:
        backend: what makes a function of a graph of plain tensors.

    Attributes:
        num_compilations: how many functions have been made.

    Raises:
        NotIntercepted: something cannot be compiled; the stacked engine can take it, or say what is wrong.
    """

    def __init__(self, backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] = inductor) -> None:
        self._backend = backend
        self.num_compilations = 0
        # What Dynamo takes down it keeps with the code, so every model has its own.
        run = FunctionType(_loss.__code__.replace(), globals())
        self._run = torch.compile(run, backend=self._take_down, fullgraph=True, dynamic=False)
        self._names: dict[int, str] = {}
        self._tangents: Mapping[str, Tangent] = {}
        self._outputs: list[tuple[Tensor, Tensor | None]] = []

    def __call__(
        self, model: nn.Module, loss_fn: Callable[[Any], Tensor], tangents: Mapping[str, Tangent]
    ) -> tuple[Tensor, Tensor]:
        params = slots_of(model).params
        self._names, self._tangents = {id(params[name]): name for name in tangents}, tangents
        try:
            with saved_tensor_hooks_as_they_were(), torch.enable_grad():  # to tell the model's own no_grad
                losses = check_losses(self._run(_with_defaults_as_keywords(loss_fn), model))
            derivatives = next((tangent for value, tangent in self._outputs if value is losses), None)
        except (UserError, NotIntercepted):
            raise
        except Exception as error:
            raise NotIntercepted(str(error).strip()) from error
        finally:
            self._names, self._tangents, self._outputs = {}, {}, []
        if derivatives is None:
            raise NoTangent(NO_TANGENT)
        return losses, derivatives

    def _take_down(self, taken: fx.GraphModule, _: list[Any]) -> Callable[..., tuple[Tensor, ...]]:
        """What Dynamo has taken down, as a function that runs it on values and leaves the tangents in `_outputs`."""
        compiled: dict[tuple[Any, ...], Callable[..., list[Tensor]]] = {}

        def run(*inputs: Any) -> tuple[Any, ...]:
            moving = [(i, self._names[id(x)]) for i, x in enumerate(inputs) if id(x) in self._names]
            forms = [_form_of(self._tangents[name]) for _, name in moving]
            parts = [part for form in forms for part in form.parts]
            key = (*(i for i, _ in moving), *(form.key for form in forms))
            with torch.no_grad():
                if key not in compiled:
                    compiled[key] = self._backend(*_derived(taken, inputs, [i for i, _ in moving], forms))
                    self.num_compilations += 1
                found = compiled[key](*inputs, *parts)
            self._outputs = [(found[2 * i], found[2 * i + 1]) for i in range(len(found) // 2)]
            return tuple(value for value, _ in self._outputs)

        return run


def _loss(loss_fn: Callable[[Any], Tensor], model: nn.Module) -> Tensor:
    return loss_fn(model)


def _with_defaults_as_keywords(loss_fn: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    """The same function. In torch 2.11 Dynamo guards keywords, and takes functions that differ in defaults for one."""
    if not isinstance(loss_fn, FunctionType) or not loss_fn.__defaults__:
        return loss_fn
    code = loss_fn.__code__
    names = code.co_varnames[code.co_argcount - len(loss_fn.__defaults__) : code.co_argcount]
    return partial(loss_fn, **dict(zip(names, loss_fn.__defaults__, strict=True)))


class _Form(NamedTuple):
    """A tangent as plain tensors, and how to make it of such ones again."""

    parts: tuple[Tensor, ...]
    key: tuple[Any, ...]
    remake: Callable[..., Tangent]


def _form_of(tangent: Any) -> _Form:
    if isinstance(tangent, LowRankTangent):
        rank, shape = tangent.rank, tangent.shape
        parts = (tangent.left, tangent.right)
        return _Form(parts, (*map(_layout, parts), rank), lambda left, right: LowRankTangent(left, right, rank, shape))
    if not isinstance(tangent, Tensor):
        raise NotIntercepted(f"{type(tangent).__name__} is no tensor")
    return _Form((tangent,), _layout(tangent), lambda t: t)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _derived(
    taken: fx.GraphModule, inputs: tuple[Any, ...], moving: list[int], forms: list[_Form]
) -> tuple[fx.GraphModule, list[Any]]:
    """The calls of `taken` with the inputs `moving` along tangents, and what the result takes: (*inputs, *parts).

    Its outputs are those of `taken`, each followed by its tangents, or None.
    """
    if not moving or next(taken.parameters(), None) is not None:
        raise NotIntercepted("the parameters are no inputs of what was taken down")

    def along(*tensors: Any) -> list[Tensor | None]:
        values, parts = list(tensors[: len(inputs)]), iter(tensors[len(inputs) :])
        with running_pass():
            for i, form in zip(moving, forms, strict=True):
                values[i] = Dual(values[i], form.remake(*(next(parts) for _ in form.parts)))
            with torch.enable_grad(), TakenDown():
                outputs = taken.forward(*values)
            with plain_tensors():
                return [part for out in outputs for part in _unpacked(out)]

    flat = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    flat += [part for form in forms for part in form.parts]
    with no_fake_tensor_cache():
        return make_fx(along, tracing_mode="fake")(*flat), flat


def _unpacked(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, Tensor):
        raise NotIntercepted(f"the loss gives a {type(out).__name__} away")
    return (out.primal, out.tangent) if isinstance(out, Dual) else (out, None)
