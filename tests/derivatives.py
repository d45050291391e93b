"""Derivatives of all parameters, compared with backpropagation."""

from functools import partial

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fgtrain import Normal
from fgtrain.forward_ad import directional_derivatives, native
from fgtrain.forward_ad.passes import Unprepared
from fgtrain.random import keyed_generator
from fgtrain.tangents.directions import LastTangent, dense, num_of, padded
from tests.coverage_layers import LAYERS
from tests.coverage_operations import OPERATIONS

COVERAGE = [*LAYERS, *OPERATIONS]


class InTurn:
    """Directions of which each moves only a few parameters, in the order of their names or in a random one."""

    def __init__(self, *, in_order: bool):
        self.in_order = in_order

    def sample(self, params, seeds):
        order = torch.arange(len(params))
        if not self.in_order:
            order = order[torch.randperm(len(params), generator=keyed_generator(0))]
        nums = (order * len(seeds) // len(params) + 1).tolist()
        drawn = {name: dense(tangent)[0] for name, tangent in Normal().sample(params, seeds[:1]).items()}
        return {name: LastTangent(drawn[name], num) for name, num in zip(params, nums, strict=True)}


assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def gradient(case):
    """Losses and gradient by backpropagation, and the state after one pass."""
    model = case.build()
    torch.manual_seed(3)
    losses = case.loss(model)
    params = dict(model.named_parameters())
    grads = torch.autograd.grad(losses.mean(), list(params.values()), materialize_grads=True)
    return losses.detach(), dict(zip(params, grads, strict=True)), model.state_dict(), torch.get_rng_state()


def assert_derivatives(case, directions, derivatives_of=directional_derivatives):
    """Losses, derivatives, buffers and random state are those of backpropagation's one pass."""
    with torch.random.fork_rng():
        losses, grads, state, random_state = gradient(case)
        for law, num_tangents in directions:
            model = case.build()
            tangents = law.sample(dict(model.named_parameters()), range(num_tangents))
            torch.manual_seed(3)
            found = derivatives_of(model, case.loss, tangents)
            expected = sum(
                padded((dense(tangents[name]) * g).flatten(1).sum(1), num_of(tangents)) for name, g in grads.items()
            )
            assert_equal(found, (losses, expected))
            assert torch.equal(torch.get_rng_state(), random_state)
            assert_equal(model.state_dict(), state)


def reference(model, loss, tangents):
    try:
        losses, derivatives = native.jvp(model, loss, tangents)
    except Unprepared:
        losses, derivatives = native.jvp(model, loss, tangents)
    return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)


def exact_hessian(case, seed=3):
    """The Hessian by backpropagation twice, (n, n), rows in the order of the names."""
    model = case.build()
    names = sorted(dict(model.named_parameters()))
    with torch.random.fork_rng(), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(seed)
        grads = torch.autograd.grad(case.loss(model).mean(), [model.get_parameter(n) for n in names], create_graph=True)
    rows = []
    for entry in torch.cat([g.flatten() for g in grads]):
        row = torch.autograd.grad(
            entry, [model.get_parameter(n) for n in names], retain_graph=True, materialize_grads=True
        )
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)
