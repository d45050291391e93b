"""Checks on one batch, before training, that a model satisfies the assumptions of gradient estimators."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.errors import AssumptionError, UserError
from fgtrain.estimators import Backprop, Estimate, GradientEstimator
from fgtrain.forward_ad import directional_derivatives
from fgtrain.forward_ad.passes import LossFn, plain_losses
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import keyed_generator

_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


def self_check(model: nn.Module, loss_fn: LossFn, estimator: GradientEstimator) -> list[str]:
    """Try an estimator on a model; parameters, buffers and random states are restored.

    Two evaluations with one seed must agree, and the parameters must not change. The loss and the derivative along the
    gradient must equal those of backpropagation. The gradient must too, if the method claims to be exact. Facts that
    may be intended are only reported: a loss that depends on a buffer that the model changes, parameters without a
    gradient, and a loss whose change disagrees with its derivative, as after .detach(), .item() or rounding.

    Args:
        model: the model, in training mode if it is trained so.
        loss_fn: the loss, as for an estimator.
        estimator: the estimator of the run.

    Returns:
        The reports, one sentence each.

    Raises:
        AssumptionError: the model cannot be trained with these gradients; the message says why.
    """
    trial = _Trial(model, loss_fn)
    state = {name: value.clone() for name, value in estimator.state_dict().items()}

    def evaluate() -> Estimate:
        trial.snapshot.restore()
        estimator.load_state_dict(state)
        return estimator(model, loss_fn, generator=keyed_generator(0))

    try:
        first, second = evaluate(), evaluate()
        if not _is_finite(first):
            return []  # training counts and reports this itself
        trial.refuse_changed_params()
        tolerance = _tolerance(first)
        if not _agree(first, second, tolerance):
            raise AssumptionError(
                f"self-check: two evaluations with the same seed differ (losses {first.loss:.6g} and "
                f"{second.loss:.6g}); {_first_difference(trial)} draws random numbers that no generator of torch, "
                "numpy or Python's random controls, or keeps its own state between calls"
            )
        reference = trial.backpropagated()
        if reference is not None:
            _refuse_another_function(estimator, first, reference, tolerance)
        noticed = list(_changing_buffers(trial))
        if reference is not None:
            noticed += _without_gradient(trial, reference.grads)
            norm = _norm(reference.grads)
            if norm and math.isfinite(norm):
                if first.directional_derivatives is not None:
                    _refuse_other_derivative(trial, reference.grads, norm, tolerance)
                if tolerance <= 0.01:  # else differences of losses would only be rounding errors
                    noticed += _hidden_change(trial, reference.grads, norm)
        return noticed
    finally:
        estimator.load_state_dict(state)
        trial.snapshot.restore()


class _Trial:
    """A model and its loss. Every evaluation starts from the state in which the model was given.

    Args:
        model: the model.
        loss_fn: its loss.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn) -> None:
        self.model = model
        self.loss_fn = loss_fn
        self.snapshot = Snapshot(model)
        self._values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def refuse_changed_params(self) -> None:
        """Raise if a pass has changed a parameter."""
        for name, p in self.model.named_parameters():
            if not torch.equal(p, self._values[name]):
                raise AssumptionError(f"self-check: the model changes its own parameter {name!r} in its forward pass")

    def backpropagated(self) -> Estimate | None:
        """The estimate of backpropagation; None if it is impossible, so that there is no reference."""
        self.snapshot.restore()
        try:
            return Backprop()(self.model, self.loss_fn)
        except (UserError, NotImplementedError, torch.OutOfMemoryError):
            return None

    def derivative_along(self, v: Mapping[str, Tensor]) -> float | None:
        """The derivative by forward mode; None if the model has none, so that other methods train it."""
        self.snapshot.restore()
        tangents = {name: t.unsqueeze(0) for name, t in v.items()}
        try:
            return float(directional_derivatives(self.model, self.loss_fn, tangents)[1])
        except UserError:
            return None

    def difference_along(self, v: Mapping[str, Tensor], step: float) -> tuple[float, float]:
        """The central difference of the mean loss, and a bound of its rounding error."""
        losses = []
        for sign in (1, -1):
            self.snapshot.restore()
            with self.moved({name: sign * step * t for name, t in v.items()}):
                losses.append(float(plain_losses(self.model, self.loss_fn).double().mean()))
        eps = torch.finfo(next(iter(v.values())).dtype).eps
        return (losses[0] - losses[1]) / (2 * step), 20 * eps * max(map(abs, losses)) / step

    @contextmanager
    def moved(self, changes: Mapping[str, Tensor]) -> Generator[None]:
        """A context in which `changes` are added to the parameters."""
        params = dict(self.model.named_parameters())
        try:
            with torch.no_grad():
                for name, change in changes.items():
                    params[name].copy_(self._values[name] + change)
            yield
        finally:
            with torch.no_grad():
                for name in changes:
                    params[name].copy_(self._values[name])


def _is_finite(estimate: Estimate) -> bool:
    return all(bool(x.isfinite().all()) for x in (estimate.loss, *estimate.grads.values()))


def _tolerance(estimate: Estimate) -> float:
    """A relative tolerance, well above rounding errors."""
    dtypes = {g.dtype for g in estimate.grads.values()}
    mixed = torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
    return 0.1 if mixed else max((_TOLERANCE.get(dtype, 0.1) for dtype in dtypes), default=0.1)


def _agree(first: Estimate, second: Estimate, tolerance: float) -> bool:
    pairs = [(first.loss, second.loss), *((g, second.grads[name]) for name, g in first.grads.items())]
    return all((a - b).abs().max() <= tolerance * a.abs().max() for a, b in pairs if a.numel())


