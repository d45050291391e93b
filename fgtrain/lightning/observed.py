"""A user's training_step as a loss function: however often it is run, what it logs and measures counts once."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from fgtrain._torch import tree_map
from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.errors import LossError
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.forward_ad.dual import Dual
from fgtrain.lightning.divergence import Divergence

LossFn = Callable[[Any], Tensor]
BACKWARD_CALLED = (
    "training_step calls backward itself; return the loss and leave its gradient to the estimator "
    "(for a backward pass of your own, call the estimator in a training_step under manual optimization)"
)


class _Skipped(BaseException):
    """The user's training_step returned None: no error, and nothing that an engine should take for one."""


class ObservedStep:
    """Runs the training_step of a module under an estimator.

    Args:
        estimator: where gradients come from.
        seed: key of its directions.
        tangents: whether ranks share them.
        user_step: training_step as the user's class defines it.
        divergence: judges the estimates.
    """

    def __init__(
        self,
        estimator: GradientEstimator,
        seed: int,
        tangents: TangentsOver,
        user_step: Callable[..., Any],
        divergence: Divergence | None = None,
    ) -> None:
        self.estimator = estimator
        self.seed = seed
        self.tangents: TangentsOver = tangents
        self.ranks = Ranks()
        self.user_step = user_step
        self.divergence = divergence or Divergence()
        self._grads: dict[str, Tensor] = {}
        self._logs: list[_Log] = []
        self._running = False

    def run(
        self,
        module: Any,
        args: tuple[Any, ...],
        estimate: Callable[[LossFn], Estimate],
        is_sound: Callable[[Estimate], bool],
    ) -> Any:
        """What training_step returns to Lightning: the user's output without tangents, and the estimated loss.

        None, which skips the batch, if the user's does or the estimate is not sound.
        """
        found, output = self._observe(module, args, estimate, self._keep(module))
        for log in self._logs:
            log.replay(module)
        self._logs.clear()
        if found is None or not is_sound(found):
            return None
        self._grads = found.grads
        extra = without_tangents(dict(output)) if isinstance(output, Mapping) else {}
        if found.directional_derivatives is not None:
            extra["directional_derivatives"] = found.directional_derivatives
        return extra | {"loss": found.loss}

    def look(self, module: Any, args: tuple[Any, ...], estimate: Callable[[LossFn], Estimate]) -> Estimate | None:
        """The estimate alone: nothing is logged, and metrics stay as they were; None where training_step skips."""
        kept = self._keep(module)
        try:
            return self._observe(module, args, estimate, kept)[0]
        finally:
            self._logs.clear()
            kept.restore()

    def _observe(
        self,
        module: Any,
        args: tuple[Any, ...],
        estimate: Callable[[LossFn], Estimate],
        kept: "_Kept",
    ) -> tuple[Estimate | None, Any]:
        """An estimate, None if the batch is skipped, and what training_step returned."""
        output: Any = None

        def loss_fn(model: nn.Module) -> Tensor:
            nonlocal output
            self._logs.clear()
            kept.restore()
            with _backward_refused(), kept.metrics_noticed():
                output = self.user_step(module, *args)
            return _loss_of(output)

        self._running, found = True, None
        try:
            found = estimate(loss_fn)
        except _Skipped:
            pass
        finally:
            self._running = False
            kept.drop_tangents()
        return found, output

    def _keep(self, module: Any) -> "_Kept":
        return _Kept(module, is_compiled=hasattr(self.user_step, "_torchdynamo_orig_callable"))

    def take_grads(self) -> dict[str, Tensor]:
        """The gradients of the last batch, once."""
        grads, self._grads = self._grads, {}
        return grads

    def keep_log(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take a value to log while the loss function runs; False at any other time."""
        if self._running:
            self._logs.append(_Log(name, without_tangents(value), args, kwargs))
        return self._running


class _Log:
    """A call of `log`, to be made after the step.

    Args:
        name: of what is logged.
        value: a number, a tensor or a metric; of a metric, its last result is logged, and that may change by then.
        args: what follows.
        kwargs: by name.
    """

    def __init__(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._call = name, value, args, kwargs
        self._result = without_tangents(value._forward_cache) if isinstance(value, Metric) else None

    def replay(self, module: Any) -> None:
        name, value, args, kwargs = self._call
        if not isinstance(value, Metric):
            module.log(name, value, *args, **kwargs)
            return
        result, value._forward_cache = value._forward_cache, self._result
        module.log(name, value, *args, **kwargs)
        value._forward_cache = result


def _loss_of(output: Any) -> Tensor:
    if output is None:
        raise _Skipped
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        found = f"a dict with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else repr(output)
        raise LossError(f'training_step must return a loss, a dict with "loss", or None to skip the batch; got {found}')
    return loss


def without_tangents(tree: Any) -> Any:
    """A nest of values in which every tensor is its value alone: no tangent, no graph."""

    def value(x: Any) -> Any:
        if isinstance(x, Dual):
            return x.primal
        return fwAD.unpack_dual(x).primal.detach() if isinstance(x, Tensor) else x

    return tree_map(value, tree)


class _Kept:
    """What a training step changes besides the loss, to be put back: attributes of the module, its lists, metrics.

    Metrics are found where they are used, so they may be held anywhere, and unused ones cost nothing.

    Args:
        module: of the step.
        is_compiled: the step is, and finds nothing: the metrics among the module's parts are taken instead.
    """

    def __init__(self, module: nn.Module, *, is_compiled: bool) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._lengths = [(x, len(x)) for x in self._attributes.values() if isinstance(x, list)]  # they grow
        self._metrics: dict[int, tuple[Metric, dict[str, Any]]] = {}  # by id: a metric's hash is that of its state
        for part in module.modules():
            if isinstance(part, Metric if is_compiled else WrapperMetric):  # wrappers change before they can be noticed
                self._notice(part)

    @contextmanager
    def metrics_noticed(self) -> Generator[None]:
        """A context in which a metric is remembered before it changes: it drops its result or its count first."""
        try:
            for noticed in _NOTICED:
                noticed.notice = self._notice
                setattr(Metric, noticed.name, noticed)
            yield
        finally:
            for noticed in _NOTICED:
                delattr(Metric, noticed.name)

    def _notice(self, metric: Metric) -> None:
        if id(metric) not in self._metrics:
            self._metrics[id(metric)] = metric, {name: _copied(value) for name, value in _attributes_of(metric)}

    def restore(self) -> None:
        """Put everything back to where it was before the step."""
        kept = vars(self._module)
        for name in kept.keys() - self._attributes.keys():
            del kept[name]
        kept.update(self._attributes)
        for x, length in self._lengths:
            del x[length:]
        for metric, before in self._metrics.values():
            for name, _ in _attributes_of(metric):
                del vars(metric)[name]
            vars(metric).update({name: _copied(value) for name, value in before.items()})

    def drop_tangents(self) -> None:
        """Metrics go on with values alone; what other parts keep is the engine's to mark, see `forward_ad.kept`."""
        for metric, _ in self._metrics.values():
            vars(metric).update({name: _value_of(value) for name, value in _attributes_of(metric)})


class _Noticed:
    """An attribute of metrics whose change is noticed before it is made."""

    notice: Callable[[Metric], None]

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, metric: Metric, owner: type) -> Any:
        return vars(metric)[self.name]

    def __set__(self, metric: Metric, value: Any) -> None:
        if not torch.compiler.is_compiling() and self.name in vars(metric):  # else the metric is being made
            self.notice(metric)
        vars(metric)[self.name] = value


