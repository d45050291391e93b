"""Forward gradients by weight perturbation: directions in the space of the weights."""

from collections.abc import Iterator, Mapping
from typing import get_args

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Claim, Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.exact_head import Jvp, with_exact_head
from fgtrain.estimators.gradients import of_mean_loss
from fgtrain.forward_ad import jvp
from fgtrain.forward_ad.passes import LossFn, require_repetition
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import draw_seeds
from fgtrain.tangents import Normal, Tangents, law_or
from fgtrain.tangents.chunks import Chunks
from fgtrain.tangents.combine import Combine, Shrinkage, coefficients


class ForwardGradient(GradientEstimator):
    """The forward gradient of Baydin et al., with any law of directions and any number of them.

    Formula: with combine="mean", g = (1/K) sum_k (grad f . v_k) v_k with v_k from `tangents`. With
    combine="projection", g is the orthogonal projection of grad f on span(v_1 .. v_K).

    Bias: combine="mean" is unbiased: E[(grad f . v) v] = E[v v^T] grad f = grad f. The mean of the projection is K/n of
    the gradient. `clip_derivative` biases both.

    Relative variance: s = (n - 1 + excess) / K for combine="mean", with n trainable numbers and the law's excess
    (`fgtrain.tangents.laws`). The projection's relative squared error is 1 - K/n.

    Shrinkage: the mean is multiplied by 1 / (1 + s), the factor of least squared error, which is then s / (1 + s)
    instead of s, and E[g] = grad f / (1 + s). Only the length changes, not the direction. Good learning
    rates then depend far less on K and n. A projection has this length already.

    Exact head: the gradient of the last layer is computed exactly, from C unit directions of its outputs that go only
    through the loss. n then counts the other parameters.

    Cost: one forward pass with K derivatives, in the memory of inference. In chunks of c directions: K / c passes in
    the memory of c directions. Ranks exchange K floats (and the last layer's gradient, if exact).

    Args:
        tangents: law of the directions.
        num_tangents: K >= 1.
        combine: "mean" or "projection" (least squares in the span of the directions).
        shrinkage: multiply the mean by 1 / (1 + s), see `fgtrain.tangents.combine.Shrinkage`.
        clip_derivative: cap on |grad f . v_k|, against rare large values; None for no cap.
        chunk_size: the largest number of directions in one pass; None for all. The estimate is the same up to rounding.
        exact_head: see Exact head. Needs per-example losses (B,) and a Linear layer at the end, with no BatchNorm or
            contrastive loss after it.
        rowwise: example i of the loss depends only on row i of every parameter (many starting points of one
            function), so each row gets the derivative of its own loss.

    Raises:
        ValueError: an argument is out of its range.
        LossError: with exact_head, there is not one loss for every row of the last layer.
        UnsupportedOperation: with exact_head, examples are mixed after the last layer.

    Source: Baydin, Pearlmutter, Syme, Wood, Torr 2022, arXiv:2202.08587, equation 4; K directions: Fluegel et al.
    2024, arXiv:2410.17764; shrinkage: Shukla and Shin 2023, arXiv:2310.14168.

    The mean over many directions approaches the gradient, (2, 4) here:

    >>> model = nn.ParameterDict({"w": torch.tensor([1.0, 2.0])})
    >>> estimator = ForwardGradient(num_tangents=20_000)
    >>> estimate = estimator(model, lambda m: m["w"].square().sum(), generator=torch.Generator().manual_seed(0))
    >>> torch.allclose(estimate.grads["w"], torch.tensor([2.0, 4.0]), atol=0.2)
    True
    """

    scalar_reducible = True

    def __init__(
        self,
        tangents: Tangents | None = None,
        num_tangents: int = 1,
        combine: Combine = "mean",
        *,
        shrinkage: bool = False,
        clip_derivative: float | None = None,
        chunk_size: int | None = None,
        exact_head: bool = False,
        rowwise: bool = False,
    ) -> None:
        super().__init__()
        require_positive_int("num_tangents", num_tangents)
        if combine not in get_args(Combine):
            raise ValueError(f"combine must be one of {', '.join(get_args(Combine))}, got {combine!r}")
        if clip_derivative is not None and not clip_derivative > 0:
            raise ValueError(f"clip_derivative must be positive or None, got {clip_derivative!r}")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size must be an integer of at least 1 or None, got {chunk_size!r}")
        if exact_head and rowwise:
            raise ValueError("exact_head and rowwise cannot be combined: a function of points has no last layer")
        self.tangents = law_or(tangents, Normal())
        self.num_tangents = num_tangents
        self.combine: Combine = combine
        self.shrinkage = Shrinkage(self.tangents, num_tangents, on=shrinkage and combine == "mean", rowwise=rowwise)
        self.lacks_shrinkage = not shrinkage and combine == "mean"
        self.clip_derivative = clip_derivative
        self.chunk_size = chunk_size
        self.exact_head = exact_head
        self.scalar_reducible = not exact_head
        self.shardable = self.tangents.shardable
        self.directions_at_a_time = min(num_tangents, chunk_size or num_tangents)
        self.rowwise = rowwise
        self.claims = frozenset(self._claims())

    def _claims(self) -> Iterator[Claim]:
        yield "descent"
        if self.combine == "mean" and not (self.shrinkage.on or self.exact_head) and self.clip_derivative is None:
            yield "unbiased"

    def direction_bytes(self, params: Mapping[str, Tensor]) -> int:
        return self.tangents.bytes_of(params)

    def relative_squared_error(self, grads: Mapping[str, Tensor]) -> float | None:
        if self.clip_derivative is not None or self.rowwise or self.exact_head:
            return None
        if self.combine == "projection":
            if not self.tangents.isotropic:
                return None
            return max(0.0, 1 - self.num_tangents / sum(g.numel() for g in grads.values()))
        return self.shrinkage.relative_squared_error(grads)

    def mean_length(self, grads: Mapping[str, Tensor]) -> float:
        if self.combine == "projection":
            return min(1.0, self.num_tangents / sum(g.numel() for g in grads.values()))
        return self.shrinkage.factor(grads)

    def mean_length_of(self, estimates: int, grads: Mapping[str, Tensor]) -> float:
        return self.shrinkage.factor(grads, estimates) if self.shrinkage.on else self.mean_length(grads)

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        params = trainable_params(model)

        def estimate(params: Mapping[str, Tensor], jvp: Jvp) -> Estimate:
            chunks = self._chunks(params, draw_seeds(generator, self.num_tangents))
            losses, derivatives = _along(chunks, jvp, model, loss_fn)
            derivatives = of_mean_loss(losses, derivatives, reduce, rowwise=self.rowwise)
            if self.clip_derivative is not None:
                derivatives = derivatives.clamp(-self.clip_derivative, self.clip_derivative)
            return Estimate(losses.mean(), self._combined(derivatives, chunks, params), derivatives.flatten())

        if self.exact_head:
            return with_exact_head(estimate, model, loss_fn, params, reduce)
        return estimate(params, jvp)

    def _chunks(self, params: Mapping[str, Tensor], seeds: list[int]) -> Chunks:
        return Chunks(self.tangents, params, seeds, self.chunk_size or self.num_tangents, rowwise=self.rowwise)

    def replay(self, model: nn.Module, derivatives: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        params = trainable_params(model)
        chunks = self._chunks(params, draw_seeds(generator, self.num_tangents))
        if self.rowwise:
            derivatives = derivatives.view(self.num_tangents, -1)
        return self._combined(derivatives, chunks, params)

    def _combined(self, derivatives: Tensor, chunks: Chunks, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        weights = coefficients(self.combine, derivatives, chunks.gram)
        factor = self.shrinkage.factor(params)
        return chunks.weighted_sum(weights if factor == 1 else weights * factor)

    def extra_repr(self) -> str:
        shrinkage = ", shrinkage=True" if self.shrinkage.on else ""
        return f"tangents={self.tangents}, num_tangents={self.num_tangents}, combine={self.combine!r}{shrinkage}"


def _along(chunks: Chunks, jvp: Jvp, model: nn.Module, loss_fn: LossFn) -> tuple[Tensor, Tensor]:
    """Losses, and their derivatives along all directions."""
    snapshot = Snapshot(model) if len(chunks) > 1 else None
    losses, found = None, []
    for i, directions in enumerate(chunks):
        if snapshot is not None and i:
            snapshot.restore()
        now, derivatives = jvp(model, loss_fn, directions)
        require_repetition(losses, now)
        losses = now
        found.append(derivatives)
    assert losses is not None
    return losses, found[0] if len(found) == 1 else torch.cat(found)
