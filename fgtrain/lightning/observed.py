"""A user's training_step as a loss function: logs and metrics count once, however often it is called."""

from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from fgtrain._torch import is_compiled_function
from fgtrain.distributed import Ranks, TangentsOver
from fgtrain.errors import LossError, NoTangent
from fgtrain.estimators import Estimate, GradientEstimator
from fgtrain.forward_ad.passes import LossFn
from fgtrain.lightning._lightning import last_result, set_last_result
from fgtrain.lightning.divergence import Divergence
from fgtrain.lightning.step_snapshot import BatchSnapshot, StepSnapshot, without_tangents

BACKWARD_CALLED = (
    "training_step calls backward itself; return the loss and leave its gradient to the estimator "
    "(for a backward pass of your own, call the estimator in a training_step under manual optimization)"
)


class _Skipped(BaseException):
    """The user's training_step returned None. It is a BaseException, so that no engine handles it as an error."""


class ObservedStep:
    """Runs the training_step of a module under an estimator.

    Args:
        estimator: the source of the gradients.
        seed: the seed of its directions.
        tangents: whether ranks share the directions.
        user_step: training_step as the user's class defines it.
        divergence: checks the estimates.

    Attributes:
        is_running: whether an estimator is calling the step.
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
        self.is_running = False

    def run(
        self,
        module: Any,
        args: tuple[Any, ...],
        estimate: Callable[[LossFn], Estimate],
        is_usable: Callable[[Estimate], bool],
    ) -> Any:
        """The return value of training_step for Lightning: the user's output without tangents, with the estimated loss.

        It is None, which skips the batch, if the user's step returned None or the estimate is not finite.
        """
        found, output = self._observe(module, args, estimate, self._snapshot(module), BatchSnapshot(args))
        for log in self._logs:
            log.replay(module)
        self._logs.clear()
        if found is None or not is_usable(found):
            return None
        self._grads = found.grads
        extra = without_tangents(dict(output)) if isinstance(output, Mapping) else {}
        if found.directional_derivatives is not None:
            extra["directional_derivatives"] = found.directional_derivatives
        return extra | {"loss": found.loss}

    def peek(self, module: Any, args: tuple[Any, ...], estimate: Callable[[LossFn], Estimate]) -> Estimate | None:
        """The estimate, without logging and without a change of metrics; None if training_step skips the batch."""
        snapshot, batch = self._snapshot(module), BatchSnapshot(args)
        try:
            found, _ = self._observe(module, args, estimate, snapshot, batch)
        finally:
            self._logs.clear()
            snapshot.restore()
        batch.restore()
        return found

    def _observe(
        self,
        module: Any,
        args: tuple[Any, ...],
        estimate: Callable[[LossFn], Estimate],
        snapshot: StepSnapshot,
        batch: BatchSnapshot,
    ) -> tuple[Estimate | None, Any]:
        """The estimate, or None if the batch is skipped, and the return value of training_step."""
        output: Any = None

        def loss_fn(model: nn.Module) -> Tensor:
            nonlocal output
            self._logs.clear()
            snapshot.restore()
            batch.restore()
            with _backward_refused(), snapshot.metrics_noticed():
                output = self.user_step(module, *args)
            return _loss_of(output)

        self.is_running, found = True, None
        try:
            found = estimate(loss_fn)
        except _Skipped:
            pass
        except NoTangent as error:
            raise NoTangent(f"{error}, or return None from training_step to skip the batch") from error
        finally:
            self.is_running = False
            snapshot.drop_tangents()
        return found, output

    def _snapshot(self, module: Any) -> StepSnapshot:
        return StepSnapshot(module, is_compiled=is_compiled_function(self.user_step))

    def take_grads(self) -> dict[str, Tensor]:
        """Return the gradients of the last batch and forget them."""
        grads, self._grads = self._grads, {}
        return grads

    def keep_log(self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Keep a value to log later while the loss function runs; returns False at any other time."""
        if self.is_running:
            self._logs.append(_Log(name, without_tangents(value), args, kwargs))
        return self.is_running


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
        self._result = without_tangents(last_result(value)) if isinstance(value, Metric) else None

    def replay(self, module: Any) -> None:
        name, value, args, kwargs = self._call
        if not isinstance(value, Metric):
            module.log(name, value, *args, **kwargs)
            return
        now = last_result(value)
        set_last_result(value, self._result)
        module.log(name, value, *args, **kwargs)
        set_last_result(value, now)


def _loss_of(output: Any) -> Tensor:
    if output is None:
        raise _Skipped
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor):
        found = f"a dict with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else repr(output)
        raise LossError(f'training_step must return a loss, a dict with "loss", or None to skip the batch; got {found}')
    return loss


@contextmanager
def _backward_refused() -> Generator[None]:
    """A context in which this thread cannot start a backward pass by `backward`."""
    thread = get_ident()

    def refusing(backward: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            if get_ident() == thread:
                raise LossError(BACKWARD_CALLED)
            backward(*args, **kwargs)

        return run

    places = [(torch.Tensor, torch.Tensor.backward), (torch.autograd, torch.autograd.backward)]
    try:
        for owner, backward in places:
            setattr(owner, "backward", refusing(backward))
        yield
    finally:
        for owner, backward in places:
            setattr(owner, "backward", backward)
