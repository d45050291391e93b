"""The model of step time on several ranks."""

import json
import sys

import pytest
import torch

from fgtrain.commands.bench import main as run_command
from fgtrain.studies.benchmarks.scaling import Compute, Link, seconds_per_progress, step_seconds, winning_bandwidth

COMPUTE = Compute("m", 1_000_000, 8, 0.030, 0.025, 0.001, 999.0)
SLOW, FAST = Link(1e6, 1e-4), Link(1e15, 0.0)


def test_closed_forms_at_two_ranks():
    found = step_seconds(COMPUTE, SLOW, 2)
    gather = 0.5 * 4e6 / 1e6 + 1e-4
    assert found["backprop ddp"] == pytest.approx(0.010 + 2 * gather)
    assert found["backprop fsdp"] == pytest.approx(3 * gather)
    assert found["backprop, one bucket"] == pytest.approx(0.030 + 2 * gather)
    assert found["fwdgrad shared"] == pytest.approx(0.025 + 2 * (0.5 * 32 / 1e6 + 1e-4))
    assert found["fwdgrad per_rank"] == pytest.approx(0.025 + 0.001 + 0.5 * 64 / 1e6 + 1e-4)


def test_on_an_infinite_link_only_compute_is_left():
    found = step_seconds(COMPUTE, FAST, 8)
    assert found["backprop ddp"] == pytest.approx(COMPUTE.backprop)
    assert found["fwdgrad shared"] == pytest.approx(COMPUTE.forward_gradient)


def test_winning_bandwidth_is_where_both_take_the_same_time():
    slow = Compute("m", 1_000_000, 8, 0.030, 0.040, 0.001, 999.0)
    bandwidth = winning_bandwidth(slow, 8, 1e-5)
    found = step_seconds(slow, Link(bandwidth, 1e-5), 8)
    assert found["fwdgrad shared"] == pytest.approx(found["backprop ddp"], rel=1e-2)
    assert winning_bandwidth(COMPUTE, 8, 0.0) == float("inf")


def test_progress_pays_for_the_variance():
    step, progress = step_seconds(COMPUTE, SLOW, 4), seconds_per_progress(COMPUTE, SLOW, 4)
    assert progress["backprop ddp"] == step["backprop ddp"]
    assert progress["fwdgrad shared"] == pytest.approx(1000 * step["fwdgrad shared"])
    assert progress["fwdgrad per_rank"] == pytest.approx((1 + 999 / 4) * step["fwdgrad per_rank"])
    assert winning_bandwidth(COMPUTE, 4, 0.0, progress=True) < winning_bandwidth(COMPUTE, 4, 0.0)


def test_script(tmp_path, monkeypatch, capsys):
    rows_file = tmp_path / "rows.json"
    options = f"--scaling --models digits_mlp --batch-sizes 8 --rounds 2 --ranks 2 3 --gbit 1 --json {rows_file}"
    monkeypatch.setattr(sys, "argv", ["bench.py", *options.split(), "--threads", str(torch.get_num_threads())])
    run_command()
    assert [row["ranks"] for row in json.loads(rows_file.read_text())] == [2, 3]
    assert "digits_mlp" in capsys.readouterr().out
