"""A run is never lost: cut anywhere, by anything, it continues to the same weights, bit for bit."""

import errno
import os
import random
import re
import shutil
import signal
import zipfile
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch

from fgtrain.errors import CheckpointError, ConfigError, Interrupted, StorageError, disk_error
from fgtrain.lightning.atomic_files import save_atomically
from fgtrain.lightning.callbacks import RandomState, Recovery, Trajectory
from fgtrain.lightning.checkpoints import AtomicCheckpointIO, read_checked
from fgtrain.random import random_state, set_random_state
from fgtrain.runs.resume import checkpoint_to_resume
from fgtrain.schedulers import cosine
from tests.commands import results_under, train
from tests.every_method import EVERY_METHOD
from tests.every_method import make as make_estimator
from tests.interrupted import STEPS, Noisy, SignalAt, final_weights
from tests.kills import Started
from tests.small import Small, assert_equal_weights, make, trainer

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists", "ignore:The dirpath has changed")


def noisy_module(method, **options):
    torch.manual_seed(0)
    return make(
        make_estimator(method),
        model=Noisy(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
        scheduler=lambda o: cosine(o, 13),
        **options,
    )


def fit(module, folder, *callbacks, checkpoint=None):
    """Train to step 13 from the same random states."""
    L.seed_everything(1, verbose=False)
    run = trainer(
        folder, RandomState(), *callbacks, Recovery(str(folder)), max_steps=13, plugins=[AtomicCheckpointIO()]
    )
    run.fit(module, Small(), ckpt_path=checkpoint, weights_only=True)
    return module.state_dict()


@pytest.mark.parametrize("cuts", [(4, 5), pytest.param((1, 8), marks=pytest.mark.slow)], ids=str)  # of 5 an epoch
@EVERY_METHOD
def test_resumed_equals_straight_at_any_step(method, cuts, tmp_path):
    straight = fit(noisy_module(method), tmp_path / "straight")
    for cut in cuts:
        folder = tmp_path / f"cut {cut}"
        with pytest.raises(Interrupted, match=rf"stopped by SIGTERM after step {cut}, saved in .*last\.ckpt"):
            fit(noisy_module(method), folder, SignalAt(cut))
        assert read_checked(folder / "last.ckpt")["global_step"] == cut
        resumed = fit(noisy_module(method), folder, checkpoint=checkpoint_to_resume(str(folder), tmp_path / "new"))
        assert_equal_weights(resumed, straight)


def test_killed_while_both_checkpoints_are_one_file(tmp_path):
    with pytest.raises(Interrupted):
        fit(noisy_module("fwdgrad"), tmp_path, SignalAt(4))
    (tmp_path / "previous.ckpt").hardlink_to(tmp_path / "last.ckpt")  # the next rename would have made them two
    fit(noisy_module("fwdgrad"), tmp_path, checkpoint=tmp_path / "last.ckpt")
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "previous.ckpt"]
    assert read_checked(tmp_path / "previous.ckpt")["global_step"] == 4


@pytest.mark.parametrize("cut", [1, 4])
def test_resumed_equals_straight_within_accumulation(cut, tmp_path):
    def module():
        return noisy_module("fwdgrad", accumulate_grad_batches=2)

    straight = fit(module(), tmp_path / "straight")
    with pytest.raises(Interrupted):
        fit(module(), tmp_path / "cut", SignalAt(cut))
    resumed = fit(module(), tmp_path / "cut", checkpoint=tmp_path / "cut" / "last.ckpt")
    assert_equal_weights(resumed, straight)


def test_there_is_a_last_checkpoint_at_every_moment(tmp_path, monkeypatch):
    found, replace = [], os.replace

    def replace_and_look(source, target, **options):
        found.append((tmp_path / "last.ckpt").exists())
        replace(source, target, **options)
        found.append((tmp_path / "last.ckpt").exists())

    monkeypatch.setattr(os, "replace", replace_and_look)
    recovery = Recovery(str(tmp_path), every_n_steps=2)
    run = trainer(tmp_path, RandomState(), recovery, max_steps=6, plugins=[AtomicCheckpointIO()])
    run.fit(noisy_module("fwdgrad"), Small())
    first = found.index(True)
    assert not any(found[:first])
    assert len(found) - first > 8
    assert all(found[first:])
    assert [read_checked(tmp_path / f"{name}.ckpt")["global_step"] for name in ("last", "previous")] == [6, 4]


