"""scripts/bench.py as a user runs it, with a clock that advances by 10 ms at every reading."""

import json
import os
import sys
import threading
import time
from itertools import count
from types import SimpleNamespace

import pytest
import torch

from fgtrain import ForwardGradient
from fgtrain.commands import bench
from fgtrain.commands.bench import main as run_command
from fgtrain.studies.benchmarks import chains
from fgtrain.studies.benchmarks.loop import loop_overhead
from fgtrain.studies.benchmarks.methods import methods_of
from fgtrain.studies.benchmarks.peers import peers_of
from fgtrain.studies.benchmarks.steps import make_problem, measure


@pytest.mark.slow
def test_rows_and_table(tmp_path, monkeypatch, capsys):
    rows_file = tmp_path / "rows.json"
    options = "--models digits_mlp --batch-sizes 8 16 --num-tangents 1 2 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split(), "--threads", str(torch.get_num_threads())])
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--json", str(rows_file)])
    clock = (0.01 * i for i in count()).__next__
    monkeypatch.setattr(
        "fgtrain.studies.benchmarks.steps.time", SimpleNamespace(perf_counter=clock, process_time=clock)
    )
    run_command()
    rows = json.loads(rows_file.read_text())
    listed = [(row["batch_size"], row["method"], row["num_tangents"]) for row in rows]
    each = [("forward", 0), ("backprop", 0), ("fwdgrad", 1), ("fwdgrad", 2)]
    assert listed == [(batch_size, *row) for batch_size in (8, 16) for row in each]
    for row in rows:  # 0.05 seconds are five steps, between two looks at the clock
        assert row["step_ms"] == pytest.approx(10 / 5)
        assert row["ratio_to_backprop"] == pytest.approx(1)
        assert row["ratio_to_forward"] == pytest.approx(1)
        assert row["step_ms_quartiles"] == pytest.approx([10 / 5] * 2)
    for forward, backprop, *others in (rows[:4], rows[4:]):
        for row in (forward, backprop, *others):
            assert row["peak_to_backprop"] == row["peak_mib"] / backprop["peak_mib"]
            assert row["peak_to_forward"] == row["peak_mib"] / forward["peak_mib"]
    assert "fwdgrad" in capsys.readouterr().out


@pytest.mark.parametrize("mode", [("--chains", "--widths", "2"), ("--scaling", "--models", "digits_mlp")])
@pytest.mark.parametrize("to_pipe", [False, True])
def test_what_was_measured_before_ctrl_c_is_written(mode, to_pipe, tmp_path, monkeypatch):
    """As one JSON document, which has the first of the parts."""
    path, done, read = tmp_path / "rows.json", [], list[str]()
    reader = threading.Thread(target=lambda: read.append(path.read_text()))
    if to_pipe:
        os.mkfifo(path)
        reader.start()
    for owner, name in ((chains, "_cost"), (bench, "measure_compute")):
        monkeypatch.setattr(owner, name, _once(getattr(owner, name), done))
    argv = ["bench.py", *mode, "--num-tangents", "1", "2", "--batch-sizes", "8", "--rounds", "1", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run_command()
    if to_pipe:
        reader.join(10)
    rows = json.loads(read[0] if to_pipe else path.read_text())
    assert len(rows) == (9 if "--scaling" in mode else 1)  # nine links and sizes


def _once(measure, done):
    def run(*args):
        if done:
            raise KeyboardInterrupt
        done.append(args)
        return measure(*args)

    return run


@pytest.mark.slow
def test_memory_is_what_backprop_must_store():
    """The inputs of every layer; in a deep network with a large batch, everything else is small in comparison."""
    batch_size, width, layers = 4096, 256, 8
    forward, backprop = measure("deep8", batch_size, [], torch.device("cpu"), rounds=1)
    activation = 4 * batch_size * width / 2**20
    assert forward.peak_mib == pytest.approx(2 * activation, rel=0.05)  # a layer's input and output
    assert backprop.peak_mib >= layers * activation


def test_steps_leave_the_learning_problem_intact():
    problem = make_problem("digits_mlp", 8, torch.device("cpu"))
    assert problem.losses(problem.model).shape == (8,)


@pytest.mark.slow
def test_methods_are_those_of_the_configuration():
    with pytest.raises(Exception, match="method/nosuch"):
        methods_of(["nosuch"], ["normal"], [1])
    fixed, crossed = methods_of(["backprop", "fwdgrad"], ["rademacher"], [3])
    assert (fixed.tangents, fixed.num_tangents) == ("", 0)
    assert isinstance(crossed.estimator, ForwardGradient)
    assert crossed.estimator.num_tangents == 3
    assert repr(crossed.estimator.tangents) == "Rademacher()"


@pytest.mark.slow
def test_measurement_of_the_loop(monkeypatch):
    """By a clock that shows 0, 1, 4, 9, .. seconds: 1 - 0 for the warm-up, 9 - 4 for the bare loop, and so on."""
    clock = SimpleNamespace(process_time=(float(i**2) for i in count()).__next__, perf_counter=time.perf_counter)
    monkeypatch.setattr("fgtrain.studies.benchmarks.loop.time", clock)
    measured = loop_overhead("backprop", num_steps=20, repeats=1)
    expected = {"bare_us": 5e6 / 20, "plain_us": 9e6 / 20, "trained_us": 13e6 / 20, "to_plain": 13 / 9}
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_peers_step_along_forward_gradients(num_tangents):
    problem = make_problem("digits_mlp", 8, torch.device("cpu"))
    problem = problem._replace(model=problem.model.double(), inputs=problem.inputs.double())
    before = [p.detach().clone() for p in problem.model.parameters()]
    grads = torch.autograd.grad(problem.losses(problem.model).mean(), list(problem.model.parameters()))
    peer, *_ = peers_of([num_tangents])
    assert peer.make_step is not None
    step = peer.make_step(problem, num_tangents)
    torch.manual_seed(1)
    step()
    torch.manual_seed(1)
    tangents = [torch.empty(num_tangents, *p.shape, dtype=p.dtype).normal_() for p in before]
    slopes = sum((v * g).flatten(1).sum(1) for v, g in zip(tangents, grads, strict=True))
    for p, old, v in zip(problem.model.parameters(), before, tangents, strict=True):
        moved = old - 1e-6 * torch.tensordot(slopes, v, 1) / num_tangents
        torch.testing.assert_close(p - old, moved - old, rtol=1e-6, atol=0)
