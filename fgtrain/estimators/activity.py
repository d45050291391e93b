"""Forward gradients by activity perturbation: directions in the space of layer outputs."""

import logging
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce, require_positive_int
from fgtrain.estimators.forward_gradient import ForwardGradient
from fgtrain.estimators.gradients import add_grad, average_grads
from fgtrain.forward_ad.passes import LossFn
from fgtrain.forward_ad.row_losses import Evaluated
from fgtrain.layer_noise.layer_call import LayerCall
from fgtrain.layer_noise.layers import perturbed_layers, run_perturbed
from fgtrain.layer_noise.noise import LayerNoise, LocalGrads, Noise, PerturbedPass
from fgtrain.layer_noise.rows import ExaminedPass, Rows, gradient_of_head, per_example
from fgtrain.layer_noise.second_pass import ReplayedPass
from fgtrain.network.parameters import trainable_params
from fgtrain.network.snapshot import Snapshot
from fgtrain.random import draw_seeds
from fgtrain.tangents import Rademacher, Tangents, law_or

_log = logging.getLogger(__name__)


class ActivityPerturbation(GradientEstimator):
    """The forward gradient with noise on the outputs of layers instead of on their weights.

    Formula: u_k,i is the noise of direction k on the output z_i = W x_i of a layer for example i, and d_k,i is the
    derivative of that example's loss along all noise of direction k. Then

        g_W = (1/B) sum_i (1/K) sum_k d_k,i u_k,i x_i^T.

    Units zeroed by the following ReLU have zero gradient, and their estimate is exactly zero. Parameters of other
    layers (norms, embeddings, tied weights) are perturbed directly in the same pass, with the law `tangents`.

    Losses: return per-example losses (B,), reduction="none". A scalar that is the mean of one `F.cross_entropy` or
    `F.mse_loss` with a row per example works equally well, because the loss of each row is known. Any other scalar loss
    gives one derivative for all examples. The estimate is then still unbiased, but it has the variance of the noise on
    all examples; a warning says so once. The first call finds the rows of each layer's output that belong to each
    example. If it cannot, all rows of the layer use the derivative of the mean loss.

    Bias: unbiased if neither layers nor losses mix examples, or with examples="mixed". If BatchNorm in training mode, a
    graph whose nodes are the examples, or a contrastive loss mixes them, examples="independent" ignores the effect of
    one example's noise on the losses of the others, as Ren et al. do. positions="shared" is biased: every position gets
    the gradient of the shared noise. shrinkage=True scales the estimate down.

    Relative variance: for one example with N units that no ReLU zeroes,

        noise="rademacher": (N - 1) / K,    "normal": (N + 1) / K,    "balanced": N / K - 1 if K divides N, 0 if K >= N.

    Over a batch it is divided by B if all examples have the same gradient, and by 1 if their gradients are orthogonal.
    On a map with P positions, "balanced" gives all positions of a channel to one direction. More directions than
    channels therefore leave its variance at P - 1, while that of "rademacher" keeps falling with K.

    Shrinkage: a layer's estimate is multiplied by 1 / (1 + s), with s = (variance for one example) / sqrt(R) and R the
    rows (examples times positions) that share the layer's weight. This s is the geometric mean of the two cases above.
    Rates tuned for backpropagation are then of the right size. It is not the length of least squared error, which
    depends on how much the rows' gradients agree: scaled to that length, a network of four layers learns less.

    Cost: one forward pass with K derivatives. It keeps the inputs of all layers (memory="keep"), or redraws the noise
    in a second forward pass (memory="replay"). Ranks exchange the whole gradient.

    Args:
        num_tangents: K >= 1.
        noise: "balanced", "rademacher" or "normal", see `PerturbedPass`.
        exact_head: compute the gradient of the last layer exactly, from C + M more directions that go only through the
            loss; M, about log2 of the number of rows, tell that every loss depends on one row. Needs a loss for every
            row of its output, or their mean as above; a row is a token in a language model. Needs no BatchNorm or
            contrastive loss after the last layer.
        positions: "independent" noise for every position of a map or sequence, or one "shared" draw for all.
        examples: "independent" or "mixed", see Bias.
        memory: "keep" or "replay", see Cost.
        tangents: law for the parameters of other layers.
        shrinkage: see Shrinkage. The gradient of an exact head is not shrunk.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: the model has no Linear or convolution to perturb, or uses an operation that the engine
            cannot handle.

    Source: Ren, Kornblith, Liao, Hinton 2023, arXiv:2210.03310, section 3. The balanced noise, the exact head and the
    shrinkage are fgtrain's own, tested in tests/test_activity.py.

    Balanced noise with as many directions as units, 4 + 2 here, gives the gradient itself:

    >>> from fgtrain.estimators.backprop import Backprop
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> inputs, targets = torch.randn(8, 3), torch.randn(8, 2)
    >>> losses = lambda net: (net(inputs) - targets).square().sum(1)
    >>> estimate = ActivityPerturbation(num_tangents=6)(model, losses)
    >>> exact = Backprop()(model, losses)
    >>> all(torch.allclose(estimate.grads[name], g, atol=1e-5) for name, g in exact.grads.items())
    True
    """

    scalar_reducible = False

    def __init__(
        self,
        num_tangents: int = 1,
        noise: Noise = "balanced",
        *,
        exact_head: bool = False,
        positions: Literal["independent", "shared"] = "independent",
        examples: Literal["independent", "mixed"] = "independent",
        memory: Literal["keep", "replay"] = "keep",
        tangents: Tangents | None = None,
        shrinkage: bool = False,
    ) -> None:
        super().__init__()
        require_positive_int("num_tangents", num_tangents)
        choices = {
            "noise": (noise, get_args(Noise)),
            "positions": (positions, ("independent", "shared")),
            "examples": (examples, ("independent", "mixed")),
            "memory": (memory, ("keep", "replay")),
        }
        for argument, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{argument} must be one of {', '.join(allowed)}, got {value!r}")
        self.num_tangents = self.directions_at_a_time = num_tangents
        self.noise: Noise = noise
        self.exact_head = exact_head
        self.positions = positions
        self.examples = examples
        self.memory = memory
        self.tangents = law_or(tangents, Rademacher())
        self.shrinkage = shrinkage
        self.lacks_shrinkage = not shrinkage
        self._has_warned = False

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        # A pass perturbs the outputs of layers, and all other parameters along directions. It gives the derivatives of
        # every example's loss, and `rows` tells which rows of an output belong to which example. From both, each call
        # of a layer has the gradient of its output, which its local gradients turn into those of weight and bias. With
        # memory="replay", a second pass makes these calls again. The others get a weighted sum of their directions.
        params = trainable_params(model)
        seed, *seeds = draw_seeds(generator, 1 + self.num_tangents)
        layers = perturbed_layers(model, loss_fn)
        others = layers.others(params)
        directions = self.tangents.sample(others, seeds) if others else None
        perturbed = PerturbedPass(
            self.num_tangents,
            seed,
            self.noise,
            self.positions == "shared",
            layers.last if self.exact_head else None,
            self.memory == "keep",
        )
        noises = {name: LayerNoise(name, perturbed) for name in layers.biases}
        before = Snapshot(model) if self.memory == "replay" else None
        examined = ExaminedPass(model, loss_fn)
        evaluated, calls = examined.run({**noises, **(directions or {})}), perturbed.calls
        of_head = gradient_of_head(examined, calls, layers.last, evaluated) if self.exact_head else None
        rows: Mapping[str, Rows] = {}
        if self.examples == "independent":
            evaluated, rows = per_example(examined, calls, evaluated)
            if evaluated.losses.numel() == 1:
                self._warn_of_scalar(calls)
        losses, derivatives = evaluated.losses, evaluated.derivatives[: self.num_tangents]
        variance = self._variance(perturbed.noise_size / (losses.numel() if rows else 1))
        found = _LayerGrads(Evaluated(losses, derivatives), of_head, rows, layers.biases, params, variance)
        if before is None:
            for call in calls:
                assert call.local_grads is not None
                found.add(call, call.local_grads)
        else:
            before.restore()
            second = ReplayedPass(perturbed, found.add)
            run_perturbed(model, loss_fn, {name: LayerNoise(name, second) for name in layers.biases}, follows=False)
        if directions is not None:
            weight = found.shrink(losses.numel()) / self.num_tangents
            found.grads |= directions.weighted_sum(weight * found.derivatives)
        return Estimate(losses.mean(), average_grads(found.grads, params, reduce), found.derivatives)

    def without_layers(self) -> GradientEstimator:
        return ForwardGradient(self.tangents, self.num_tangents, shrinkage=self.shrinkage)

    def _warn_of_scalar(self, calls: list[LayerCall]) -> None:
        """Warn once that a scalar loss for several rows loses the method's advantage."""
        rows = max(call.shape[0] for call in calls)
        if rows > 1 and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "activity perturbation got one loss for %d rows: the variance is that of the noise on all rows; "
                "return per-example losses (B,), reduction='none', or set examples=mixed if examples belong together",
                rows,
            )

    def _variance(self, units: float) -> float:
        """The relative variance for one example with `units` numbers of noise, for shrinkage; 0 without it."""
        excess = {"rademacher": -1.0, "normal": 1.0, "balanced": -self.num_tangents}[self.noise]
        return max(0.0, units + excess) / self.num_tangents if self.shrinkage else 0.0

    def extra_repr(self) -> str:
        return f"num_tangents={self.num_tangents}, noise={self.noise!r}, exact_head={self.exact_head}"