def test_without_the_random_states_it_would_not(tmp_path):
    straight = fit(noisy_module("backprop"), tmp_path / "straight")
    with pytest.raises(Interrupted):
        fit(noisy_module("backprop"), tmp_path, SignalAt(4))
    content = read_checked(tmp_path / "last.ckpt")
    del content["random_state"]
    save_atomically(content, tmp_path / "last.ckpt")
    resumed = fit(noisy_module("backprop"), tmp_path, checkpoint=tmp_path / "last.ckpt")
    assert not all(torch.equal(resumed[name], value) for name, value in straight.items())


def test_random_states_come_back():
    def draw():
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), np.random.randn(), random.random(), random.gauss()

    state = random_state()
    drawn = draw()
    set_random_state(state)
    assert draw() == drawn


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_handlers_are_put_back(number, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with pytest.raises(Interrupted) as stopped:
        fit(noisy_module("backprop"), tmp_path, SignalAt(2, number))
    assert stopped.value.exit_status == 128 + number
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_signal_to_be_ignored_is(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        fit(noisy_module("backprop"), tmp_path, SignalAt(2, signal.SIGHUP))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert read_checked(tmp_path / "last.ckpt")["global_step"] == 13


def test_trajectory_is_whole_after_resuming(tmp_path):
    callback = Trajectory(str(tmp_path))
    callback.load_state_dict({"points": torch.zeros(3, 1, 2)})
    assert callback.state_dict()["points"].shape == (3, 1, 2)


# --- what is on the disk ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A run's folder with a last and a previous checkpoint."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    for step in (1, 2):
        name = folder / "checkpoints" / ("previous.ckpt" if step == 1 else "last.ckpt")
        save_atomically({"global_step": step, "state_dict": {"w": torch.arange(1000.0)}}, name)
    return folder


def damage(path, how):
    content = path.read_bytes()
    middle = len(content) // 2
    if how == "truncated":
        path.write_bytes(content[:middle])
    elif how == "a flipped bit":
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "text":
        path.write_text("not a checkpoint")
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("some.txt", "another archive")


@pytest.mark.parametrize("how", ["truncated", "a flipped bit", "empty", "text", "another archive"])
def test_damaged_checkpoint_is_refused_and_the_previous_one_used(how, saved, capsys):
    last, previous = (saved / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    assert checkpoint_to_resume(str(saved), saved) == last
    damage(last, how)
    assert checkpoint_to_resume(str(saved), saved) == previous
    assert f"{last} is damaged" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match=r"last.ckpt is damaged.*; try resume=.*previous.ckpt"):
        checkpoint_to_resume(str(last), saved / "other")
    damage(previous, how)
    with pytest.raises(CheckpointError, match="no other checkpoint is left"):
        checkpoint_to_resume("auto", saved)


def test_code_in_a_checkpoint_is_not_run(saved):
    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {saved / 'ran'}",)

    torch.save({"state_dict": Payload()}, saved / "checkpoints" / "last.ckpt")
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
        read_checked(saved / "checkpoints" / "last.ckpt")
    assert not (saved / "ran").exists()


def test_full_disk_leaves_the_last_good_checkpoint(saved):
    last = saved / "checkpoints" / "last.ckpt"
    (saved / "checkpoints" / f"last.ckpt.{os.getpid()}.tmp").symlink_to("/dev/full")
    with pytest.raises(
        StorageError, match=r"cannot write .*last.ckpt: No space left on device; earlier files are intact"
    ):
        save_atomically({"state_dict": {"w": torch.zeros(100_000)}}, last)
    assert read_checked(last)["global_step"] == 2


def test_which_checkpoint(saved, tmp_path):
    assert checkpoint_to_resume(None, tmp_path / "new") is None
    assert checkpoint_to_resume("auto", tmp_path / "new") is None
    assert checkpoint_to_resume("auto", saved) == saved / "checkpoints" / "last.ckpt"
    with pytest.raises(ConfigError, match=r"holds a run that has not finished; continue it with resume=auto"):
        checkpoint_to_resume(None, saved)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"contains no checkpoint \(last.ckpt or previous.ckpt\)"):
        checkpoint_to_resume(str(tmp_path / "empty"), tmp_path)


# --- through the script ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_directory_is_kept(tmp_path):
    assert train(tmp_path, *STEPS)[0] == 0
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    status, _, err = train(tmp_path, *STEPS)
    assert (status, err.count("\n")) == (2, 1)
    assert "holds a finished run; name another folder with hydra.run.dir=" in err
    status, out, err = train(tmp_path, *STEPS, "resume=auto")
    assert status == 0, err
    assert "test/acc" in out
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_foreign_checkpoint_is_one_line(tmp_path):
    """One that lies in no run's folder, so that no configuration tells what it is of."""
    assert train(tmp_path, *STEPS)[0] == 0
    (tmp_path / "run" / "checkpoints" / "last.ckpt").rename(tmp_path / "lone.ckpt")
    for change, message in (
        ("model.hidden=[32]", r"model.1.bias is (64,) in the checkpoint and (32,) in this run"),
        ("model=logistic", r"model.1.bias is (64,) in the checkpoint and (10,) in this run"),
        ("model.hidden=[64,64]", r"of another run: "),
        ("optimizer=adam", r"of another run: its optimizer was not Adam"),
        ("optimizer.momentum=0.5", r"momentum of its optimizer is 0.0, but 0.5 in this run"),
        ("lr=0.1", r"lr of its optimizer is 30.0, but 0.1 in this run"),
        ("callbacks=none", r"holds the state of ModelCheckpoint"),
    ):
        status, _, err = train(tmp_path, change, "resume=lone.ckpt", "trainer.max_steps=70")
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err


@pytest.mark.slow
def test_weights_without_a_run_are_one_line(tmp_path):
    assert train(tmp_path, *STEPS)[0] == 0
    torch.save({"state_dict": final_weights(tmp_path)}, tmp_path / "weights.ckpt")
    torch.save(torch.zeros(3), tmp_path / "tensor.ckpt")
    for name, message in (("weights", "it has no optimizer_states, loops"), ("tensor", "it holds a Tensor")):
        status, _, err = train(tmp_path, f"resume={name}.ckpt", "trainer.max_steps=70")
        assert (status, err.count("\n")) == (2, 1), err
        assert message in err


class SignalInTest(L.Callback):
    def on_test_start(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("callback", "where"),
    [(SignalAt(16, signal.SIGINT), "16, which was not saved"), (SignalInTest(), "60, during the test")],
)
def test_ctrl_c_without_checkpoints_is_one_line(callback, where, tmp_path, monkeypatch):
    monkeypatch.setattr("fgtrain.runs.build.StepProgress", lambda: callback)
    handler = signal.getsignal(signal.SIGINT)
    try:
        status, _, err = train(tmp_path, *STEPS, "callbacks=none")
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning leaves it ignored
    assert status == 130
    assert err.splitlines()[-1] == f"fgtrain: interrupted after step {where}"
    assert "Traceback" not in err
    assert not results_under(tmp_path)


@pytest.mark.slow
def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    fills = tmp_path / "run" / f"results.json.{os.getpid()}.tmp"
    with monkeypatch.context() as patch:
        patch.setattr("fgtrain.runs.build.StepProgress", lambda: Full(fills))
        status, _, err = train(tmp_path, *STEPS)
    assert status == 2
    assert "results.json: No space left on device" in err.splitlines()[-1]
    assert not (tmp_path / "run" / "results.json").exists()
    status, _, err = train(tmp_path, *STEPS, "resume=auto")
    assert status == 0, err
    assert results_under(tmp_path)[0]["steps"] == 60


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, RuntimeError])
def test_a_file_that_is_not_finished_leaves_no_part(error, tmp_path):
    class Unfinished:
        def __reduce__(self):
            raise error("in the middle")

    (tmp_path / "file").write_text("old")
    with pytest.raises(error, match="in the middle"):
        save_atomically([torch.ones(3), Unfinished()], tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_text() == "old"


@pytest.mark.parametrize("run_dir", ["/sys/fgtrain", "/dev/null/run"])
def test_folder_that_cannot_be_written_is_one_line(run_dir, tmp_path):
    status, _, err = train(tmp_path, f"hydra.run.dir={run_dir}")
    assert (status, err.count("\n")) == (2, 1)
    assert f"cannot write {run_dir}" in err


class Full(L.Callback):
    """Lets the disk be full for one file."""

    def __init__(self, path):
        self.path = path

    def on_train_start(self, trainer, pl_module):
        self.path.parent.mkdir(exist_ok=True)
        self.path.symlink_to("/dev/full")


def test_disk_that_fills_up_is_one_line(tmp_path, monkeypatch):
    name = f"next.{os.getpid()}.ckpt.tmp.{os.getpid()}.tmp"
    monkeypatch.setattr("fgtrain.runs.build.StepProgress", lambda: Full(tmp_path / "run" / "checkpoints" / name))
    status, _, err = train(tmp_path, *STEPS)
    assert status == 2
    assert re.search(r"cannot write .*run/checkpoints/next.*: No space left on device", err.splitlines()[-1])
    assert "Traceback" not in err


def test_the_error_of_a_disk_is_found_in_a_circle():
    a, b = RuntimeError("a"), ValueError("b")
    a.__context__, b.__context__ = b, a
    assert disk_error(a) is None
    b.__cause__ = OSError(errno.ESTALE, "Stale file handle")
    assert disk_error(a) is b.__cause__
    for number in (errno.ENOENT, errno.ESTALE, errno.EROFS, errno.ENOSPC, errno.EPIPE):
        assert disk_error(OSError(number, "")) is not None


@pytest.mark.parametrize(("seconds", "every"), [(0.001, 10), (0.23, 4), (3.0, 1)], ids=str)
def test_ranks_ask_one_another_for_signals_every_tenth_step_or_every_second(seconds, every, tmp_path, monkeypatch):
    now, elsewhere, asked = 0.0, 0.0, []

    def reduce(told, reduce_op):
        assert reduce_op == "max"
        asked.append(run.global_step)
        return told.maximum(torch.tensor([elsewhere, 0.0]))

    clock, strategy = SimpleNamespace(monotonic=lambda: now), SimpleNamespace(root_device="cpu", reduce=reduce)
    monkeypatch.setattr("fgtrain.lightning.callbacks.recovery.time", clock)
    run: Any = SimpleNamespace(world_size=2, strategy=strategy, global_step=0, is_global_zero=False)
    run.save_checkpoint = lambda _: None
    recovery, module = Recovery(str(tmp_path)), L.LightningModule()
    recovery.on_train_start(run, module)

    def take_steps():
        nonlocal now, elsewhere
        for run.global_step in range(1, 100):
            now, elsewhere = seconds * run.global_step, float(run.global_step > 50)
            recovery.on_train_batch_end(run, module, None, None, 0)

    with pytest.raises(Interrupted, match="stopped by SIGTERM after step"):
        take_steps()
    recovery.on_exception(run, module, Interrupted("", 0))
    assert {after - before for before, after in pairwise(asked[1:])} == {every}
    assert run.global_step - 50 <= every


@pytest.mark.slow
@pytest.mark.parametrize("how", ["moved", "removed"])
def test_folder_that_goes_away_ends_the_run(how, tmp_path):
    command = ("hydra.run.dir=run", "trainer.max_steps=1000000", "callbacks.recovery.every_n_steps=20")
    run = Started(tmp_path, *command, "self_check=false")
    run.wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "run").rename(tmp_path / "away")
    if how == "removed":
        shutil.rmtree(tmp_path / "away")
    assert run.wait() == 2, run.err
    assert re.match(r"fgtrain: .*No such file or directory", run.err.splitlines()[-1]), run.err
    assert not (tmp_path / "run").exists()
