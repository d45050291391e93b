"""A folder belongs to one run at a time."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fgtrain.errors import ConfigError
from fgtrain.runs.owner import owned
from tests.commands import ROOT, results_under, train
from tests.interrupted import wait_for

HOLD = """
import sys, time, pathlib
from fgtrain.runs.owner import owned
with owned(pathlib.Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds tmp_path/run."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mine\n"
        yield process
        process.kill()


def test_second_comer_is_told_in_one_line(holder, tmp_path):
    for options in ((), ("resume=auto",)):
        status, out, err = train(tmp_path, "hydra.run.dir=run", "trainer.max_steps=3", *options)
        assert (status, out, err.count("\n")) == (2, "", 1)
        assert f"run_dir=run belongs to a run in progress (process {holder.pid} on " in err.replace(f"{tmp_path}/", "")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}


def test_a_killed_owner_holds_nothing(holder, tmp_path):
    (tmp_path / "run" / "results.json.123.tmp").touch()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
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
            time.sleep(60)
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
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "trainer.max_steps=3", "quiet=true"]
    command += ["self_check=false", "method=backprop"]
    runs = [subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) for _ in range(20)]
    for run in runs:
        _, err = run.communicate()
        assert run.returncode == 0, err
    assert len(results_under(tmp_path)) == 20


@pytest.mark.slow
def test_of_two_runs_of_two_processes_one_trains(tmp_path):
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), "trainer=ddp", "trainer.devices=2"]
    command += ["trainer.accelerator=cpu", "hydra.run.dir=run", "resume=auto", "trainer.max_steps=100000"]
    command += ["callbacks.recovery.every_n_steps=5"]
    first = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    try:
        wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt", first)
        second = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    finally:
        first.kill()
        first.wait()
    assert second.returncode == 2
    assert second.stderr.count("\n") == 1, second.stderr
    assert "belongs to a run in progress" in second.stderr
    command += ["trainer.devices=1", "trainer=default", "trainer.max_steps=20", "callbacks.recovery.every_n_steps=100"]
    deadline = time.monotonic() + 60
    while True:  # the ranks of the killed launcher save and end
        resumed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        if "belongs to a run in progress" not in resumed.stderr or time.monotonic() > deadline:
            break
    assert "has done" in resumed.stderr, resumed.stderr


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
