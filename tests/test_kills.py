"""A run killed at any moment, wholly or in part, leaves nothing behind and can continue to the undisturbed result."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest

from fgtrain.lightning.checkpoints import read_checked
from tests.interrupted import assert_same
from tests.kills import PATIENCE, Started, close_reader, kill_at_change, read_only_once_saved, wait_for_ranks

pytestmark = pytest.mark.slow

RUN = ("hydra.run.dir=run", "resume=auto", "method=fwdgrad", "model.hidden=[8]", "quiet=true", "self_check=false")
RUN += ("trainer.val_check_interval=20", "callbacks.recovery.every_n_steps=5")
EPOCHS = (*RUN, "trainer.max_steps=-1", "trainer.max_epochs=10")  # of six batches
STEPS = (*RUN, "trainer.max_steps=60")
RANKS = ("trainer.accelerator=cpu", "trainer.devices=2")
FIRST_START = [(".lock", 1), ("config.yaml", 1), ("provenance.json", 1), ("hparams.yaml", 1)]
"""(what is changed, n-th time)."""
CHECKPOINTS = [("next", 1), ("next", 2), ("next", 3), ("next", 6), ("last", 1), ("previous", 1), ("previous", 2)]
LATER_START = [("config.yaml", 1), ("config.yaml", 2), ("provenance.json", 1)]
END = [("best", 1), ("best", 2), ("next", 2), ("results.json", 2), ("results.json", 3)]


def outcome(folder):
    """What a run leaves: its results, but for times and memory, and the bits of its last and best checkpoints."""
    results = json.loads((folder / "results.json").read_text())
    for name in ("train_seconds", "step_ms_median", "peak_memory_mib"):
        del results[name]
    del results["metrics"]["train/step_ms"]
    kept = (read_checked(folder / "checkpoints" / f"{name}.ckpt") for name in ("last", "best"))
    return results, [(content["global_step"], content["state_dict"]) for content in kept]


def undisturbed(folder, *command):
    """(what it ends with, how long it takes)."""
    started = time.monotonic()
    run = Started(folder, *command)
    assert run.wait() == 0, run.err
    return outcome(folder / "run"), time.monotonic() - started


def assert_goes_on(folder, command, expected):
    """The same command ends with the undisturbed results and weights, and nothing half written is left."""
    run = Started(folder, *command)
    assert run.wait() == 0, run.err
    assert_same_outcome(outcome(folder / "run"), expected)
    assert not list((folder / "run").rglob("*.tmp*"))


def assert_same_outcome(found, expected):
    assert found[0] == expected[0]
    assert_same(found[1], expected[1])


@pytest.mark.parametrize(
    ("command", "changes"),
    [(EPOCHS, [*FIRST_START, *CHECKPOINTS, *LATER_START, *END]), (STEPS, [*CHECKPOINTS, *END])],
    ids=["epochs", "steps"],
)
def test_killed_at_changes_of_files(command, changes, tmp_path):
    expected, _ = undisturbed(tmp_path / "straight", *command)
    for name, count in changes:
        run = Started(tmp_path / "killed", *command, disturb=partial(kill_at_change, name=name, count=count))
        assert run.wait() == -signal.SIGKILL, (name, count, run.err)
    assert_goes_on(tmp_path / "killed", command, expected)


def test_a_script_has_the_environment_of_its_start(tmp_path, monkeypatch):
    """Not that of the fork server, which another test may have started."""
    for value, has_traceback in (("1", True), ("0", False)):
        monkeypatch.setenv("HYDRA_FULL_ERROR", value)
        run = Started(tmp_path / value, "trainer.max_steps=none")
        run.wait()
        assert ("Traceback" in run.err) == has_traceback, run.err


@pytest.mark.parametrize("command", [EPOCHS, STEPS], ids=["epochs", "steps"])
def test_killed_at_random_moments(command, tmp_path):
    expected, seconds = undisturbed(tmp_path / "straight", *command)
    moments, kills, folder = random.Random(0), 0, tmp_path / "0"
    while kills < 10:
        run = Started(folder, *command)
        status = run.wait(moments.random() * seconds)
        if status is None:
            run.kill()
            kills += 1
        else:
            assert status == 0, run.err
            assert_same_outcome(outcome(folder / "run"), expected)
            folder = folder.with_name(str(kills))
    assert_goes_on(folder, command, expected)


def assert_all_end(run, ended_by=(2, 143)):
    """With a status of its own, and without processes or files that are left."""
    assert run.wait() in ended_by, run.err
    assert "Traceback" not in run.err, run.err
    began = time.monotonic()
    while run.processes():  # the helpers of multiprocessing end after it
        assert time.monotonic() < began + PATIENCE, "orphans"
        time.sleep(0.01)
    assert not list(run.temporary.iterdir())
    assert not [path for path in Path("/dev/shm").iterdir() if str(run.session) in path.name]


ENDLESS = (*STEPS, *RANKS, "trainer=ddp_fork", "scheduler=constant", "trainer.max_steps=1000000")


def ended_soon(folder):
    """The command that ends what an endless one has begun, some steps later."""
    last = folder / "run" / "checkpoints" / "last.ckpt"
    done = read_checked(last)["global_step"] if last.exists() else 0
    return *ENDLESS, f"trainer.max_steps={done + 40}"


def test_killed_ranks(tmp_path):
    moments, folder = random.Random(0), tmp_path / "killed"
    for k in range(8):
        forked = k < 6
        run = Started(folder, *ENDLESS, *() if forked else ("trainer=ddp",))
        rank = run.ranks(depth=1 if forked else 2)[k % 2]
        time.sleep((k > 1) * moments.random() * 1.5)  # the first before they have met
        os.kill(rank, signal.SIGKILL)
        assert_all_end(run)
        assert f"fgtrain: rank {k % 2} was ended by SIGKILL" in run.err.splitlines()[-1]
    command = ended_soon(folder)
    expected, _ = undisturbed(tmp_path / "straight", *command)
    for change in [("next", 2), ("last", 1), ("previous", 2), ("results.json", 3)]:
        run = Started(folder, *command, disturb=partial(kill_at_change, name=change[0], count=change[1], alone=True))
        assert_all_end(run)
        assert "fgtrain: rank 0 was ended by SIGKILL" in run.err.splitlines()[-1]
    assert_goes_on(folder, command, expected)


def test_rank_that_is_stopped_for_a_while_is_waited_for(tmp_path):
    run = Started(tmp_path / "stopped", *ENDLESS)
    for rank in run.ranks():
        time.sleep(0.5)
        os.kill(rank, signal.SIGSTOP)
        time.sleep(1)
        os.kill(rank, signal.SIGCONT)
    run.wait_for(tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt")
    os.kill(run.session, signal.SIGTERM)
    assert_all_end(run, ended_by=(143,))
    assert "fgtrain: stopped by SIGTERM after step" in run.err.splitlines()[-1]
    command = ended_soon(tmp_path / "stopped")
    expected, _ = undisturbed(tmp_path / "straight", *command)
    assert_goes_on(tmp_path / "stopped", command, expected)


def test_rank_that_stays_stopped_is_ended_by_a_sigterm_to_the_run(tmp_path):
    run = Started(tmp_path, *ENDLESS, disturb=partial(wait_for_ranks, seconds=1))
    run.wait_for(tmp_path / "run" / "checkpoints" / "last.ckpt")
    os.kill(run.ranks()[1], signal.SIGSTOP)
    os.kill(run.session, signal.SIGTERM)
    assert_all_end(run)
    assert "fgtrain: stopped by SIGTERM, to which ranks" in run.err.splitlines()[-1]


@pytest.mark.parametrize("ranks", [(), (*RANKS, "trainer=ddp_fork")], ids=["one process", "two processes"])
def test_sigterm_at_any_time(ranks, tmp_path):
    """Also in the start-up of ranks, where Lightning's handler waits for the others."""
    moments = random.Random(0)
    for k in range(6):
        run = Started(tmp_path / str(k % 2), *RUN, *ranks, "trainer.max_steps=20000")
        if ranks:
            run.ranks()
        while k > 3 and not (tmp_path / str(k % 2) / "run" / "checkpoints" / "last.ckpt").exists():
            time.sleep(0.01)
        time.sleep(moments.random() * 2)
        os.kill(run.session, signal.SIGTERM)
        assert_all_end(run, ended_by=(-signal.SIGTERM, 143))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_sweep_that_is_cut_goes_on_by_the_same_command(end, tmp_path):
    command = ("-m", *STEPS, "seed=0,1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${seed}")
    straight = Started(tmp_path / "straight", *command)
    for seed in (0, 1):  # cut in the first and in the second run
        run = Started(tmp_path / "cut", *command)
        run.wait_for(tmp_path / "cut" / "sweep" / str(seed) / "checkpoints" / "last.ckpt")
        run.kill(end)
        assert run.wait() in (-end, 143)  # between two runs there is nothing to save
    done = tmp_path / "cut" / "sweep" / "0" / "results.json"
    written = done.stat().st_mtime_ns
    run = Started(tmp_path / "cut", *command)
    assert (run.wait(), straight.wait()) == (0, 0), run.err
    assert done.stat().st_mtime_ns == written
    for seed in range(3):
        assert_same_outcome(*(outcome(tmp_path / how / "sweep" / str(seed)) for how in ("cut", "straight")))
    assert len((tmp_path / "cut" / "sweep" / "sweep.csv").read_text().splitlines()) == 4


