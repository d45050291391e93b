"""A user's training_step as a loss function: however often it is run, what it logs and measures counts once."""

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from torchmetrics import Metric

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
        self._logs: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = []
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
        found, output = self._observe(module, args, estimate, _metrics_of(module))
        for name, value, positional, keywords in self._logs:
            module.log(name, value, *positional, **keywords)
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
        metrics = _metrics_of(module)
        try:
            return self._observe(module, args, estimate, metrics)[0]
        finally:
            self._logs.clear()
            for metric in metrics:
                metric.restore()

    def _observe(
        self,
        module: Any,
        args: tuple[Any, ...],
        estimate: Callable[[LossFn], Estimate],
        metrics: "list[_MetricState]",
    ) -> tuple[Estimate | None, Any]:
        """An estimate, None if the batch is skipped, and what training_step returned."""
        output: Any = None

        def loss_fn(model: nn.Module) -> Tensor:
            nonlocal output
            self._logs.clear()
            for metric in metrics:
                metric.restore()
            with _backward_refused(), _values_only(metrics):
                output = self.user_step(module, *args)
            return _loss_of(output)

        self._running, found = True, None
        try:
            found = estimate(loss_fn)
        except _Skipped:
            pass
        finally:
            self._running = False
        return found, output

    def take_grads(self) -> dict[str, Tensor]:
        """The gradients of the last batch, once."""
        grads, self._grads = self._grads, {}
        return grads

    def keep_log(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Take a value to log while the loss function runs; False at any other time."""
        if self._running:
            self._logs.append((name, without_tangents(value), args, kwargs))
        return self._running


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


class _MetricState:
    """What a torchmetric has seen so far."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self._seen = metric._copy_state_dict()
        self._count = metric._update_count

    def restore(self) -> None:
        if self.metric._update_count != self._count:
            for name, value in self._seen.items():
                setattr(self.metric, name, value.clone() if isinstance(value, Tensor) else list(value))
            self.metric._update_count = self._count
            self.metric._computed = None


def _metrics_of(module: nn.Module) -> list[_MetricState]:
    return [_MetricState(m) for m in module.modules() if isinstance(m, Metric)]


@contextmanager
def _values_only(states: Iterable[_MetricState]) -> Generator[None]:
    """Metrics measure values; a tangent they kept would outlive its pass."""
    updates = [(state.metric, state.metric.update) for state in states]

    def on_values(update: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **kwargs: update(*without_tangents(args), **without_tangents(kwargs))

    try:
        for metric, update in updates:
            metric.update = on_values(update)
        yield
    finally:
        for metric, update in updates:
            metric.update = update


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
