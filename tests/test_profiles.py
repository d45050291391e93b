"""Profiles: the functions have their minima, batching changes nothing, the shares are counted right."""

import json
import sys

import pytest
import torch

from fgtrain import SPSA, Backprop, ForwardGradient
from fgtrain.profiles import ANY_DIMENSION, PLANE, Solved, evaluations_of, problems, scale_of, share_solved, solve
from fgtrain.random import keyed_generator
from fgtrain.tasks import Points, Sphere

from .test_script import load_script


@pytest.mark.parametrize("function", [*problems([2, 5], 3)], ids=lambda f: f"{type(f).__name__}{f.dim}")
def test_minima(function, float64):
    minima = function.minima().double().requires_grad_()
    values = function.value(minima)
    assert values.detach().numpy() == pytest.approx(function.minimum, abs=1e-9)
    (grads,) = torch.autograd.grad(values.sum(), minima)
    assert grads.abs().max() < 1e-4
    low, high = function.domain
    anywhere = low + (high - low) * torch.rand(1000, function.dim, generator=torch.Generator().manual_seed(0))
    assert function.value(anywhere).min() >= function.minimum


def test_problems_are_many():
    assert len(problems([2, 10], 1)) == len(PLANE) + 2 * len(ANY_DIMENSION) == 27


def test_batch_is_as_one_at_a_time(float64):
    rates = [1.0, 0.1, 0.01]
    batched = solve(Sphere(3 * 4, dim=3), "backprop", Backprop(), rates, 4, 50)
    assert batched.lr in rates
    alone = solve(Sphere(4, dim=3), "backprop", Backprop(), [batched.lr], 4, 50)
    assert torch.equal(alone.evaluations, batched.evaluations)


def test_gradient_descent_solves_the_sphere_when_theory_says_so(float64):
    # x <- (1 - 2 eta) x; f falls by (1 - 2 eta)^2 a step, to 1 % after log 0.01 / (2 log |1 - 2 eta|) steps
    found = solve(Sphere(1, dim=2), "backprop", Backprop(), [0.1], 1, 500, seed=3)
    function = Sphere(1, dim=2)
    model = Points(function)
    model.points.data = -5.12 + 10.24 * torch.rand(1, 2, generator=keyed_generator(3, 2))
    factor = torch.tensor(1 - 2 * 0.1 * scale_of(function, model)).abs().log()
    steps = torch.ceil(torch.tensor(0.01).log() / (2 * factor))
    assert found.evaluations.tolist() == [3 * steps.item()]  # a forward and a reverse sweep: three


def test_evaluations(float64):
    assert evaluations_of(1, None, 7) == 3
    assert evaluations_of(1, torch.zeros(7 * 4), 7) == 5
    assert evaluations_of(2, torch.zeros(7), 7) == 2
    for estimator, cost in ((ForwardGradient(rowwise=True, num_tangents=3), 4), (SPSA(rowwise=True), 2)):
        found = solve(Sphere(2, dim=2), "x", estimator, [0.01], 2, 300)
        assert all(e % cost == 0 for e in found.evaluations[found.evaluations.isfinite()].tolist())


def test_shares():
    found = [
        Solved("f", 2, "a", 1.0, torch.tensor([3.0, 30.0])),
        Solved("g", 2, "a", 1.0, torch.tensor([torch.inf, 5.0])),
    ]
    assert share_solved(found, torch.tensor([1.0, 3.0, 10.0, 100.0])).tolist() == [0, 0.25, 0.5, 0.75]


def test_script(tmp_path, monkeypatch, capsys):
    command = ["--methods", "backprop", "fwdgrad", "--dims", "2", "--starts", "2", "--rates", "2", "--iterations", "20"]
    monkeypatch.setattr(sys, "argv", ["profiles.py", *command, "--out", str(tmp_path)])
    try:
        load_script("profiles").main()
    finally:
        torch.set_default_dtype(torch.float32)
    rows = json.loads((tmp_path / "profiles.json").read_text())
    assert len(rows) == 2 * 16
    assert (tmp_path / "profiles.png").stat().st_size > 10_000
    assert "share of 32 problems" in capsys.readouterr().out
