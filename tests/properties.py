"""The claims of an estimator as assertions. Bounds come from closed forms, never from trial runs."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fgtrain import Backprop, GradientEstimator
from tests.cases import Case


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    """All entries as one vector, in the order of the names."""
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def exact_grads(case: Case, seed: int = 3) -> dict[str, Tensor]:
    """The gradient by backpropagation, with the Dropout masks of `seed`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Backprop()(case.build(), case.loss).grads


def estimated_grads(estimator: GradientEstimator, case: Case, draw: int = 0, seed: int = 3) -> dict[str, Tensor]:
    """One estimate, with the Dropout masks of `seed` and the directions of `draw`."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return estimator(case.build(), case.loss, generator=torch.Generator().manual_seed(draw)).grads


def estimates_of(estimator: GradientEstimator, case: Case, draws: int) -> Tensor:
    """Independent estimates, (draws, n)."""
    model, found = case.build(), []
    with torch.random.fork_rng():
        for draw in range(draws):
            torch.manual_seed(3)
            found.append(flat(estimator(model, case.loss, generator=torch.Generator().manual_seed(draw)).grads))
    return torch.stack(found)


def assert_is(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], rounding: float = 1e-12) -> None:
    """The same names with the same values, up to `rounding` times the norm of all of them."""
    assert found.keys() == expected.keys()
    assert (flat(found) - flat(expected)).norm() <= rounding * flat(expected).norm()


def scaled(tensors: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    return {name: factor * value for name, value in tensors.items()}


def assert_leaves_no_trace(estimator: GradientEstimator, case: Case) -> None:
    """Parameters, .grad and requires_grad do not change; buffers and random state end as after one forward pass."""
    plain, model = case.build(), case.build()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        case.loss(plain)
        after_forward = torch.get_rng_state()
        torch.manual_seed(5)
        estimator(model, case.loss, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.get_rng_state(), after_forward)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    for name, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def assert_same_seed_same_estimate(estimator: GradientEstimator, case: Case) -> None:
    first, again, other = (flat(estimated_grads(estimator, case, draw)) for draw in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
