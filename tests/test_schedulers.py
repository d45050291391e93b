"""The learning rates of `cosine`, and its warning about a warm-up that does not end."""

import math

import pytest
import torch
from torch.optim import lr_scheduler

from fgtrain.errors import CheckpointError, ConfigError
from fgtrain.lightning.checkpoints import refuse_other_optimizer
from fgtrain.runs.build import _try_out
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


SCHEDULES = {
    "cosine": lambda optimizer: cosine(optimizer, 6, 2),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
    "cyclic": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.1, 0.3, step_size_up=2),
}


@pytest.mark.parametrize("make", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("momentum", [0.5, 0.9])
def test_an_optimizer_is_the_same_after_the_changes_of_its_scheduler(make, momentum):
    """Settings that the scheduler leaves alone, and its own start, must be equal."""

    def optimizer(lr=2.0, weight_decay=0.1):
        parameter = torch.nn.Parameter(torch.zeros(1))
        return torch.optim.SGD([parameter], lr=lr, momentum=momentum, weight_decay=weight_decay)

    trained = optimizer()
    schedule = make(trained)
    for _ in range(3):
        trained.step()
        schedule.step()
    saved = trained.state_dict()
    refuse_other_optimizer(saved, optimizer(), make)
    with pytest.raises(CheckpointError, match=r"weight_decay of its optimizer is 0\.1, but 0\.2"):
        refuse_other_optimizer(saved, optimizer(weight_decay=0.2), make)
    if make is SCHEDULES["cosine"]:
        with pytest.raises(CheckpointError, match=r"lr of its optimizer is 2\.0, but 3\.0"):
            refuse_other_optimizer(saved, optimizer(lr=3.0), make)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau needs metrics at every step, which a run does not pass"),
        (lambda optimizer: {"scheduler": optimizer}, "a run needs a scheduler like those of PyTorch, got dict"),
    ],
)
def test_a_scheduler_that_a_run_cannot_step_is_refused(make, message):
    with pytest.raises(ConfigError, match=f"^scheduler: {message}"):
        _try_out(torch.optim.SGD, make)
