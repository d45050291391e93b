"""The compiled engine: a pass of stacked duals, traced once and then run as one compiled function.

A compiled function silently drops the tangent of a dual tensor, so it is never called with one. Instead

1. Dynamo traces the calls of the loss, with guards on everything they depend on. If the guards fail, for another loss,
   model or batch shape, it traces again;
2. the traced calls run once on stacked duals of fake tensors. The operations of the rules are traced in turn, into a
   graph of plain tensors that maps inputs, parameters and directions to losses and derivatives;
3. Inductor compiles that graph.

A pass that cannot be traced runs in the stacked engine.
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fgtrain._torch import (
    compile_graph,
    no_fake_tensor_cache,
    no_report_of_refused_shapes,
    plain_tensors,
    release_frames,
    saved_tensor_hooks_as_they_were,
)
from fgtrain.errors import NoTangent, UserError
from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.passes import NO_TANGENT, LossFn, TracedDraws, UnsupportedByEngine, WritesWider, check_losses
from fgtrain.forward_ad.running import running_pass
from fgtrain.network.compilation import OPTIONS
from fgtrain.network.parameters import slots_of
from fgtrain.tangents.directions import LastTangent, LowRankTangent, Tangent, all_dense, num_of, padded, width_of


def inductor(graph: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """Compile the graph for inputs of these shapes and types."""
    return compile_graph(graph, inputs, OPTIONS)


def _nothing() -> None:
    pass


class CompiledJvp:
    """A function that is traced once, and then carries tangents as one compiled function.

    Args:
        function: takes and returns tensors and other objects; it gets no duals.
        backend: turns a graph of plain tensors into a function.

    Attributes:
        num_compilations: number of functions compiled so far.
        confirm: None if the last call ran a compiled function whose result was found right before; else to be called
            once the result of this call is found right.
        coarsest: the least precise dtype of the numbers that it computed then.
    """

    def __init__(
        self, function: FunctionType, backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] = inductor
    ) -> None:
        self._backend = backend
        self.num_compilations = 0
        # Dynamo stores its traces with the code object, so each object gets its own.
        own = FunctionType(function.__code__.replace(), function.__globals__)
        self._run = torch.compile(own, backend=self._differentiate, fullgraph=True, dynamic=False)
        self._tangents: Mapping[int, Tangent] = {}
        self._outputs: list[tuple[Tensor, Tensor | None]] = []
        self.confirm: Callable[[], None] | None = None
        self.coarsest: torch.dtype | None = None
        self._before_unconfirmed: Callable[[], None] = _nothing

    def __call__(
        self, tangents: Mapping[int, Tangent], *args: Any, before_unconfirmed: Callable[[], None] = _nothing
    ) -> tuple[Any, list[tuple[Tensor, Tensor | None]]]:
        """function(*args), and the tensors that it computed, each with its tangents or None.

        Args:
            tangents: {id of a tensor that the function reads: its tangents}.
            args: of the function.
            before_unconfirmed: called before a compiled function that is not confirmed runs and changes any state.

        Raises:
            UnsupportedByEngine: the function cannot be compiled.
        """
        self._tangents, self._before_unconfirmed, self.confirm = tangents, before_unconfirmed, None
        try:
            with torch.enable_grad(), no_report_of_refused_shapes():  # to recognise the model's no_grad
                return self._run(*args), self._outputs
        except (UserError, UnsupportedByEngine):
            raise
        except Exception as error:
            release_frames(error)
            raise UnsupportedByEngine(str(error).strip()) from error
        finally:
            self._tangents, self._outputs, self._before_unconfirmed = {}, [], _nothing

    def _differentiate(self, graph: fx.GraphModule, _: list[Any]) -> Callable[..., tuple[Tensor, ...]]:
        """Turn Dynamo's trace into a function that runs it on values and stores the tangents in `_outputs`."""
        compiled: dict[tuple[Any, ...], tuple[Callable[..., list[Tensor]], torch.dtype | None]] = {}
        confirmed: set[tuple[Any, ...]] = set()

        def run(*inputs: Any) -> tuple[Any, ...]:
            moving = [(i, self._tangents[id(x)]) for i, x in enumerate(inputs) if id(x) in self._tangents]
            forms = [_form_of(tangent) for _, tangent in moving]
            parts = [part for form in forms for part in form.parts]
            key = (*(i for i, _ in moving), *(form.key for form in forms))
            with torch.no_grad():
                if key not in confirmed:
                    self._before_unconfirmed()
                    self.confirm = partial(confirmed.add, key)
                if key not in compiled:
                    derived, arguments = _derived(graph, inputs, [i for i, _ in moving], forms)
                    coarsest = _coarsest(derived)  # of what was traced, before the compiler changes it
                    compiled[key] = self._backend(derived, arguments), coarsest
                    self.num_compilations += 1
                function, self.coarsest = compiled[key]
                found = function(*inputs, *parts)
            self._outputs = [(found[2 * i], found[2 * i + 1]) for i in range(len(found) // 2)]
            return tuple(value for value, _ in self._outputs)

        return run


class CompiledPass:
    """The compiled engine of one model; called like `fgtrain.forward_ad.jvp`, or with `before_unconfirmed` too.

    Args:
        backend: turns a graph of plain tensors into a function.

    Raises:
        UnsupportedByEngine: the pass cannot be compiled; the stacked engine can run it, or name the error.
    """

    def __init__(self, backend: Callable[[fx.GraphModule, list[Any]], Callable[..., Any]] = inductor) -> None:
        self._jvp = CompiledJvp(_loss, backend)
        self._writes_wider = False

    @property
    def confirm(self) -> Callable[[], None] | None:
        """As of `CompiledJvp`."""
        return self._jvp.confirm

    @property
    def coarsest(self) -> torch.dtype | None:
        """As of `CompiledJvp`."""
        return self._jvp.coarsest

    def __call__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        tangents: Mapping[str, Tangent],
        before_unconfirmed: Callable[[], None] = _nothing,
    ) -> tuple[Tensor, Tensor]:
        params = slots_of(model).params
        if self._writes_wider:
            tangents = all_dense(tangents)
        moving = {id(params[name]): tangent for name, tangent in tangents.items()}
        try:
            with saved_tensor_hooks_as_they_were():
                loss_fn = _with_defaults_as_keywords(loss_fn)
                found, computed = self._jvp(moving, loss_fn, model, before_unconfirmed=before_unconfirmed)
        except WritesWider:  # while it is traced, so nothing has run
            if self._writes_wider:
                raise
            self._writes_wider = True
            return self(model, loss_fn, tangents, before_unconfirmed)
        losses = check_losses(found)
        derivatives = next((tangent for value, tangent in computed if value is losses), None)
        if derivatives is None:
            raise NoTangent(NO_TANGENT)
        return losses, padded(derivatives, num_of(tangents))


def _loss(loss_fn: LossFn, model: nn.Module) -> Tensor:
    return loss_fn(model)


def _with_defaults_as_keywords(loss_fn: LossFn) -> Callable[[Any], Tensor]:
    """The same function. In torch 2.11 Dynamo guards keywords, but does not distinguish functions by their defaults."""
    if not isinstance(loss_fn, FunctionType) or not loss_fn.__defaults__:
        return loss_fn
    code = loss_fn.__code__
    names = code.co_varnames[code.co_argcount - len(loss_fn.__defaults__) : code.co_argcount]
    return partial(loss_fn, **dict(zip(names, loss_fn.__defaults__, strict=True)))


class _Form(NamedTuple):
    """A tangent as plain tensors, and a function that rebuilds it from them."""

    parts: tuple[Tensor, ...]
    key: tuple[Any, ...]
    remake: Callable[..., Tangent]


def _form_of(tangent: Any) -> _Form:
    if isinstance(tangent, LowRankTangent):
        rank, shape = tangent.rank, tangent.shape
        parts = (tangent.left, tangent.right)
        return _Form(parts, (*map(_layout, parts), rank), lambda left, right: LowRankTangent(left, right, rank, shape))
    if isinstance(tangent, LastTangent):
        num = tangent.num
        return _Form((tangent.last,), (_layout(tangent.last), num), lambda last: LastTangent(last, num))
    if not isinstance(tangent, Tensor):
        raise UnsupportedByEngine(f"{type(tangent).__name__} is not a tensor")
    return _Form((tangent,), _layout(tangent), lambda t: t)


def _layout(x: Tensor) -> tuple[Any, ...]:
    return x.shape, x.stride(), x.dtype


def _derived(
    graph: fx.GraphModule, inputs: tuple[Any, ...], moving: list[int], forms: list[_Form]
) -> tuple[fx.GraphModule, list[Any]]:
    """A graph of the calls of `graph` with tangents at the inputs `moving`, and its arguments: (*inputs, *parts).

    Its outputs are those of `graph`, each followed by its tangents or None.
    """
    if not moving or next(graph.parameters(), None) is not None:
        raise UnsupportedByEngine("the parameters are not inputs of the traced graph")

    def along(*tensors: Any) -> list[Tensor | None]:
        values, parts = list(tensors[: len(inputs)]), iter(tensors[len(inputs) :])
        draws = TracedDraws()
        tangents = {i: form.remake(*(next(parts) for _ in form.parts)) for i, form in zip(moving, forms, strict=True)}
        with running_pass(draws=draws) as running:
            running.width = width_of(tangents)
            for i, tangent in tangents.items():
                values[i] = Dual(values[i], tangent)
            with torch.enable_grad(), draws:
                outputs = graph.forward(*values)
            with plain_tensors():
                return [part for out in outputs for part in _unpacked(out)]

    flat = [x.detach() if isinstance(x, Tensor) else x for x in inputs]
    flat += [part for form in forms for part in form.parts]
    with no_fake_tensor_cache():
        return make_fx(along, tracing_mode="fake")(*flat), flat


def _coarsest(graph: fx.GraphModule) -> torch.dtype | None:
    """The least precise dtype of the numbers that the graph computes, such as bfloat16 under autocast."""
    computed = [node.meta.get("val") for node in graph.graph.nodes if node.op == "call_function"]
    dtypes = {x.dtype for x in computed if isinstance(x, Tensor) and x.is_floating_point()}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=None)


def _unpacked(out: Any) -> tuple[Any, Any]:
    if not isinstance(out, Tensor):
        raise UnsupportedByEngine(f"the traced loss returns a {type(out).__name__}")
    return (out.primal, out.tangent) if isinstance(out, Dual) else (out, None)
