"""The derivative of whatever networks are built of is the one backpropagation finds."""

from functools import partial

import pytest
import torch

from fgtrain import LowRank, Normal
from fgtrain.directions import dense
from fgtrain.forward_ad import directional_derivatives, native
from fgtrain.forward_ad.dual import without_rules
from tests.coverage_layers import LAYERS
from tests.coverage_operations import OPERATIONS

COVERAGE = [*LAYERS, *OPERATIONS]

# Rounding of float64, 2e-16, over the thousands of sums in a case.
assert_equal = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-11)


def gradient(case):
    """Losses and gradient by backpropagation, and what one pass leaves behind."""
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
            expected = sum((dense(tangents[name]) * g).flatten(1).sum(1) for name, g in grads.items())
            assert_equal(found, (losses, expected))
            assert torch.equal(torch.get_rng_state(), random_state)
            assert_equal(model.state_dict(), state)


def reference(model, loss, tangents):
    losses, derivatives = native.jvp(model, loss, tangents)
    return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)


@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_coverage(case):
    assert_derivatives(case, [(Normal(), 1), (Normal(), 3), (LowRank(1), 1), (LowRank(1), 3), (LowRank(2), 3)])


@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_reference_engine(case):
    assert_derivatives(case, [(Normal(), 3)], reference)


@pytest.mark.parametrize("case", COVERAGE, ids=lambda case: case.name)
def test_without_rules(case):
    with without_rules():
        assert_derivatives(case, [(LowRank(1), 3)])
