"""Direct feedback alignment with feedback matrices that are learnt from forward-mode derivatives."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fgtrain.errors import UnsupportedOperation
from fgtrain.estimators.base import Estimate, GradientEstimator, Reduce, buffers_in, require_positive_int
from fgtrain.estimators.gradients import average_grads
from fgtrain.forward_ad.passes import LossFn
from fgtrain.layer_noise.layer_call import LayerCall, as_input, passing
from fgtrain.layer_noise.layers import perturbed_layers
from fgtrain.layer_noise.noise import LayerNoise, LocalGrads, PerturbedPass
from fgtrain.layer_noise.rows import ExaminedPass, Rows, gradient_of_head, per_example
from fgtrain.network.parameters import trainable_params
from fgtrain.random import draw_seeds
from fgtrain.tangents import Rademacher


class FDFA(GradientEstimator):
    """Direct feedback alignment: the output error, sent to every layer through matrices that forward AD learns.

    Formula: random signs u_l,k,i are added to the tangents of the output z_l of every hidden layer l for example i. One
    pass turns them into tangents t_k,i = sum_l J_l,i u_l,k,i of the network's output, with J_l,i = dy_i / dz_l,i. A
    feedback matrix B_l is the running mean of the products t u^T:

        B_l <- B_l + beta ((1/(B K)) sum_i,k t_k,i u_l,k,i^T - B_l).

    Its fixed point is E[J_l]. The error e_i = df_i / dy_i is exact: C more directions that go only through the loss
    give it, and M more test that every loss depends on one example, M = 8 for 64 examples and 13 for 1000. Then

        g_W of layer l = (1/B) sum_i (B_l^T e_i) x_i^T,        g_W of the last layer = (1/B) sum_i e_i x_i^T.

    If only a ReLU uses a layer's output, the mean for a unit is over the examples in which the unit is active, and
    inactive units get 0. Parameters of other layers (norms, embeddings) are perturbed in the same pass and shrunk, as
    by `ActivityPerturbation` with shrinkage=True.

    Bias: biased, because B_l is one matrix for all examples and lags behind the changing weights. At its fixed point
    the gradient is exact for linear networks and for networks with one hidden layer of ReLUs.

    Variance: the entry (c, j) of B_l has the variance beta / (2 - beta) / (B K) sum_m J_cm^2 over the other N - 1 units
    m, for noise on N units of a linear network. The estimate itself adds no variance.

    Cost: one forward pass with K directions, and K + C + M through the last layer and the loss. The inputs of all
    layers and C numbers for every unit are kept. Ranks exchange the whole gradient and the feedback.

    With feedback_every=m, only every m-th call learns the feedback. The other calls are forward passes without
    directions, except through the loss. They give no gradient for parameters of other layers.

    State: the feedback is created at the first call, at zero, and is saved with the estimator's state.

    Args:
        num_tangents: K >= 1.
        feedback_lr: beta, in (0, 1]. The first 1 / beta updates of the feedback use the plain mean.
        feedback_every: m >= 1, see Cost. The Jacobians change as slowly as the weights, so a large m costs little
            accuracy.

    Raises:
        ValueError: an argument is out of its range.
        UnsupportedOperation: the model has no Linear or convolution; it uses one twice; the size of a layer's output
            changes; examples are not its first dimension; or examples are mixed after the last layer.
        LossError: the losses are neither per example (B,) nor the mean of one F.cross_entropy or F.mse_loss.

    Source: Bacho and Chu 2022, arXiv:2212.07282. There the noise is added after the activation function; the mean over
        active units is equivalent.

    On a linear network the estimate approaches the gradient as the feedback is learnt:

    >>> from fgtrain.estimators.backprop import Backprop
    >>> _ = torch.manual_seed(0)
    >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    >>> inputs, targets = torch.randn(64, 3), torch.randn(64, 2)
    >>> losses = lambda net: (net(inputs) - targets).square().sum(1)
    >>> estimator = FDFA()
    >>> estimates = [estimator(model, losses).grads["0.weight"] for _ in range(100)]
    >>> exact = Backprop()(model, losses).grads["0.weight"]
    >>> bool((estimates[-1] - exact).norm() < 0.1 * exact.norm())
    True
    """

    scalar_reducible = False
    state_of_model = "the feedback"

    def __init__(self, num_tangents: int = 1, *, feedback_lr: float = 0.01, feedback_every: int = 1) -> None:
        super().__init__()
        require_positive_int("num_tangents", num_tangents)
        require_positive_int("feedback_every", feedback_every)
        if not 0 < feedback_lr <= 1:
            raise ValueError(f"feedback_lr must be in (0, 1], got {feedback_lr!r}")
        self.num_tangents = self.directions_at_a_time = num_tangents
        self.feedback_lr = feedback_lr
        self.feedback = nn.Module()
        self.num_updates: Tensor
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.feedback_every = feedback_every
        self.num_calls: Tensor
        if feedback_every > 1:
            self.register_buffer("num_calls", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def forward(
        self, model: nn.Module, loss_fn: LossFn, *, generator: torch.Generator, reduce: Reduce | None
    ) -> Estimate:
        params = trainable_params(model)
        seed, *seeds = draw_seeds(generator, 1 + self.num_tangents)
        layers = perturbed_layers(model, loss_fn)
        others = layers.others(params)
        learns = self.feedback_every == 1 or int(self.num_calls) % self.feedback_every == 0
        directions = Rademacher().sample(others, seeds) if others and learns else None
        perturbed = (
            PerturbedPass(self.num_tangents, seed, "rademacher", head=layers.last)
            if learns
            else _QuietPass(0, seed, head=layers.last, rectified=layers.rectified)
        )
        noises = {name: LayerNoise(name, perturbed) for name in layers.biases}
        examined = ExaminedPass(model, loss_fn)
        evaluated = examined.run({**noises, **(directions or {})}, follows=learns)
        calls = perturbed.calls
        _refuse_repeated(calls)
        error = gradient_of_head(examined, calls, layers.last, evaluated)
        (losses, found), rows = per_example(examined, calls, evaluated) if learns else (evaluated, {})
        *hidden, head = calls
        _refuse_other_rows(calls, rows, error[..., 0].shape)
        if learns:
            assert head.tangent is not None
            self._learn(hidden, head.tangent, reduce)
        signals = [self._through_feedback(error, call) for call in hidden] + [error]
        grads: dict[str, Tensor] = {}
        for call, signal in zip([*hidden, head], signals, strict=True):
            assert call.local_grads is not None
            call.check_inputs()
            names = (call.name, layers.biases[call.name])
            pairs = zip(names, call.local_grads(signal), strict=True)
            grads |= {name: g.to(params[name].dtype) for name, g in pairs if name is not None}
        derivatives = found[: self.num_tangents].view(self.num_tangents, -1).mean(1) if learns else None
        if directions is not None and derivatives is not None:
            numbers = perturbed.noise_size / losses.numel() + sum(p.numel() for p in others.values())
            variance = (numbers - 1) / self.num_tangents / losses.numel() ** 0.5
            grads |= directions.weighted_sum(derivatives / self.num_tangents / (1 + variance))
        if self.feedback_every > 1:
            self.num_calls = self.num_calls + 1
        return Estimate(losses.mean(), average_grads(grads, params, reduce), derivatives)

    def _learn(self, hidden: list[LayerCall], tangent: Tensor, reduce: Reduce | None) -> None:
        """Move every feedback matrix towards the mean product of the output's tangents and the layer's noise."""
        self.num_updates = self.num_updates + 1  # in place it would fail on one made in inference mode
        rate = max(self.feedback_lr, 1 / int(self.num_updates))
        # (K B, C), at least in single precision: half has too few bits for a running mean.
        rows = tangent.flatten(0, 1).to(torch.promote_types(tangent.dtype, torch.float32))
        for call in hidden:
            assert call.noise is not None
            noise, passed = call.noise.to(rows.dtype), rows.new_full(call.shape[1:], call.shape[0])
            if call.is_rectified:
                assert call.active is not None
                noise, passed = noise * call.active.to(rows.dtype), call.active.sum(0, dtype=rows.dtype)
            total = (rows.T @ noise.flatten(0, 1).flatten(1)).to(rows.dtype)
            total = total.view(-1, *call.shape[1:]) / self.num_tangents
            if reduce is not None:
                total, passed = reduce(total), reduce(passed)
            feedback = self._feedback_of(call, rows)
            teaches = (passed > 0) & total.isfinite().all()  # skip batches that are not finite
            feedback.add_(torch.where(teaches, total / passed - feedback, 0), alpha=rate)

    def _feedback_of(self, call: LayerCall, outputs: Tensor) -> Tensor:
        """The feedback of a layer, (C, ..), for outputs of the network like these, (.., C)."""
        key, shape = call.name.replace(".", "/"), (outputs.shape[-1], *call.shape[1:])  # buffers have no dots in names
        buffers = dict(self.feedback.named_buffers())
        if key not in buffers:
            dtype = torch.promote_types(outputs.dtype, torch.float32)
            self.feedback.register_buffer(key, outputs.new_zeros(shape, dtype=dtype))
            return self._feedback_of(call, outputs)
        if buffers[key].shape != shape:
            layer, now, before = call.name.removesuffix(".weight"), shape[1:], buffers[key].shape[1:]
            raise UnsupportedOperation(
                f"the output of {layer} has shape {tuple(now)} per example but had {tuple(before)}; FDFA has feedback "
                "for one model and one size only: use inputs of one size, or ActivityPerturbation"
            )
        return buffers[key]

    def _through_feedback(self, error: Tensor, call: LayerCall) -> Tensor:
        """The gradient at the layer's output, from that at the network's output (B, C)."""
        feedback = self._feedback_of(call, error)
        return call.cut_off((error @ feedback.flatten(1).to(error.dtype)).view(call.shape))

    def make_room(self, state: Mapping[str, Tensor]) -> None:
        self.feedback = buffers_in(state, "feedback")

    def extra_repr(self) -> str:
        return f"num_tangents={self.num_tangents}, feedback_lr={self.feedback_lr}, feedback_every={self.feedback_every}"


@dataclass(eq=False)
class _QuietPass(PerturbedPass):
    """A pass that records the calls of hidden layers without noise, and gives the head its unit directions.

    Args:
        rectified: names of the weights whose output only a ReLU uses.
    """

    rectified: frozenset[str] = frozenset()

    def perturb(self, name: str, inputs: Tensor, output: Tensor, local_grads: LocalGrads, channels: int) -> Tensor:
        if name == self.head:
            return super().perturb(name, inputs, output, local_grads, channels)
        active = passing(output) if name in self.rectified else None
        call = LayerCall(name, local_grads, None, None, channels, output.shape, as_input(inputs), active=active)
        self.calls.append(call)
        return output


def _refuse_repeated(calls: list[LayerCall]) -> None:
    names = [call.name for call in calls]
    twice = sorted({name.removesuffix(".weight") for name in names if names.count(name) > 1})
    if twice:
        raise UnsupportedOperation(f"FDFA has one feedback matrix per layer, but {', '.join(twice)} is called twice")


def _refuse_other_rows(calls: list[LayerCall], rows: Mapping[str, Rows], examples: torch.Size) -> None:
    for call in calls:
        if call.shape[:1] != examples or (rows and rows.get(call.name) != Rows()):
            raise UnsupportedOperation(
                f"FDFA needs outputs whose first dimension is the {examples.numel()} examples, but "
                f"{call.name.removesuffix('.weight')} gives {tuple(call.shape)}; use ActivityPerturbation"
            )
