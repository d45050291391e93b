"""Checks on one batch, before training, that a model satisfies the assumptions of gradient estimators."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.errors import AssumptionError, UserError
from fgtrain.estimators import Backprop, Estimate, GradientEstimator
from fgtrain.forward_ad import directional_derivatives
from fgtrain.forward_ad.native import LossFn
from fgtrain.forward_ad.passes import plain_losses
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
    snapshot = Snapshot(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    state = {name: value.clone() for name, value in estimator.state_dict().items()}

    def evaluate() -> Estimate:
        snapshot.restore()
        estimator.load_state_dict(state)
        return estimator(model, loss_fn, generator=keyed_generator(0))

    try:
        first, second = evaluate(), evaluate()
        if not _is_finite(first):
            return []  # training counts and reports this itself
        _refuse_changed(model, before)
        tolerance = _tolerance(first)
        if not _agree(first, second, tolerance):
            where = _first_difference(model, loss_fn, snapshot)
            raise AssumptionError(
                f"self-check: two evaluations with the same seed differ (losses {first.loss:.6g} and "
                f"{second.loss:.6g}); {where} draws random numbers that no generator of torch, numpy or Python's "
                "random controls, or keeps its own state between calls"
            )
        reference = _backpropagated(model, loss_fn, snapshot)
        if reference is not None:
            _refuse_another_function(estimator, first, reference, tolerance)
        noticed = list(_changing_buffers(model, loss_fn, snapshot))
        if reference is not None:
            noticed += _without_gradient(model, loss_fn, reference.grads, snapshot, before)
            _refuse_other_derivative(model, loss_fn, first, reference.grads, snapshot)
            noticed += _hidden_change(model, loss_fn, first, reference.grads, snapshot, before)
        return noticed
    finally:
        estimator.load_state_dict(state)
        snapshot.restore()


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


def _refuse_changed(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, p in model.named_parameters():
        if not torch.equal(p, before[name]):
            raise AssumptionError(f"self-check: the model changes its own parameter {name!r} in its forward pass")


def _backpropagated(model: nn.Module, loss_fn: LossFn, snapshot: Snapshot) -> Estimate | None:
    snapshot.restore()
    try:
        return Backprop()(model, loss_fn)
    except (UserError, NotImplementedError, torch.OutOfMemoryError):
        return None  # there is no reference


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
    total = math.sqrt(sum(float(g.double().square().sum()) for g in reference.grads.values()))
    for name, g in reference.grads.items():
        allowed = tolerance * (g.norm() + 1e-3 * total)  # a gradient that cancels to zero is left with rounding errors
        if name not in estimate.grads or (estimate.grads[name] - g).norm() > allowed:
            raise AssumptionError(
                f"self-check: {method} claims to be exact, but its gradient for parameter {name!r} differs from "
                "backpropagation's; train with another method"
            )


def _first_difference(model: nn.Module, loss_fn: LossFn, snapshot: Snapshot) -> str:
    """The module whose output is the first to differ between two equal passes."""
    passes: list[list[tuple[str, Tensor]]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                passes[-1].append((name, output.detach().clone()))

        return hook

    handles = [module.register_forward_hook(record(name)) for name, module in model.named_modules()]
    try:
        for _ in range(2):
            snapshot.restore()
            passes.append([])
            plain_losses(model, loss_fn)
    finally:
        for handle in handles:
            handle.remove()
    for (name, a), (_, b) in zip(*passes, strict=False):
        if a.shape != b.shape or not torch.equal(a, b):
            return f"module {name!r} ({type(model.get_submodule(name)).__name__})"
    return "the loss function"


def _changing_buffers(model: nn.Module, loss_fn: LossFn, snapshot: Snapshot) -> Iterator[str]:
    """Buffers that forward passes change and the loss depends on."""
    losses, changed = [], []
    snapshot.restore()
    for _ in range(2):
        values = {name: b.clone() for name, b in model.named_buffers()}
        snapshot.restore_random_state()
        losses.append(plain_losses(model, loss_fn).mean())
        changed = [name for name, b in model.named_buffers() if not torch.equal(b, values[name])]
    if changed and not torch.allclose(losses[0], losses[1], rtol=1e-5):
        yield (
            f"the loss depends on state that the model changes in its forward pass (buffers {', '.join(changed)}): "
            "every evaluation of the same batch gives another function"
        )


def _without_gradient(
    model: nn.Module,
    loss_fn: LossFn,
    grads: Mapping[str, Tensor],
    snapshot: Snapshot,
    before: Mapping[str, Tensor],
) -> Iterator[str]:
    """Report parameters with zero gradient here and at nearby values; so adapters that start at 0 are not reported."""
    params, generator = trainable_params(model), keyed_generator(0)

    def is_silent(name: str, grads: Mapping[str, Tensor]) -> bool:
        return name not in grads or not grads[name].any()

    silent = [name for name, p in params.items() if p.numel() and is_silent(name, grads)]
    if not silent:
        return
    try:
        with torch.no_grad():
            for p in params.values():
                p.add_(0.01 * torch.randn(p.shape, generator=generator).to(p))
        elsewhere = _backpropagated(model, loss_fn, snapshot)
    finally:
        with torch.no_grad():
            for name, p in params.items():
                p.copy_(before[name])
    silent = [name for name in silent if elsewhere is not None and is_silent(name, elsewhere.grads)]
    if silent:
        names = ", ".join(map(repr, silent[:3])) + f" and {len(silent) - 3} more" * (len(silent) > 3)
        yield (
            f"no gradient reaches {names}: the loss does not depend on it, or something between it and the loss is "
            "hidden from differentiation (.detach(), .item(), NumPy)"
        )


def _along(grads: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    """The norm of a gradient and the unit direction along it; empty if the norm is 0 or not finite."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads.values()))
    return norm, {name: g / norm for name, g in grads.items()} if norm and math.isfinite(norm) else {}


