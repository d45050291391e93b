"""The short rules for small operations: exact against backpropagation, and used instead of the general ones."""

import pytest
import torch
from torch import nn

import fgtrain
from fgtrain.forward_ad.registry import RULES

CHAINS = {
    "products": lambda a, x, c: a * x * x * 0.5 * c + x * c * a,
    "sums": lambda a, x, c: (a + x) - (c - x) + (1 - a) + 2 * (x - 1) + (x + c),
    "quotients": lambda a, x, c: a / (x + 2) + x / a + x / 3 + c / (a + 3),
    "both broadcast": lambda a, x, c: (x[:, None] * x[None, :] + a * x[:1]).flatten()[:3] * c,
    "functions": lambda a, x, c: x.exp() + (-x).sin() * x.cos() + x.tanh() + x.sigmoid() + (x + 3).log().sqrt(),
    "powers": lambda a, x, c: x**2 + x.square() + (x + 3) ** 1.5 + a**1,
    "parts": lambda a, x, c: torch.stack([*x, x[0], c[1]])[1:4] + torch.cat([x[:1], c[1:], x[-1:]])[:3],
    "joined along the last": lambda a, x, c: torch.stack([x, c, a.expand(3)], dim=-1)[..., 0] * x.unbind(0)[2],
    "matrices": lambda a, x, c: (x[:, None] @ c[None, :]) @ x + x @ (c[:, None] @ x[None, :]) + (x @ c) * x + c @ x,
    "in place": lambda a, x, c: (x + 1).mul_(3) * x + (x - c).add_(x) * (a - x).mul_(a),
}


def model():
    return nn.ParameterDict(
        {"a": torch.tensor(0.7, dtype=torch.float64), "x": torch.tensor([0.5, -1.0, 1.5], dtype=torch.float64)}
    )


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
def test_the_derivative_is_that_of_backpropagation(chain):
    net, constant = model(), torch.tensor([0.3, 2.0, -0.4], dtype=torch.float64)

    def loss(m):
        return (chain(m["a"], m["x"], constant) * torch.tensor([1.0, -2.0, 3.0]).double()).sum()

    exact = fgtrain.Backprop()(net, loss).grads
    tangents = {name: torch.randn(5, *p.shape, dtype=torch.float64) for name, p in net.items()}
    _, found = fgtrain.directional_derivatives(net, loss, tangents)
    expected = sum((tangents[name].reshape(5, -1) @ g.flatten()) for name, g in exact.items())
    torch.testing.assert_close(found, expected)


def test_a_change_in_place_of_a_shifted_tensor_leaves_its_source():
    """x + 1 has the tangent of x, but not in the same memory."""
    net = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})

    def loss(m):
        x = m["x"] * 1.5
        return (x * (x + 1).mul_(3)).sum()

    _, found = fgtrain.directional_derivatives(net, loss, {"x": torch.eye(2)})
    torch.testing.assert_close(found, fgtrain.Backprop()(net, loss).grads["x"])


def test_operands_of_two_dtypes_take_the_general_rule(monkeypatch):
    used = []
    monkeypatch.setitem(RULES, torch.Tensor.mul, lambda *args: used.append(args) or NotImplemented)
    net = nn.ParameterDict({"x": torch.tensor([1.0, 2.0])})
    double = torch.tensor([3.0, 4.0], dtype=torch.float64)
    for factor, general in ((torch.tensor([3.0, 4.0]), False), (double, True)):
        used.clear()
        _, found = fgtrain.directional_derivatives(net, lambda m, f=factor: m["x"].mul(f).sum(), {"x": torch.eye(2)})
        assert found.tolist() == [3, 4]
        assert bool(used) == general


def test_directions_of_another_dtype_are_followed():
    net = nn.ParameterDict({"a": torch.tensor(0.5), "x": torch.tensor([1.0, 2.0])})
    tangents = {"a": torch.ones(2, dtype=torch.float64), "x": torch.eye(2)}
    _, found = fgtrain.directional_derivatives(net, lambda m: (m["a"] * m["x"] * m["x"]).sum(), tangents)
    assert found.tolist() == [5 + 1, 5 + 2]
