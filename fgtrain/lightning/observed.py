"""A user's training_step as a loss function: logs and metrics count once, however often it is called."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from fgtrain._torch import tree_map
from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.errors import LossError
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.native import primal_of
from fgtrain.lightning.divergence import Divergence

LossFn = Callable[[Any], Tensor]
BACKWARD_CALLED = (
    "training_step calls backward itself; return the loss and leave its gradient to the estimator "
    "(for a backward pass of your own, call the estimator in a training_step under manual optimization)"
)


class _Skipped(BaseException):
    """The user's training_step returned None. A BaseException, so that no engine handles it as an error."""


class ObservedStep:
    """Runs the training_step of a module under an estimator.

    Args:
        estimator: the source of the gradients.
        seed: the seed of its directions.
        tangents: whether ranks share the directions.
        user_step: training_step as the user's class defines it.
        divergence: checks the estimates.
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
        self.divergence = divergence or Divergence(detect_divergence=1000.0)
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
        """The return value of training_step for Lightning: the user's output without tangents, with the estimated loss.

        It is None, which skips the batch, if the user's step returned None or the estimate is not finite.
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
        """The estimate, without logging and without a change of metrics; None if training_step skips the batch."""
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
        """The estimate, or None if the batch is skipped, and the return value of training_step."""
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
        """Return the gradients of the last batch and forget them."""
        grads, self._grads = self._grads, {}
        return grads

    def keep_log(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Keep a value to log later while the loss function runs; returns False at any other time."""
        if self._running:
            self._logs.append(_Log(name, without_tangents(value), args, kwargs))
        return self._running


class _Log:
    """A call of `log`, made after the step.

    Args:
        name: the logged name.
        value: a number, a tensor or a metric. For a metric, its last result is kept here, since it may change.
        args: the other positional arguments.
        kwargs: the keyword arguments.
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
    """The same nested values with tensors reduced to their values: no tangent, no graph."""
    return tree_map(lambda x: primal_of(x).detach() if isinstance(x, Tensor) else x, tree)


class _Kept:
    """A copy of the state that a training step may change: attributes of the module, its lists, metrics.

    A metric is copied when it is first used, so it may be stored anywhere, and unused metrics cost nothing.

    Args:
        module: the module of the step.
        is_compiled: whether the step is compiled. Its use of metrics is not noticed, so all metrics of the module are
            copied.
    """

    def __init__(self, module: nn.Module, *, is_compiled: bool) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._lengths = [(x, len(x)) for x in self._attributes.values() if isinstance(x, list)]  # lists that may grow
        self._metrics: dict[int, tuple[Metric, dict[str, Any]]] = {}  # by id, as a metric's hash depends on its state
        for part in module.modules():
            if isinstance(part, Metric if is_compiled else WrapperMetric):  # wrappers change unnoticed
                self._notice(part)

    @contextmanager
    def metrics_noticed(self) -> Generator[None]:
        """A context that copies a metric before it changes: a change begins with its cached result or its count."""
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
        """Restore the state before the step."""
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
        """Reduce the state of metrics to values; the engine handles other parts, see `forward_ad.kept`."""
        for metric, _ in self._metrics.values():
            vars(metric).update({name: _value_of(value) for name, value in _attributes_of(metric)})


class _Noticed:
    """An attribute of metrics that calls `notice` before it is set."""

    notice: Callable[[Metric], None]

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, metric: Metric, owner: type) -> Any:
        return vars(metric)[self.name]

    def __set__(self, metric: Metric, value: Any) -> None:
        if not torch.compiler.is_compiling() and self.name in vars(metric):  # else the metric is being constructed
            self.notice(metric)
        vars(metric)[self.name] = value


_NOTICED = (_Noticed("_computed"), _Noticed("_update_count"))  # created once, as compiled code has guards on them
_OF_MODULES = frozenset(vars(nn.Module()))


def _attributes_of(metric: Metric) -> list[tuple[str, Any]]:
    """The attributes of a metric, its states included, without parameters, buffers and submodules."""
    return [(name, value) for name, value in vars(metric).items() if name not in _OF_MODULES]


def _copied(x: Any) -> Any:
    """A copy of tensors, lists and dicts as by copy.deepcopy; other objects are returned uncopied."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list):
        return [_copied(value) for value in x]
    if type(x) is dict:
        return {key: _copied(value) for key, value in x.items()}
    return x


def _value_of(x: Any) -> Any:
    """An attribute of a metric after the step: the same lists and dicts, with tensors reduced to values."""
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
