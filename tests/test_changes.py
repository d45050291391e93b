"""The settings that a command may change when it continues a run, and those that it may not."""

import json
import shutil

import pytest

from tests.commands import results_under, train
from tests.interrupted import STEPS, Killed, KillLast, final_weights

pytestmark = pytest.mark.slow

CONSTANT = (*STEPS, "scheduler=constant")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    assert train(folder, *CONSTANT)[0] == 0
    return folder


@pytest.fixture
def begun(finished, tmp_path):
    """A folder of a test's own, with a copy of the finished run."""
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize("resume", ["resume=auto", "resume=run"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "method=backprop",
            "method._target_ is fgtrain.ForwardGradient in the run of run and fgtrain.Backprop in this",
        ),
        ("lr=0.1", "lr is 30.0 in the run of run and 0.1 in this command"),
        ("model.hidden=[32]", "model.hidden is [64] in the run of run and [32] in this command"),
        ("data.batch_size=64", "data.batch_size is 256 in the run of run and 64 in this command"),
        ("seed=1", "seed is 42 in the run of run and 1 in this command"),
        ("scheduler=cosine", "scheduler._target_ is not set in the run of run and fgtrain.schedulers.cosine in this"),
        ("trainer.max_steps=30", "trainer.max_steps=30: the run of run has done 60 already; raise it to continue"),
    ],
)
def test_what_may_not_change_is_refused(change, message, resume, finished):
    where = "run" if resume == "resume=auto" else "other"
    before = {path: path.read_bytes() for path in (finished / "run").rglob("*") if path.is_file()}
    status, _, err = train(finished, *CONSTANT, change, resume, f"hydra.run.dir={where}")
    assert (status, err.count("\n")) == (2, 1), err
    assert message in err.replace(f"{finished}/", "")
    after = {path: path.read_bytes() for path in (finished / "run").rglob("*") if path.is_file()}
    assert {path for path in after if path.name != ".lock" and after[path] != before.get(path)} == set()


def test_what_is_looked_at_may_change(finished):
    options = (
        "trainer.val_check_interval=10",
        "quiet=true",
        "callbacks=gradient_quality",
        "trainer.log_every_n_steps=7",
    )
    status, out, err = train(finished, *CONSTANT, "resume=auto", *options)
    assert (status, out, err) == (0, "", "")


def test_finished_run_is_extended(begun):
    longer = ("trainer.max_steps=80", "resume=auto")
    status, out, err = train(begun, *CONSTANT, *longer)
    assert status == 0, err
    assert "80" in out
    (begun / "straight").mkdir()
    assert train(begun / "straight", *CONSTANT, "trainer.max_steps=80")[0] == 0
    extended, straight = final_weights(begun), final_weights(begun / "straight")
    assert all(extended[name].equal(value) for name, value in straight.items())
    found, expected = results_under(begun / "run")[0], results_under(begun / "straight")[0]
    assert found["metrics"]["test/loss"] == expected["metrics"]["test/loss"]
    assert found["steps"] == 80
    status, _, err = train(begun, *CONSTANT, *longer)
    assert status == 0, err


def test_extension_that_is_cut_goes_on(begun, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("fgtrain.runs.build.StepProgress", lambda: KillLast(10))
        with pytest.raises(Killed):
            train(begun, *CONSTANT, "trainer.max_steps=80", "resume=auto")
    assert train(begun, *CONSTANT, "trainer.max_steps=80", "resume=auto")[0] == 0
    assert json.loads((begun / "run" / "results.json").read_text())["steps"] == 80


def test_function_is_extended(tmp_path):
    beale = ("task=beale", "method=backprop", "hydra.run.dir=run", "resume=auto", "~callbacks.trajectory")
    assert train(tmp_path, *beale, "trainer.max_steps=20")[0] == 0
    status, _, err = train(tmp_path, *beale, "trainer.max_steps=30")
    assert status == 0, err
    (tmp_path / "straight").mkdir()
    assert train(tmp_path / "straight", *beale, "trainer.max_steps=30")[0] == 0
    found, expected = results_under(tmp_path / "run")[0], results_under(tmp_path / "straight")[0]
    assert (found["solution"], found["steps"]) == (expected["solution"], 30)


def test_a_rate_that_jumps_is_named(tmp_path):
    assert train(tmp_path, *STEPS)[0] == 0
    status, _, err = train(tmp_path, *STEPS, "trainer.max_steps=80", "resume=auto")
    assert status == 0, err
    assert "the learning rate jumps from 0 to 4.39 at step 60, since its schedule now has 80 steps" in err


def test_a_schedule_that_is_over_is_refused(tmp_path):
    linear = ("scheduler._target_=torch.optim.lr_scheduler.LinearLR", "+scheduler.start_factor=1.0")
    linear += ("+scheduler.end_factor=0.0", "+scheduler.total_iters=60", "~scheduler.warmup_steps")
    status, _, err = train(tmp_path, *STEPS, *linear)
    assert status == 0, err
    status, _, err = train(tmp_path, *STEPS, *linear, "trainer.max_steps=80", "resume=auto")
    assert status == 2
    assert "the learning rate is 0 at step 60, where the run continues" in err.splitlines()[-1]


def test_early_stop_is_kept_and_can_be_lifted(tmp_path):
    stopping = (*CONSTANT, "callbacks=early_stopping", "trainer.val_check_interval=5", "resume=auto")
    stopping += ("callbacks.early_stopping.monitor=val/acc", "callbacks.early_stopping.patience=0")
    assert train(tmp_path, *stopping)[0] == 0
    steps = results_under(tmp_path)[0]["steps"]
    assert steps < 60
    status, _, err = train(tmp_path, *stopping, "trainer.max_steps=80")
    assert (status, err.count("\n")) == (2, 1), err
    assert "was ended by early stopping or trainer.max_time, not by its length" in err
    status, _, err = train(tmp_path, *stopping, "callbacks.early_stopping.patience=100")
    assert status == 0, err
    assert results_under(tmp_path)[0]["steps"] == 60


def test_finished_run_without_checkpoints(tmp_path):
    assert train(tmp_path, *CONSTANT, "callbacks=none")[0] == 0
    status, _, err = train(tmp_path, *CONSTANT, "callbacks=none", "trainer.max_steps=80", "resume=auto")
    assert (status, err.count("\n")) == (2, 1), err
    assert "holds a finished run without a checkpoint to continue from" in err
    assert results_under(tmp_path)


def test_a_folder_of_another_run_is_not_written_over(begun):
    assert train(begun, *CONSTANT, "hydra.run.dir=other", "seed=1")[0] == 0
    (begun / "other" / "results.json").unlink()
    status, _, err = train(begun, *CONSTANT, "hydra.run.dir=other", "resume=run", "trainer.max_steps=80")
    assert (status, err.count("\n")) == (2, 1), err
    assert "holds a run that has not finished" in err
