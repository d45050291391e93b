import math

import pytest
import torch

from fgtrain import Coordinate, LowRank, Normal, Rademacher, Sphere
from fgtrain.tangents.directions import LowRankTangent, dense
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


DENSE = [Normal(), Rademacher(), Sphere(), Coordinate()]
SIZE = 15


def many_directions(law, num):
    """(num, SIZE), drawn as independent rows: at once."""
    return dense(law.sample({"rows": torch.zeros(num, SIZE, dtype=torch.float64)}, [0], rowwise=True)["rows"])[0]


def moments(law):
    """E v_i^4, E v_i^2 v_j^2 and the largest E (v . w)^4 for a unit vector w, in closed form."""
    n = SIZE
    return {
        "Normal()": (3, 1, 3),
        "Rademacher()": (1, 1, 3),
        "Sphere()": (3 * n / (n + 2), n / (n + 2), 3 * n / (n + 2)),
        "Coordinate()": (n, 0, n),
    }[repr(law)]


@pytest.mark.parametrize("law", DENSE, ids=repr)
def test_covariance_is_the_identity(law):
    """Each product of two numbers in the mean, to five of its standard errors: to 5 % at least."""
    draws = 200_000
    v = many_directions(law, draws)
    fourth, mixed, _ = moments(law)
    variances = torch.full((SIZE, SIZE), mixed, dtype=torch.float64).fill_diagonal_(fourth - 1)
    bound = 5 * (variances / draws).sqrt() + 1e-12
    assert bound.max() < 0.05
    assert ((v.T @ v / draws - torch.eye(SIZE)).abs() <= bound).all()


@pytest.mark.parametrize("law", DENSE, ids=repr)
def test_relative_variance_is_the_closed_form(law):
    """With t = v . g / ||g|| it is the mean of t^2 (||v||^2 - 2) + 1; t^4 and ||v||^2 have known moments.

    If ||v||^2 = n the variance is (n - 2)^2 (E t^4 - 1). For normal numbers the first moments of t^2 and of the
    independent ||v||^2 - t^2 give 2 m^2 + 22 m + 56, m = n - 1.
    """
    draws = 200_000
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = many_directions(law, draws)
    errors = ((v @ g)[:, None] * v - g).square().sum(1) / g.square().sum()
    m, (_, _, fourth) = SIZE - 1, moments(law)
    variance = 2 * m**2 + 22 * m + 56 if isinstance(law, Normal) else (SIZE - 2) ** 2 * (fourth - 1)
    bound, expected = 5 * math.sqrt(variance / draws), law.relative_variance({"": g})
    assert bound < 0.05 * expected
    assert abs(errors.mean() - expected) <= bound


class Every(Normal):
    """The factors' law with all its values instead of random ones: seed s gives the s-th of them."""

    def __init__(self, values):
        self.values = values

    def fill(self, rows, size, generator):
        seed = generator.initial_seed()
        for i in range(size):
            seed, digit = divmod(seed, len(self.values))
            rows[0, i] = self.values[digit]


SMALL = {"weight": torch.zeros(2, 2, dtype=torch.float64), "bias": torch.zeros(1, dtype=torch.float64)}
NODES = {
    "rademacher": ([-1.0, 1.0], [1 / 2, 1 / 2]),
    "normal": ([-math.sqrt(3), 0.0, math.sqrt(3)], [1 / 6, 2 / 3, 1 / 6]),  # has the moments of up to the fifth order
}


@pytest.mark.parametrize(("factors", "rank"), [("rademacher", 1), ("rademacher", 3), ("normal", 1), ("normal", 2)])
def test_low_rank_moments(factors, rank):
    """Covariance and relative variance, summed over all factors; the error is of the fourth degree in each number."""
    law, (values, weights) = LowRank(rank, factors), NODES[factors]
    law._law = Every(values)
    numbers = rank * (2 + 2) + 1
    v = directions(law, len(values) ** numbers, params=SMALL)
    weight = torch.tensor(weights, dtype=torch.float64)
    probability = weight
    for _ in range(numbers - 1):
        probability = torch.outer(weight, probability).flatten()
    torch.testing.assert_close((v * probability[:, None]).T @ v, torch.eye(5).double(), rtol=0, atol=1e-12)
    grads = {"weight": torch.tensor([[0.3, -1.0], [0.5, 2.0]]).double(), "bias": torch.tensor([0.7]).double()}
    g = flat(grads)
    errors = ((v @ g)[:, None] * v - g).square().sum(1) / g.square().sum()
    assert probability @ errors == pytest.approx(LowRank(rank, factors).relative_variance(grads), rel=1e-12)


def test_closed_forms_of_the_dense_laws():
    n = sum(p.numel() for p in PARAMS.values())
    assert Normal().relative_variance(GRADS) == n + 1
    assert {law.relative_variance(GRADS) for law in (Rademacher(), Sphere(), Coordinate())} == {n - 1}
    assert LowRank(1).relative_variance(GRADS) == n - 1


def test_a_gradient_of_zero_has_no_error_of_its_own():
    zeros = {name: torch.zeros_like(p) for name, p in PARAMS.items()}
    assert Rademacher().relative_variance(zeros) == Rademacher().relative_variance(GRADS)
    assert math.isnan(LowRank(2).relative_variance(zeros))


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
    """Of independent directions a and b of n numbers E (a . b)^2 = n, of equal ones it is n^2; E (a . b)^4 <= n^3."""
    num_rows, n = 500, 16
    params = {"points": torch.zeros(num_rows, n, dtype=torch.float64)}
    rows = law.sample(params, [0, 1], rowwise=True)["points"]
    assert rows.shape == (2, num_rows, n)
    for a, b in [(rows[0, 1:], rows[0, :-1]), (rows[0], rows[1])]:
        assert abs((a * b).sum(1).square().mean() - n) <= 5 * math.sqrt(n**3 / len(a))
    rows_of_two = law.sample({"a": params["points"], "b": torch.zeros(num_rows, 1).double()}, [0], rowwise=True)
    assert rows_of_two["b"].shape == (1, num_rows, 1)


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


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_directions_are_drawn_in_the_widest_dtype_and_padded(names):
    """Rows of a multiple of 16 numbers: matrix kernels want aligned addresses."""
    params = {"a": torch.zeros(3, dtype=torch.float16), "b": torch.zeros(10, dtype=torch.float32)}
    for law in LAWS:
        buffer = law.sample({name: params[name] for name in names}, [0]).buffer
        assert buffer.dtype == torch.float32
        assert buffer.shape == (1, 16)


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
