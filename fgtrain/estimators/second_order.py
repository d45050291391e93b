"""Newton steps in the span of random directions, by forward mode over forward mode."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.gradients import average_grads
from fgtrain.forward_ad.named_errors import named_errors
from fgtrain.forward_ad.native import no_fast_paths
from fgtrain.forward_ad.passes import LossFn, check_losses
from fgtrain.forward_ad.second_derivatives import CorrectSecondDerivatives
from fgtrain.network.parameters import slots_of, trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import draw_seeds
from fgtrain.tangents import Normal, Tangents, law_or
from fgtrain.tangents.directions import dense


class SecondOrder(GradientEstimator):
    """Forward mode of second order: the Newton step in the span of K directions (FoMoH-KD).

    Formula: g = Q |H|^-1 Q^T grad f, where the columns of Q are an orthonormal basis of span(v_1 .. v_K) and
    H = Q^T (Hessian of f) Q. |H| has the absolute eigenvalues of H, each at least `damping` times the largest. So
    p - lr g with lr = 1 goes to the minimum of the quadratic model in the plane, and away from its saddle points. Only
    the span of the directions matters. Q^T grad f and H follow from d_k = grad f . v_k and v_j^T (Hessian of f) v_k.

    Bias: g is not an estimate of the gradient but a step. It is always a descent direction, because |H| is positive.

    Cost: one pass with K first and K^2 second derivatives, in K^2 times the memory of inference. On a small MLP it
    takes 10, 23 and 125 times a backprop step for K = 1, 4 and 16. The Hessian in the span is exact for all operations
    that PyTorch's forward mode can differentiate twice. The curvature of a ReLU network comes only from its loss. Each
    rank uses its own plane, and ranks exchange the whole gradient.

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1.
        damping: least eigenvalue of |H|, relative to the largest.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: an operation has no second derivative in forward mode.

    Source: Cobb, Baydin, Pearlmutter, Jha 2024, arXiv:2408.10419, section 4.

    A quadratic of two variables is minimised in one step:

    >>> model = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    >>> estimate = SecondOrder(num_tangents=2)(model, lambda m: (m["x"] * torch.tensor([3.0, 0.1])).square().sum())
    >>> torch.allclose(estimate.grads["x"], model["x"], atol=1e-3)
    True
    """

    scalar_reducible = False
    loss_at_parameters = False  # under torch.func, dropout may draw another mask
    claims: frozenset[Claim] = frozenset({"descent"})

    def __init__(self, tangents: Tangents | None = None, num_tangents: int = 4, *, damping: float = 1e-3) -> None:
        super().__init__()
        require_positive_int("num_tangents", num_tangents)
        if not 0 < damping <= 1:
            raise ValueError(f"damping must be above 0 and at most 1, got {damping!r}")
        self.tangents = law_or(tangents, Normal())
        self.num_tangents = self.directions_at_a_time = num_tangents
        self.damping = damping

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        return self.tangents.bytes_of(params)

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        params = trainable_params(model)
        seeds = draw_seeds(generator, self.num_tangents)
        directions = self.tangents.sample(params, seeds)
        tangents = {name: dense(tangent) for name, tangent in directions.items()}
        loss, slopes, curvature = curvature_in_span(model, loss_fn, tangents)
        grads = directions.weighted_sum(self._newton(directions.gram(), curvature, slopes))
        return Estimate(loss, average_grads(grads, params, reduce), slopes)

    def _newton(self, gram: Tensor, curvature: Tensor, slopes: Tensor) -> Tensor:
        """The weights of the directions, (K,), found in an orthonormal basis of their span; nan if a slope is."""
        if not curvature.isfinite().all():
            return torch.full_like(slopes, torch.nan)
        lengths, axes = torch.linalg.eigh(gram)
        keep = lengths > 1e-12 * lengths[-1]  # directions may be linearly dependent
        basis = axes[:, keep] * lengths[keep].rsqrt()  # (K, rank)
        sizes, vectors = torch.linalg.eigh(basis.mT @ curvature.double() @ basis)
        sizes = sizes.abs()
        sizes = sizes.clamp_min(self.damping * sizes.max()).clamp_min(torch.finfo(slopes.dtype).tiny)
        basis = basis @ vectors
        return (basis @ (basis.mT @ slopes.double() / sizes)).to(slopes.dtype)

    def extra_repr(self) -> str:
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, damping={self.damping}"


def curvature_in_span(
    model: nn.Module, loss_fn: LossFn, tangents: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean loss (), first derivatives (K,) and second derivatives (K, K) along K directions.

    Args:
        model: any module; afterwards its state is that after one plain pass.
        loss_fn: its loss function.
        tangents: {name: (K, *p.shape)}.
    """
    slots, snapshot = slots_of(model), Snapshot(model)
    jvp: Any = torch.func.jvp
    vmap: Any = torch.vmap
    names = list(tangents)
    params = tuple(slots.params[name].detach() for name in names)
    stacked = tuple(tangents[name] for name in names)
    calls = CorrectSecondDerivatives(slots.params)

    def loss_at(*values: Tensor) -> Tensor:
        moving = dict(zip(names, values, strict=True))
        calls.move(moving)
        with slots.params_replaced(moving), _own_buffers(model):
            return check_losses(loss_fn(model)).mean()

    def slope(values: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        return jvp(loss_at, values, v)

    def slopes(*values: Tensor) -> tuple[Tensor, Tensor]:
        return vmap(partial(slope, values), randomness="same", out_dims=(None, 0))(stacked)

    def row(v: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
        (loss, slope), (_, curvature) = jvp(slopes, params, v)
        return loss, slope, curvature

    snapshot.restore()
    # Gradients are enabled because PyTorch then chooses rules that can be differentiated again; no graph is recorded.
    with no_fast_paths(), calls, named_errors(model, second=True), torch.enable_grad():
        rows = vmap(row, randomness="same", out_dims=(None, None, 0))
        loss, first, second = rows(stacked)
    if any(True for _ in model.buffers()):
        snapshot.restore()
        loss_fn(model)
    return loss, first, (second + second.mT) / 2


class _own_buffers:  # noqa: N801 - a context manager used like a function
    """A context in which the model uses copies of its buffers: a derivative of a pass must not change its inputs."""

    def __init__(self, model: nn.Module) -> None:
        self._held = [(m._buffers, dict(m._buffers)) for m in model.modules() if m._buffers]

    def __enter__(self) -> None:
        for held, buffers in self._held:
            held.update({name: None if b is None else b.clone() for name, b in buffers.items()})

    def __exit__(self, *_: object) -> None:
        for held, buffers in self._held:
            held.update(buffers)
