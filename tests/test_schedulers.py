"""The learning rates of `cosine`, and its warning about a warm-up that does not end."""

import math

import pytest
import torch

from fgtrain.schedulers import cosine


def rates(total_steps, warmup_steps):
    """The learning rate of every step, in units of the optimizer's."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule, found = cosine(optimizer, total_steps, warmup_steps), []
    for _ in range(total_steps):
        found.append(schedule.get_last_lr()[0] / 2)
        optimizer.step()
        schedule.step()
    return found


def test_warm_up_and_half_a_cosine(caplog):
    expected = [0, 0.5, 1, *((1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3))]
    assert rates(6, 2) == pytest.approx(expected)
    assert not caplog.records


def test_a_warm_up_that_does_not_end_is_one_line(caplog):
    assert max(rates(4, 5)) < 1
    assert caplog.messages == [
        "warmup_steps=5 in a run of 4 steps: the learning rate never reaches its full value; warm up for less"
    ]
