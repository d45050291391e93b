import pytest
import torch

from fgtrain import LowRank, Normal
from fgtrain.tangents.combine import coefficients
from fgtrain.tangents.directions import Directions, Piece, dense
from tests.properties import flat

PARAMS = {"weight": torch.zeros(3, 4, dtype=torch.float64), "bias": torch.zeros(3, dtype=torch.float64)}
LAWS = [Normal(), LowRank(1, factors="normal"), LowRank(2, factors="normal")]


def setup(law, num):
    """Tangents, the matrix V (n, K) of the same directions, and a gradient (n,)."""
    tangents = law.sample(PARAMS, range(num))
    matrix = torch.cat([dense(tangents[name]).flatten(1) for name in sorted(tangents)], dim=1).T
    return tangents, matrix, torch.randn(15, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("num", [1, 4])
def test_mean_is_the_matrix_product(law, num):
    tangents, v, g = setup(law, num)
    c = coefficients("mean", v.T @ g, tangents.gram)
    estimate = flat(tangents.weighted_sum(c))
    torch.testing.assert_close(estimate, v @ v.T @ g / num)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("num", [1, 4, 15, 20])
def test_projection_is_least_squares(law, num):
    tangents, v, g = setup(law, num)
    c = coefficients("projection", v.T @ g, tangents.gram)
    estimate = flat(tangents.weighted_sum(c))
    torch.testing.assert_close(estimate, v @ torch.linalg.pinv(v) @ g)
    if num >= 15:  # the span is the whole space
        torch.testing.assert_close(estimate, g)


@pytest.mark.parametrize("law", LAWS, ids=repr)
def test_gram_matrix(law):
    tangents, v, _ = setup(law, 5)
    torch.testing.assert_close(tangents.gram(), v.T @ v)


@pytest.mark.parametrize("combine", ["mean", "projection"])
def test_rows_are_combined_on_their_own(combine):
    params = {"points": torch.zeros(4, 3, dtype=torch.float64)}
    tangents = Normal().sample(params, range(2), rowwise=True)
    g = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    derivatives = (dense(tangents["points"]) * g).sum(-1)
    rows = tangents.weighted_sum(coefficients(combine, derivatives, tangents.gram))["points"]
    for i in range(4):
        one = Directions(tangents.buffer[:, i], [Piece("points", params["points"][i], 3)])
        row = one.weighted_sum(coefficients(combine, derivatives[:, i], one.gram))["points"]
        torch.testing.assert_close(rows[i], row)


@pytest.mark.parametrize("law", LAWS, ids=repr)
@pytest.mark.parametrize("num", [1, 4])
def test_a_sum_leaves_the_directions_as_they_are(law, num):
    tangents, v, _ = setup(law, num)
    before, weights = tangents.buffer.clone(), torch.arange(2.0, 2.0 + num, dtype=torch.float64)
    for _ in range(2):
        torch.testing.assert_close(flat(tangents.weighted_sum(weights)), v @ weights)
    assert torch.equal(tangents.buffer, before)