def _refuse_other_derivative(
    model: nn.Module, loss_fn: LossFn, estimate: Estimate, grads: Mapping[str, Tensor], snapshot: Snapshot
) -> None:
    """Raise if forward mode and reverse mode disagree about the derivative along the gradient."""
    norm, direction = _along(grads)
    if not direction or estimate.directional_derivatives is None:
        return
    forward = _forward_mode(model, loss_fn, direction, snapshot)
    if forward is not None and abs(forward - norm) > _tolerance(estimate) * norm:
        apart = {
            name: abs((_forward_mode(model, loss_fn, {name: v}, snapshot) or 0.0) - float((grads[name] * v).sum()))
            for name, v in direction.items()
        }
        raise AssumptionError(
            f"self-check: the derivative along the gradient is {forward:.6g} by forward mode and {norm:.6g} by "
            f"backpropagation, with the largest difference for parameter {max(apart, key=apart.__getitem__)!r}; a "
            "custom autograd.Function may have a jvp that disagrees with its backward"
        )


def _hidden_change(
    model: nn.Module,
    loss_fn: LossFn,
    estimate: Estimate,
    grads: Mapping[str, Tensor],
    snapshot: Snapshot,
    before: Mapping[str, Tensor],
) -> Iterator[str]:
    """Report a change of the loss along the gradient that the derivative does not predict."""
    norm, direction = _along(grads)
    if not direction or _tolerance(estimate) > 0.01:  # then differences of losses would only be rounding errors
        return
    step = torch.finfo(next(iter(direction.values())).dtype).eps ** (1 / 3)
    while True:  # the error of the difference falls with the step; that of a hidden part does not
        change, floor = _difference(model, loss_fn, direction, snapshot, before, step)
        if abs(change - norm) <= 0.05 * norm + floor:
            return
        if 10 * floor > 0.2 * norm:  # the next difference would only be a rounding error
            break
        step /= 10
    if math.isfinite(change):
        apart = {}
        for name, v in direction.items():
            one, _ = _difference(model, loss_fn, {name: v}, snapshot, before, step)
            apart[name] = abs(one - float((grads[name] * v).sum()))
        yield (
            f"along the gradient the loss changes by {change:.4g} per unit, but its derivative is {norm:.4g}, with the "
            f"largest difference for parameter {max(apart, key=apart.__getitem__)!r}: something between it and the "
            "loss is hidden from differentiation (.detach(), .item(), NumPy, rounding, a branch on values)"
        )


def _forward_mode(model: nn.Module, loss_fn: LossFn, v: Mapping[str, Tensor], snapshot: Snapshot) -> float | None:
    snapshot.restore()
    try:
        _, derivative = directional_derivatives(model, loss_fn, {name: t.unsqueeze(0) for name, t in v.items()})
    except UserError:  # the model has no forward mode, so other methods train it
        return None
    return float(derivative)


def _difference(
    model: nn.Module,
    loss_fn: LossFn,
    direction: Mapping[str, Tensor],
    snapshot: Snapshot,
    before: Mapping[str, Tensor],
    step: float,
) -> tuple[float, float]:
    """Central difference of the mean loss along `direction`, and a bound of its rounding error."""
    params = trainable_params(model)
    eps = torch.finfo(next(iter(direction.values())).dtype).eps
    losses = []
    try:
        with torch.no_grad():
            for sign in (1, -1):
                snapshot.restore()
                for name, v in direction.items():
                    params[name].copy_(before[name] + sign * step * v)
                losses.append(float(plain_losses(model, loss_fn).double().mean()))
    finally:
        with torch.no_grad():
            for name in direction:
                params[name].copy_(before[name])
    return (losses[0] - losses[1]) / (2 * step), 20 * eps * max(map(abs, losses)) / step