def test_comparison_that_is_killed_goes_on_by_the_same_command(tmp_path):
    command = ("methods=[backprop,fwdgrad]", "seeds=1", "budget=30steps", f"out={tmp_path}/out", "model.hidden=[8]")
    for name, count in [("plan.json", 1), ("plan.json", 2), ("config.yaml", 1), ("results.json", 4)]:
        run = Started(tmp_path, *command, script="compare", disturb=partial(kill_at_change, name=name, count=count))
        assert run.wait() == -signal.SIGKILL, (name, count, run.err)
    first = tmp_path / "out" / "backprop" / "seed=0" / "results.json"
    written = first.stat().st_mtime_ns
    run = Started(tmp_path, *command, script="compare")
    assert run.wait() == 0, run.err
    assert first.stat().st_mtime_ns == written
    assert [row["runs"] for row in json.loads((tmp_path / "out" / "table.json").read_text())["rows"]] == [1, 1]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("ranks", [(), (*RANKS, "trainer=ddp_fork")], ids=["one process", "two processes"])
def test_nobody_reads(number, ranks, tmp_path):
    run = Started(tmp_path, *STEPS, *ranks, "quiet=false", disturb=partial(close_reader, number=number))
    assert run.wait() in (0, 1, 2, 128 + signal.SIGPIPE), run.err
    assert not run.processes()


@pytest.fixture
def disk(tmp_path):
    """A file system of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], check=False).returncode:
        pytest.skip("no file system may be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


@pytest.mark.parametrize("ranks", [(), (*RANKS, "trainer=ddp_fork")], ids=["one process", "two processes"])
def test_disk_that_fills_up(ranks, disk, tmp_path):
    run = Started(tmp_path, *RUN, *ranks, f"hydra.run.dir={disk}/run", "trainer.max_steps=20000")
    run.wait_for(disk / "run" / "checkpoints" / "previous.ckpt")
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    assert_all_end(run)
    assert re.match("fgtrain: cannot write .*: No space left on device", run.err.splitlines()[-1]), run.err


@pytest.mark.parametrize("ranks", [(), (*RANKS, "trainer=ddp_fork")], ids=["one process", "two processes"])
def test_disk_that_becomes_read_only(ranks, tmp_path):
    run = Started(tmp_path, *RUN, *ranks, "trainer.max_steps=20000", disturb=read_only_once_saved)
    assert_all_end(run)
    assert re.match("fgtrain: cannot write .*: Read-only file system", run.err.splitlines()[-1]), run.err