class _LayerGrads:
    """The gradients of layers' parameters, added up from one call of a layer to the next.

    Args:
        evaluated: the losses of the pass, (B,) or (), and their derivatives along the noise, (K, B) or (K,).
        of_head: the exact gradient of the last layer's output; None if this layer has noise too.
        rows: {name of a layer's weight: the rows of its output that belong to each example}.
        biases: {name of a layer's weight: name of its bias or None}.
        params: {name: parameter}.
        variance: the relative variance for one example, for shrinkage; 0 without it.

    Attributes:
        derivatives: derivatives of the mean loss, (K,).
        grads: the gradients so far.
    """

    def __init__(
        self,
        evaluated: Evaluated,
        of_head: Tensor | None,
        rows: Mapping[str, Rows],
        biases: Mapping[str, str | None],
        params: Mapping[str, Tensor],
        variance: float,
    ) -> None:
        losses, derivatives = evaluated
        self.derivatives = derivatives if losses.dim() == 0 else derivatives.mean(1)
        self.grads: dict[str, Tensor] = {}
        self._num_examples = losses.numel()
        self._per_example = derivatives / self._num_examples
        self._of_head = of_head
        self._rows = rows
        self._biases = biases
        self._params = params
        self._variance = variance

    def shrink(self, num_rows: int) -> float:
        """The shrinkage factor for the gradient of a layer with `num_rows` rows."""
        return 1 / (1 + self._variance / max(num_rows, 1) ** 0.5)  # an expert may get no row

    def add(self, call: LayerCall, local_grads: LocalGrads) -> None:
        """Add the gradients of weight and bias from one call of their layer."""
        grad_output = self._of_head if call.noise is None else self._grad_output(call)
        assert grad_output is not None
        for name, grad in zip((call.name, self._biases[call.name]), local_grads(grad_output), strict=True):
            if name is not None:
                add_grad(self.grads, name, grad.to(self._params[name].dtype))

    def _grad_output(self, call: LayerCall) -> Tensor:
        factor = self.shrink(call.shape.numel() // call.shape[call.channels])
        rows = self._rows.get(call.name)
        if rows is None or not rows.fits(call.shape, self._num_examples):
            return call.grad_output(factor * self.derivatives.unsqueeze(1))
        return call.grad_output(factor * rows.spread(self._per_example, call.shape), rows.dim)
