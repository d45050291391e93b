"""What `fgtrain.lightning._lightning` takes for granted of Lightning: a release that changes it is named here.

That runs go on from these states as they should is in tests/test_exact_resume.py.
"""

from importlib.metadata import version

import pytest
from lightning.pytorch.callbacks import LambdaCallback

from fgtrain import Backprop
from fgtrain.lightning._lightning import Counters, raise_limits
from tests.test_module import Small, make, trainer

CHANGED = f"Lightning {version('lightning')} has changed"


def fit_state(run):
    return run.fit_loop.state_dict()


@pytest.mark.parametrize("limits", [{"max_steps": 4}, {"max_epochs": 2}], ids=str)
def test_limits_can_be_raised(limits, tmp_path):
    """At the start of training, by one."""
    started = LambdaCallback(
        on_train_start=lambda run, _: raise_limits(run, "max_steps" in limits, "max_epochs" in limits)
    )
    run = trainer(tmp_path, started, **limits)
    run.fit(make(Backprop()), Small())
    assert run.global_step == (5 if "max_steps" in limits else 15), f"{CHANGED} where the limits of a run are"
    assert (run.max_steps, run.max_epochs) in [(5, -1), (-1, 3)]


def test_counters_are_those_of_the_run(tmp_path):
    """After three steps of the second epoch, each read in three hooks."""
    seen = []

    def look(run, *_):
        seen.append(Counters.of(fit_state(run)))

    hooks = {"on_train_batch_end": look, "on_validation_end": look, "on_train_epoch_end": look}
    run = trainer(tmp_path, LambdaCallback(**hooks), max_steps=8, num_sanity_val_steps=0)
    run.fit(make(Backprop()), Small())
    assert (
        seen[-5:]
        == [
            Counters(1, True, 1, 6, False, False),
            Counters(1, True, 2, 7, False, False),
            Counters(1, True, 3, 8, False, False),
            Counters(2, False, 3, 8, False),
        ][-5:]
        or seen
    ), CHANGED


@pytest.mark.parametrize(
    "state", [Counters(2, False, 0, 10, False), Counters(1, True, 3, 8, False), Counters(0, True, 5, 5, True, False)]
)
def test_counters_that_are_written_can_be_read(state, tmp_path):
    """In the layout of this release's checkpoints, with a place for everything."""
    fit = fit_state(trainer(tmp_path))
    names = set(fit)
    state.write(fit, 7)
    assert set(fit) == names, f"{CHANGED} the layout of a checkpoint"
    assert Counters.of(fit)[:5] == state[:5]
    fresh = fit_state(trainer(tmp_path))
    assert fresh["epoch_loop.state_dict"].keys() == fit["epoch_loop.state_dict"].keys(), (
        f"{CHANGED} the steps of its logs"
    )
    for name in ("epoch_progress", "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"):
        for part in ("current", "total"):
            assert fresh[name][part].keys() == fit[name][part].keys(), f"{CHANGED} the counters of {name}"


@pytest.mark.parametrize(
    ("state", "stages"),
    [
        (Counters(2, False, 0, 10, False), {"restarted_on_epoch_start", "restarted_on_last"}),
        (Counters(1, True, 3, 8, False), {"restarted_mid_epoch", "restarted_on_last"}),
        (
            Counters(0, True, 5, 5, True, False),
            {"restarted_mid_epoch", "restarted_on_last", "restarted_mid_evaluation"},
        ),
    ],
    ids=["before an epoch", "in an epoch", "before a validation"],
)
def test_states_are_taken_for_what_they_are(state, stages, tmp_path):
    run = trainer(tmp_path, max_epochs=4)
    fit = fit_state(run)
    state.write(fit, state.total)
    run.fit_loop.load_state_dict(fit)
    run.fit_loop.update_restart_stage()
    loops = (run.fit_loop, run.fit_loop.epoch_loop, run.fit_loop.epoch_loop.val_loop)
    found = {n for loop in loops for n in dir(loop) if n.startswith(("restarted_", "resumed_")) and getattr(loop, n)}
    assert found == stages, f"{CHANGED} what it makes of the counters"
