import math

import pytest
import torch

from fgtrain import Coordinate, LowRank, Normal, Rademacher, Sphere
from fgtrain.directions import LowRankTangent, dense
from tests.properties import flat

LAWS = [
    Normal(),
    Rademacher(),
    Sphere(),
    Coordinate(),
    LowRank(1),
    LowRank(3),
    LowRank(1, factors="normal"),
    LowRank(3, factors="normal"),
]
PARAMS = {"weight": torch.zeros(3, 4, dtype=torch.float64), "bias": torch.zeros(3, dtype=torch.float64)}
GRADS = {
    name: torch.randn(p.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, p in PARAMS.items()
}


def directions(law, num, first=0, params=PARAMS):
    """(num, n), one direction a row."""
    sample = law.sample(params, range(first, first + num))
    return torch.cat([dense(sample[name]).flatten(1) for name in sorted(sample)], dim=1)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_covariance_is_the_identity(law):
    v = directions(law, 20_000)
    products = v[:, :, None] * v[:, None, :]
    error = products.std(0) / math.sqrt(len(v))
    assert ((products.mean(0) - torch.eye(v.shape[1])).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_relative_variance_is_the_closed_form(law):
    g, v = flat(GRADS), directions(law, 40_000)
    errors = ((v @ g)[:, None] * v - g).square().sum(1) / g.square().sum()
    standard_error = errors.std() / math.sqrt(len(v))
    assert abs(errors.mean() - law.relative_variance(GRADS)) <= 5 * standard_error


def test_closed_forms_of_the_dense_laws():
    n = sum(p.numel() for p in PARAMS.values())
    assert Normal().relative_variance(GRADS) == n + 1
    assert {law.relative_variance(GRADS) for law in (Rademacher(), Sphere(), Coordinate())} == {n - 1}
    assert LowRank(1).relative_variance(GRADS) == n - 1


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_direction_k_depends_on_seed_k_alone(law):
    together, apart = directions(law, 5), torch.cat([directions(law, 1, k) for k in range(5)])
    assert torch.equal(together, apart)
    assert not torch.equal(together[0], together[1])


@pytest.mark.parametrize("law", [Rademacher(), Sphere(), Coordinate(), LowRank(1)], ids=repr)
def test_length_is_constant(law):
    v = directions(law, 50)
    torch.testing.assert_close(v.norm(dim=1), torch.full((50,), math.sqrt(v.shape[1]), dtype=v.dtype))


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_rows_are_independent_directions(law):
    params = {"points": torch.zeros(500, 3, dtype=torch.float64)}
    rows = law.sample(params, [0, 1], rowwise=True)["points"]
    assert rows.shape == (2, 500, 3)
    every = rows.flatten(0, 1)
    moment = every.T @ every / len(every)
    assert (moment - torch.eye(3)).abs().max() < 5 * math.sqrt(3 / 1000)  # no law's kurtosis is above 3


def test_low_rank_tangent_written_out():
    tangent = LowRank(2).sample(PARAMS, [0, 1, 2])["weight"]
    assert isinstance(tangent, LowRankTangent)
    left, right = tangent.factors
    by_hand = torch.einsum("kam,kan->kmn", left, right)
    torch.testing.assert_close(tangent.dense(), by_hand)
    assert torch.linalg.matrix_rank(by_hand).tolist() == [2, 2, 2]


def test_convolution_weights_are_matrices_of_output_channels():
    params = {"conv": torch.zeros(6, 2, 3, 3)}
    tangent = LowRank(1).sample(params, [0])["conv"]
    assert isinstance(tangent, LowRankTangent)
    assert tangent.left.shape == (1, 6)
    assert tangent.right.shape == (1, 18)
    assert tangent.dense().shape == (1, 6, 2, 3, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_is_that_of_the_parameter(dtype):
    params = {"a": torch.zeros(4, 4, dtype=dtype), "b": torch.zeros(3, dtype=torch.float32)}
    for law in LAWS:
        sample = law.sample(params, [0])
        assert dense(sample["a"]).dtype == dtype
        assert dense(sample["b"]).dtype == torch.float32


def test_parameters_on_two_devices_are_refused():
    params = {"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}
    with pytest.raises(ValueError, match=r"must be on one device, got cpu and meta; move the model"):
        Normal().sample(params, [0])


@pytest.mark.parametrize(
    ("arguments", "message"), [((0,), "rank must be"), ((1.5,), "rank must be"), ((1, "uniform"), "factors")]
)
def test_low_rank_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        LowRank(*arguments)
