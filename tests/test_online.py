"""The study of learning on a stream: its rivals have the gradients that they are named for."""

import json
import sys

import pytest
import torch

from fgtrain.commands.online import main as run_command
from fgtrain.data import Recall
from fgtrain.models import DiagonalRNN
from fgtrain.studies.online import WAYS, cost, learn

BATCH = Recall(3, lag=9, symbols=3).steps(0, 24)


def network():
    torch.manual_seed(0)
    return DiagonalRNN(5, 4, 2, 20.0, 0.3).double()


def grads(way, *batches):
    learner = WAYS[way].make()
    return [learner(network(), batch).grads for batch in batches]


def test_checkpoints_change_no_gradient():
    longer = Recall(3, lag=9, symbols=3).steps(0, 250)
    (stored,), (anew,) = grads("full BPTT", longer), grads("full BPTT, checkpoints", longer)
    torch.testing.assert_close(anew, stored)


def test_truncated_backpropagation_goes_on_from_the_last_state():
    """Its second chunk has the value of the whole sequence, and the derivatives of a part of it."""
    first, second = (tuple(part[:, places] for part in BATCH) for places in (slice(0, 12), slice(12, 24)))
    only_second = BATCH[0], torch.cat([torch.full_like(first[1], -1), second[1]], 1)
    (whole,), (_, part) = grads("full BPTT", only_second), grads("truncated BPTT, 20", first, second)
    torch.testing.assert_close(part["head.weight"], whole["head.weight"])
    assert not torch.allclose(part["layers.0.recurrence.weight"], whole["layers.0.recurrence.weight"])


def test_immediate_derivatives_are_those_of_one_step_at_a_time():
    learner, model = WAYS["truncated BPTT, 20"].make(), network()
    # The first step has no state before it, so no derivative by the factors.
    singles = [learner(model, (BATCH[0][:, t : t + 1], BATCH[1][:, t : t + 1])) for t in range(24)]
    (found,) = grads("immediate derivatives", BATCH)
    asked = (BATCH[1] >= 0).sum(0)
    for name, g in found.items():
        expected = (
            sum(n * each.grads.get(name, torch.zeros(())) for n, each in zip(asked, singles, strict=True)) / asked.sum()
        )
        torch.testing.assert_close(g, expected)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_trains_on_the_stream(way):
    data, model = Recall(3, lag=9, symbols=3), network().float()
    found = learn(way, data, model, torch.optim.SGD(model.parameters(), lr=0.1), 2, 1.0)
    assert 0 <= found.accuracy <= 1
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), network().float().parameters(), strict=True))


@pytest.mark.slow
def test_memory_is_flat_forwards_in_time_and_grows_in_full_backpropagation():
    data, model = Recall(3, lag=9, symbols=3), network().float()
    flat, grown = ([cost(way, data, model, t).peak_mib for t in (100, 400)] for way in ("forward in time", "full BPTT"))
    assert flat[1] == pytest.approx(flat[0], rel=0.05)
    assert grown[1] > 3 * grown[0]


@pytest.mark.slow
def test_the_command_writes_a_table_and_figures(tmp_path, monkeypatch, capsys):
    arguments = ["--lags", "5", "--lengths", "20", "40", "--updates", "5", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["online", *arguments])
    run_command()
    assert {path.name for path in tmp_path.iterdir()} == {"online.json", "online.png", "online.svg"}
    out = capsys.readouterr().out
    assert all(way in out for way in WAYS)
    found = json.loads((tmp_path / "online.json").read_text())
    assert len(found["costs"]) == 2 * len(WAYS)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [(name, "0", "--lags, --lengths and --updates must be at least 2") for name in ("--lags", "--lengths", "--updates")]
    + [
        ("--seed", value, f"--seed must be from 0 to 4294967294, got {value}")
        for value in ("-1", "99999999999999999999")
    ],
)
def test_a_bad_number_is_one_line(option, value, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["online", option, value])
    with pytest.raises(SystemExit) as end:
        run_command()
    err = capsys.readouterr().err
    assert (end.value.code, err) == (2, f"fgtrain: {message}\n")
