"""Profiles: the functions have their minima, batching changes nothing, the shares are counted right."""

import json
import math
import re
import sys
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from fgtrain import SPSA, Backprop, ForwardGradient
from fgtrain.commands.profiles import main as run_command
from fgtrain.random import keyed_generator
from fgtrain.studies.profiles import Solved, draw, evaluations_of, problems, scale_of, share_solved, solve
from fgtrain.tasks import Points, Sphere


def test_problems_are_many():
    few, many = problems([2], 1), problems([2, 10], 1)
    assert len({function.name for function in few}) == len(few) > 70
    assert len(many) - len(few) == sum(function.dim == 10 for function in many) > 30


def test_batch_is_as_one_at_a_time(float64):
    rates = [1.0, 0.1, 0.01]
    batched = solve(Sphere(3 * 4, dim=3), "backprop", Backprop(), rates, 4, 50)
    assert batched.lr in rates
    alone = solve(Sphere(4, dim=3), "backprop", Backprop(), [batched.lr], 4, 50)
    assert alone.evaluations == batched.evaluations


def test_gradient_descent_solves_the_sphere_when_theory_says_so(float64):
    # x <- (1 - 2 eta) x; f falls by (1 - 2 eta)^2 a step, to 1 % after log 0.01 / (2 log |1 - 2 eta|) steps
    found = solve(Sphere(1, dim=2), "backprop", Backprop(), [0.1], 1, 1500, seed=3)
    function = Sphere(1, dim=2)
    model = Points(function)
    model.points.data = -5.12 + 10.24 * torch.rand(1, 2, generator=keyed_generator(3, 2))
    factor = torch.tensor(1 - 2 * 0.1 * scale_of(function, model)).abs().log()
    steps = torch.ceil(torch.tensor(0.01).log() / (2 * factor))
    assert found.evaluations == [3 * steps.item()]  # a forward and a reverse sweep: three


def test_evaluations(float64):
    assert evaluations_of(1, None, 7) == 3
    assert evaluations_of(1, torch.zeros(7 * 4), 7) == 5
    assert evaluations_of(2, torch.zeros(7), 7) == 2
    for estimator, cost in ((ForwardGradient(rowwise=True, num_tangents=3), 4), (SPSA(rowwise=True), 2)):
        found = solve(Sphere(2, dim=2), "x", estimator, [0.01], 2, 300)
        assert all(e % cost == 0 for e in found.evaluations if math.isfinite(e))


def test_all_methods_have_the_same_budget(float64):
    """A start that is never solved is followed to the budget's last step, and no further."""
    for estimator, cost in ((Backprop(), 3), (ForwardGradient(rowwise=True), 2), (SPSA(rowwise=True), 2)):
        counted: Any = Mock(side_effect=estimator)
        solve(Sphere(1, dim=2), "x", counted, [1e-9], 1, 31)
        assert counted.call_count == 31 // cost


def test_the_drawn_lines_end_with_the_budget():
    found = [Solved("f", 2, "a", 1.0, [3.0, torch.inf])]
    (line,) = draw(found, 40).axes[0].lines
    assert float(np.max(line.get_xdata())) == pytest.approx(40)


def test_shares():
    found = [
        Solved("f", 2, "a", 1.0, [3.0, 30.0]),
        Solved("g", 2, "a", 1.0, [torch.inf, 5.0]),
    ]
    assert share_solved(found, torch.tensor([1.0, 3.0, 10.0, 100.0])).tolist() == [0, 0.25, 0.5, 0.75]


@pytest.mark.slow
def test_script(tmp_path, monkeypatch, capsys):
    command = [
        "--methods",
        "backprop",
        "fwdgrad",
        "--dims",
        "2",
        "--starts",
        "2",
        "--rates",
        "2",
        "--evaluations",
        "30",
    ]
    monkeypatch.setattr(sys, "argv", ["profiles.py", *command, "--out", str(tmp_path)])
    try:
        run_command()
    finally:
        torch.set_default_dtype(torch.float32)
    rows = json.loads((tmp_path / "profiles.json").read_text())
    assert len(rows) == 2 * len(problems([2], 1))
    assert (tmp_path / "profiles.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert f"share of {len(rows)} problems" in out
    header = next(line for line in out.splitlines() if "method" in line)
    assert re.findall(r"\d+", header) == ["10", "30"]  # what was run, and no more


def test_a_folder_that_cannot_be_made_is_noticed_first(float64, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["profiles", "--out", str(tmp_path / "file" / "out")])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code == 2
    assert capsys.readouterr().err == f"fgtrain: cannot write {tmp_path / 'file' / 'out'}: Not a directory\n"


@pytest.mark.parametrize("option", ["--starts=0", "--rates=-1", "--tolerance=nan", "--tolerance=1", "--evaluations=9"])
def test_bad_numbers_are_told_before_anything_runs(option, float64, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["profiles", option, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        run_command()
    err = capsys.readouterr().err
    assert (err.count("\n"), option.partition("=")[0] in err) == (1, True)
    assert not (tmp_path / "out").exists()