def _refuse_another_function(
    estimator: GradientEstimator, estimate: Estimate, reference: Estimate, tolerance: float
) -> None:
    """Raise if the method has evaluated another function than the model and its loss."""
    method = type(estimator).__name__
    loss, expected = float(estimate.loss), float(reference.loss)
    if estimator.loss_at_parameters and abs(loss - expected) > tolerance * abs(expected):
        raise AssumptionError(
            f"self-check: the loss is {loss:.6g} by {method} and {expected:.6g} by a plain pass: the method runs "
            "another network than the model, or the model differs without gradients; train with another method"
        )
    if "exact" not in estimator.claims:
        return
    total = _norm(reference.grads)
    for name, g in reference.grads.items():
        allowed = tolerance * (g.norm() + 1e-3 * total)  # a gradient that cancels to zero is left with rounding errors
        if name not in estimate.grads or (estimate.grads[name] - g).norm() > allowed:
            raise AssumptionError(
                f"self-check: {method} claims to be exact, but its gradient for parameter {name!r} differs from "
                "backpropagation's; train with another method"
            )


def _first_difference(trial: _Trial) -> str:
    """The module whose output is the first to differ between two equal passes."""
    passes: list[list[tuple[str, Tensor]]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                passes[-1].append((name, output.detach().clone()))

        return hook

    model = trial.model
    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    try:
        for _ in range(2):
            trial.snapshot.restore()
            passes.append([])
            plain_losses(model, trial.loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    for (name, a), (_, b) in zip(*passes, strict=False):
        if a.shape != b.shape or not torch.equal(a, b):
            return f"module {name!r} ({type(model.get_submodule(name)).__name__})"
    return "the loss function"


def _changing_buffers(trial: _Trial) -> Iterator[str]:
    """Report buffers that forward passes change and the loss depends on."""
    losses, changed, model = [], [], trial.model
    trial.snapshot.restore()
    for _ in range(2):
        values = {name: b.clone() for name, b in model.named_buffers()}
        trial.snapshot.restore_random_state()
        losses.append(plain_losses(model, trial.loss_fn).mean())
        changed = [name for name, b in model.named_buffers() if not torch.equal(b, values[name])]
    if changed and not torch.allclose(losses[0], losses[1], rtol=1e-5):
        yield (
            f"the loss depends on state that the model changes in its forward pass (buffers {', '.join(changed)}): "
            "every evaluation of the same batch gives another function"
        )


def _without_gradient(trial: _Trial, grads: Mapping[str, Tensor]) -> Iterator[str]:
    """Report parameters with zero gradient here and at nearby values; so adapters that start at 0 are not reported."""
    params, generator = trainable_params(trial.model), keyed_generator(0)

    def is_silent(name: str, grads: Mapping[str, Tensor]) -> bool:
        return name not in grads or not grads[name].any()

    silent = [name for name, p in params.items() if p.numel() and is_silent(name, grads)]
    if not silent:
        return
    with trial.moved({name: 0.01 * torch.randn(p.shape, generator=generator).to(p) for name, p in params.items()}):
        elsewhere = trial.backpropagated()
    silent = [name for name in silent if elsewhere is not None and is_silent(name, elsewhere.grads)]
    if silent:
        names = ", ".join(map(repr, silent[:3])) + f" and {len(silent) - 3} more" * (len(silent) > 3)
        yield (
            f"no gradient reaches {names}: the loss does not depend on it, or something between it and the loss is "
            "hidden from differentiation (.detach(), .item(), NumPy)"
        )


def _norm(grads: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))


def _refuse_other_derivative(trial: _Trial, grads: Mapping[str, Tensor], norm: float, tolerance: float) -> None:
    """Raise if forward mode and reverse mode disagree about the derivative along the gradient."""
    direction = {name: g / norm for name, g in grads.items()}
    forward = trial.derivative_along(direction)
    if forward is not None and abs(forward - norm) > tolerance * norm:
        name = _farthest(grads, direction, lambda v: trial.derivative_along(v) or 0.0)
        raise AssumptionError(
            f"self-check: the derivative along the gradient is {forward:.6g} by forward mode and {norm:.6g} by "
            f"backpropagation, with the largest difference for parameter {name!r}; a custom autograd.Function may have "
            "a jvp that disagrees with its backward"
        )


def _hidden_change(trial: _Trial, grads: Mapping[str, Tensor], norm: float) -> Iterator[str]:
    """Report a change of the loss along the gradient that the derivative does not predict."""
    direction = {name: g / norm for name, g in grads.items()}
    step = torch.finfo(next(iter(direction.values())).dtype).eps ** (1 / 3)
    while True:  # the error of the difference falls with the step; that of a hidden part does not
        change, floor = trial.difference_along(direction, step)
        if abs(change - norm) <= 0.05 * norm + floor:
            return
        if 10 * floor > 0.2 * norm:  # the next difference would only be a rounding error
            break
        step /= 10
    if math.isfinite(change):
        name = _farthest(grads, direction, lambda v: trial.difference_along(v, step)[0])
        yield (
            f"along the gradient the loss changes by {change:.4g} per unit, but its derivative is {norm:.4g}, with the "
            f"largest difference for parameter {name!r}: something between it and the loss is hidden from "
            "differentiation (.detach(), .item(), NumPy, rounding, a branch on values)"
        )


def _farthest(
    grads: Mapping[str, Tensor], direction: Mapping[str, Tensor], derivative: Callable[[Mapping[str, Tensor]], float]
) -> str:
    """The parameter along whose part of `direction` a derivative differs most from the gradient's."""
    apart = {name: abs(derivative({name: v}) - float((grads[name] * v).sum())) for name, v in direction.items()}
    return max(apart, key=apart.__getitem__)
