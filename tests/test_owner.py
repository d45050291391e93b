"""A folder belongs to one run at a time."""

import fcntl
import json
import multiprocessing
import os
import signal
import time

import pytest

from fgtrain.errors import ConfigError
from fgtrain.runs.owner import owned
from tests.commands import results_under, train
from tests.kills import PATIENCE, Started


def hold(folder, mine):
    with owned(folder):
        mine.set()
        time.sleep(2 * PATIENCE)


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run."""
    context = multiprocessing.get_context("fork")
    mine = context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", mine))
    process.start()
    assert mine.wait(PATIENCE)
    yield process
    process.kill()
    process.join()


def test_second_comer_is_told_in_one_line(holder, tmp_path):
    for options in ((), ("resume=auto",)):
        status, out, err = train(tmp_path, "hydra.run.dir=run", "trainer.max_steps=3", *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"run belongs to a run in progress (process {holder.pid} on " in err.replace(f"{tmp_path}/", "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_killed_owner_holds_nothing(holder, tmp_path):
    (tmp_path / "run" / "results.json.123.tmp").touch()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with owned(tmp_path / "run"):
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_held_against_the_same_process_and_given_back(tmp_path):
    with owned(tmp_path), pytest.raises(ConfigError, match="belongs to a run in progress"), owned(tmp_path):
        pass
    with owned(tmp_path):
        pass


def test_a_forked_child_that_outlives_the_owner_holds_nothing(tmp_path):
    with owned(tmp_path):
        child = os.fork()
        if child == 0:
            time.sleep(PATIENCE)
            os._exit(0)
    try:
        with owned(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_file_system_that_cannot_lock(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)  # no such file system is at hand
    with owned(tmp_path):
        pass
    assert capsys.readouterr().err.endswith("cannot lock (Operation not supported): do not start another run in it\n")


@pytest.mark.slow
def test_twenty_runs_at_once_leave_twenty_results(tmp_path):
    command = ("trainer.max_steps=3", "quiet=true", "self_check=false", "method=backprop")
    runs = [Started(tmp_path, *command) for _ in range(20)]
    for run in runs:
        assert run.wait() == 0, run.err
    assert len(results_under(tmp_path)) == 20


@pytest.mark.slow
def test_of_two_runs_of_two_processes_one_trains(tmp_path):
    command = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "hydra.run.dir=../run", "resume=auto")
    command += ("trainer.max_steps=100000", "callbacks.recovery.every_n_steps=5")
    first = Started(tmp_path / "first", *command)
    try:
        first.wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
        second = Started(tmp_path / "second", *command)
        assert second.wait() == 2
    finally:
        os.kill(first.session, signal.SIGKILL)  # the launcher alone
        first.wait()
    assert second.err.count("\n") == 1, second.err
    assert "belongs to a run in progress" in second.err
    command += ("trainer.devices=1", "trainer=default", "trainer.max_steps=5", "callbacks.recovery.every_n_steps=100")
    deadline = time.monotonic() + PATIENCE
    while True:  # the ranks of the killed launcher save and end
        resumed = Started(tmp_path / f"resumed {time.monotonic()}", *command)
        resumed.wait()
        if "belongs to a run in progress" not in resumed.err or time.monotonic() > deadline:
            break
    assert "has done" in resumed.err, resumed.err


@pytest.mark.slow
def test_default_folders_differ(tmp_path):
    quick = ("trainer.max_steps=1", "self_check=false", "method=backprop")
    for _ in range(2):
        assert train(tmp_path, *quick)[0] == 0
    assert train(tmp_path, "-m", "seed=0,1", *quick)[0] == 0
    folders = [path.parent for path in tmp_path.rglob("results.json")]
    assert len(folders) == 4
    assert len({folder.parent for folder in folders if "multirun" in str(folder)}) == 1
    suffixes = {folder.name.rpartition("_")[2] for folder in folders if "multirun" not in str(folder)}
    assert all(len(suffix) == 6 and int(suffix, 16) >= 0 for suffix in suffixes)
    assert json.loads((folders[0] / "results.json").read_text())["steps"] == 1