_NOTICED = (_Noticed("_computed"), _Noticed("_update_count"))  # made once: compiled code looks whether they changed
_OF_MODULES = frozenset(vars(nn.Module()))


def _attributes_of(metric: Metric) -> list[tuple[str, Any]]:
    """Its states among them, but no parameters, buffers and other modules."""
    return [(name, value) for name, value in vars(metric).items() if name not in _OF_MODULES]


def _copied(x: Any) -> Any:
    """As copy.deepcopy of tensors, lists and dicts; anything else is the same object."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list):
        return [_copied(value) for value in x]
    if type(x) is dict:
        return {key: _copied(value) for key, value in x.items()}
    return x


def _value_of(x: Any) -> Any:
    """What a metric keeps after the step: the same lists and dicts, with values alone in them."""
    if isinstance(x, Tensor):
        return without_tangents(x) if isinstance(x, Dual) or x.requires_grad else x
    if isinstance(x, list):
        x[:] = map(_value_of, x)
    elif isinstance(x, dict):
        x.update({key: _value_of(value) for key, value in x.items()})
    elif isinstance(x, tuple):
        return tree_map(_value_of, x)
    return x


@contextmanager
def _backward_refused() -> Generator[None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise LossError(BACKWARD_CALLED)

    places = [(torch.Tensor, torch.Tensor.backward), (torch.autograd, torch.autograd.backward)]
    try:
        for owner, _ in places:
            setattr(owner, "backward", refuse)
        yield
    finally:
        for owner, backward in places:
            setattr(owner, "backward", backward)
