"""scripts/train.py as a user runs it."""

import os
import re
import subprocess
import sys
from itertools import zip_longest

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgtrain.runs.build import build
from tests.commands import CONF, ROOT, composed, options, results_under, train


@pytest.fixture(scope="module")
def digits_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    return folder, *train(folder, "method=fwdgrad", "trainer.max_steps=200", "trainer.val_check_interval=100")


def test_results(digits_run):
    folder, status, out, err = digits_run
    assert status == 0, err
    (results,) = results_under(folder)
    names = {"method": "fwdgrad", "task": "classification", "data": "digits", "model": "mlp", "seed": 42, "steps": 200}
    assert {name: results[name] for name in names} == names
    assert results["num_parameters"] == 64 * 64 + 64 + 64 * 10 + 10
    assert results["train_seconds"] > 0
    assert results["step_ms_median"] > 0
    assert results["peak_memory_mib"] > 100
    assert "peak_memory_mib (of the whole process, or of the GPU)" in out
    assert re.search(r"memory per step +[\d.]+ MiB for tensors at the peak, besides parameters and data", err)
    assert {"train/loss", "val/loss", "val/acc", "test/loss", "test/acc"} <= results["metrics"].keys()
    assert f"{results['metrics']['test/acc']:.6g}" in out
    assert out.rstrip().splitlines()[-1].startswith("look at it: tensorboard --host 127.0.0.1 --logdir runs")
    assert "Warning" not in err


def test_run_directory(digits_run):
    (run_dir,) = (path.parent for path in digits_run[0].rglob("results.json"))
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    events = EventAccumulator(str(run_dir)).Reload()
    scalars = {tag: [e.step for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
    expected = {"loss", "lr", "step_ms", "grad_norm"}
    expected |= {"directional_derivative" + suffix for suffix in ("", "_abs", "_max")}
    assert {f"train/{name}" for name in expected} | {"val/acc", "val/loss"} <= scalars.keys()
    assert scalars["train/loss"] == [50, 100, 150, 200]
    assert len(scalars["val/acc"]) == 2


@pytest.mark.slow
def test_equals_the_parts_put_together_by_hand(digits_run):
    (run_dir,) = (path.parent for path in digits_run[0].rglob("results.json"))
    same = ("trainer.max_steps=200", "callbacks=none", "trainer.limit_val_batches=0")
    run = build(composed(*same, f"run_dir={run_dir / 'again'}"))
    run.trainer.fit(run.module, run.data)
    saved = torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    for name, value in run.module.state_dict().items():
        assert torch.equal(value, saved[name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "steps", "loss"),
    [("beale", 1000, 5.2046e-05), ("rosenbrock", 1000, 2.3395e-03)],
    ids=["beale", "rosenbrock"],
)
def test_backprop_reproduces_the_notebook(task, steps, loss, tmp_path):
    status, _, err = train(tmp_path, f"task={task}", "method=backprop")
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["steps"] == steps
    assert results["metrics"]["loss"] == pytest.approx(loss, rel=1e-3)
    assert results["metrics"].keys() == {"loss", "distance_to_minimum"}
    assert len(results["solution"]) == 2
    (run_dir,) = (path.parent for path in tmp_path.rglob("results.json"))
    paths = np.load(run_dir / "trajectory.npz")
    assert paths["points"].shape == (1001, 1, 2)
    assert paths["values"][-1, 0] == pytest.approx(loss, rel=1e-3)
    assert (run_dir / "trajectory.png").stat().st_size > 10_000
    assert (run_dir / "trajectory.svg").exists()
    assert EventAccumulator(str(run_dir)).Reload().Tags()["images"] == ["trajectory"]


@pytest.mark.slow
def test_starts_that_diverge_do_not_end_the_run(tmp_path):
    arguments = ["task=beale", "method=backprop", "task.starts=20", "task.start=domain", "trainer.max_steps=30"]
    status, out, err = train(tmp_path, *arguments)
    assert status == 0, err
    (results,) = results_under(tmp_path)
    assert results["skipped_steps"] == 0
    assert 0 < results["metrics"]["diverged_starts"] < 1
    assert "diverged_starts" in out
    (path,) = tmp_path.rglob("trajectory.npz")
    points = np.load(path)["points"][-1]
    at_end = min(((points - [3, 0.5]) ** 2).sum(1) ** 0.5)
    assert results["metrics"]["distance_to_minimum"] == pytest.approx(at_end, rel=1e-4)
    assert any(np.allclose(point, results["solution"]) for point in points)


@pytest.mark.slow
def test_sweep_is_one_folder_of_runs(tmp_path):
    status, _, err = train(tmp_path, "-m", "method=backprop,fwdgrad", "seed=0,1,2", "trainer.max_steps=3")
    assert status == 0, err
    (sweep,) = {path.parents[1] for path in tmp_path.rglob("results.json")}
    found = {(r["method"], r["seed"]) for r in results_under(sweep)}
    assert found == {(method, seed) for method in ("backprop", "fwdgrad") for seed in (0, 1, 2)}


@pytest.mark.parametrize("method", options("method"))
def test_learning_rate_of_a_method(method):
    own = OmegaConf.select(OmegaConf.load(CONF / "method" / f"{method}.yaml"), "lr", default=0.5)
    assert composed(f"method={method}").optimizer.lr == own


@pytest.mark.parametrize("method", ["backprop", "fwdgrad_lowrank"])
def test_learning_rates_are_those_of_the_optimizer(method):
    """A method's rate is for SGD, and Adam has its own; a task's and the user's rate override both."""
    assert composed(f"method={method}", "optimizer=adam").optimizer.lr == 1e-3
    assert composed(f"method={method}", "optimizer=adam", "lr=0.01").optimizer.lr == 0.01
    assert composed(f"method={method}", "task=beale").optimizer.lr == 0.01
    decayed = composed(f"method={method}", "optimizer=adam", "optimizer.weight_decay=0.1")
    assert decayed.optimizer.weight_decay == 0.1


COMPANIONS = {
    "fsdp2": ["trainer.devices=2", "trainer.accelerator=cpu", "method=fwdgrad_lowrank"],
    "steps": ["task=sphere"],
    "points": ["task=sphere"],
    "cnn": ["data=cifar10"],
    "torchvision": ["data=cifar10"],
    "transformer": ["data=text", "task=language_modeling"],
    "lstm": ["task=language_modeling"],
    "text": ["task=language_modeling"],
    "text_stream": ["task=language_modeling", "model=diagonal_rnn"],
    "series_stream": ["task=language_modeling", "model=diagonal_rnn"],
    "diagonal_rnn": ["data=recall"],
    "recall": ["model=diagonal_rnn"],
    "guess": ["task=calibration"],
    "finetune_digits": ["model.weights=null"],
}
ELSEWHERE = {  # what needs a file, a package or a GPU; tests of their own try them
    ("data", "csv"),
    ("data", "image_folder"),
    ("experiment", "optuna"),
    ("logger", "mlflow"),
    ("logger", "wandb"),
    ("trainer", "gpu"),
}
CHOICES = [(group.name, choice) for group in sorted(CONF.iterdir()) if group.is_dir() for choice in options(group.name)]
CHOICES = [choice for choice in CHOICES if choice not in ELSEWHERE]
TOGETHER = ("callbacks", "logger", "method", "profiler", "scheduler", "tangents", "trainer")
"""Groups whose choices go with those of one another."""


def builds():
    """Overrides that together choose every file of conf/: of the groups that go together, one of each."""
    alone = [choice for choice in CHOICES if choice[0] not in TOGETHER or choice[1] in COMPANIONS]
    groups = ([choice for choice in CHOICES if choice[0] == group and choice not in alone] for group in TOGETHER)
    for choices in [*((choice,) for choice in alone), *zip_longest(*groups)]:
        yield [f"{group}={choice}" for group, choice in filter(None, choices)]


def test_every_choice_is_in_a_build():
    assert {override for overrides in builds() for override in overrides} == {"=".join(choice) for choice in CHOICES}


@pytest.mark.parametrize("overrides", list(builds()), ids=" ".join)
def test_every_config_builds(overrides, tmp_path):
    companions = [companion for override in overrides for companion in COMPANIONS.get(override.partition("=")[2], [])]
    build(composed(*overrides, *companions, f"run_dir={tmp_path}"))


BAD = [
    ("method=fwdgard", r"Could not find 'method/fwdgard' Available options in 'method': .*backprop"),
    ("task=nope", r"Could not find 'task/nope' Available options"),
    ("data=nope", r"Could not find 'data/nope' Available options"),
    ("model=nope", r"Could not find 'model/nope' Available options"),
    ("tangents=nope", r"Could not find 'tangents/nope' Available options in 'tangents': coordinate low_rank normal"),
    ("method.num_tangents=0", r"method: num_tangents must be an integer of at least 1, got 0"),
    ("method.num_tangents=-1", r"method: num_tangents must be an integer of at least 1, got -1"),
    ("method.num_tangents=1.5", r"method.num_tangents must be an integer, got 1.5"),
    ("method.num_tangents=abc", r"method.num_tangents must be an integer, got 'abc'"),
    ("method.tangents=normal", r"method.tangents must be a node with a _target_ \(Tangents\) or null, got 'normal'"),
    ("method.combine=sum", r"method.combine must be 'mean' or 'projection', got 'sum'"),
    ("method._target_=fgtrain.Nope", r"method: _target_ 'fgtrain.Nope' cannot be imported"),
    (
        "method._target_=fgtrain.Backprop",
        r"method._target_=fgtrain.Backprop needs a learning rate of its own, not that of .* \(lr=30.0\); give it with",
    ),
    (
        "method=backprop +method.num_tangents=3",
        r"method.num_tangents: fgtrain.Backprop takes no argument 'num_tangents'",
    ),
    ("lr=-1", r"lr must be positive, got -1.0"),
    ("lr=0", r"lr must be positive, got 0.0"),
    ("lr=abc", "lr must be a number, got 'abc'"),
    ("seed=-3", r"seed must be from 0 to 4294967295, got -3"),
    ("seed=4294967296", r"seed must be from 0 to 4294967295, got 4294967296"),
    ("seed=abc", "seed must be an integer, got 'abc'"),
    ("accumulate_grad_batches=0", r"accumulate_grad_batches must be at least 1, got 0"),
    ("clip_grad_norm=-1", r"clip_grad_norm must be positive, got -1.0"),
    ("nope=1", r"nope is not a key of the configuration; fgtrain train --info prints the keys"),
    (
        "run_dir=a=b",
        r"'run_dir=a=b' cannot be read \(mismatched .*\); put a value with = or , or letters like ü in quotes",
    ),
    ("+nope=1", r"nope: no such key; the top level has seed, lr"),
    ("trainer.max_epoch=3", r"trainer.max_epoch is not a key of the configuration"),
    (
        "+trainer.max_epoch=3",
        r"trainer.max_epoch: lightning.Trainer takes no argument 'max_epoch'; did you mean max_epochs",
    ),
    ("trainer.max_steps=abc", r"trainer.max_steps must be an integer, got 'abc'"),
    ("trainer.log_every_n_steps=0", r"trainer.log_every_n_steps must be above 0, got 0$"),
    (
        "trainer.val_check_interval=0",
        r"trainer.val_check_interval must be above 0, got 0; .*limit_val_batches=0 leaves",
    ),
    ("trainer.precision=12", r"trainer.precision must be .* got 12"),
    ("optimizer=adam optimizer.betas=[0.9]", r"optimizer: list index out of range"),
    ("scheduler.warmup_steps=-1", r"scheduler: warmup_steps must be at least 0, got -1"),
    ("optimizer.momentum=-1", r"optimizer: Invalid momentum value: -1"),
    ("optimizer.momentum=abc", r"optimizer.momentum must be a number, got 'abc'"),
    ("model.hidden=[0]", r"model: hidden must hold positive widths, got \[0\]"),
    ("model.hidden=64", r"model.hidden must be a list, each an integer, got 64"),
    ("data.batch_size=0", r"data: batch_size must be at least 1, got 0"),
    (
        "resume=nope.ckpt",
        r"resume=nope.ckpt is not a file; give the path of a checkpoint \(.ckpt\), a run's folder, or auto",
    ),
    (
        "task=beale trainer.max_steps=-1",
        r"data: a task without data counts steps: trainer.max_steps must be at least 1",
    ),
    ("data=mnist data.root=/dev/null/x", r"MNIST is not in data.root=/dev/null/x and cannot be downloaded"),
    (
        "model=torchvision model.name=resnet19",
        r"torchvision has no classification model 'resnet19'; did you mean resnet\d+\?",
    ),
    ("--nope", r"unrecognized arguments: --nope"),
    ("lr=0.1 -m lr=0.2", r"unrecognized arguments: lr=0.2; put options such as -m .* before or after all key=value"),
    ("lr=${nope}", r"Interpolation key 'nope' not found"),
    ("model._target_=builtins.int", r"model: _target_ 'builtins.int' is built in and has no signature"),
    ("lr", r"missing EQUAL"),
    ("hydra=null", r"hydra is not one value: set its keys, such as hydra.run.dir=..."),
    ("data=7", r"data takes the name of a file: cifar10, .*; ~data leaves the group out"),
    ("logger=null", r"logger takes the name of a file: csv, .*; logger=none leaves the group out"),
    ("scheduler=null", r"scheduler takes the name of a file: constant, cosine, exponential; ~scheduler leaves"),
    ("trainer.check_val_every_n_epoch=0", r"trainer.check_val_every_n_epoch must be above 0, got 0; null counts the"),
    ("+trainer.logger=false", r"trainer.logger: the run sets this argument; use logger=..."),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_bad_input_is_one_line(arguments, message, tmp_path):
    status, out, err = train(tmp_path, *arguments.split())
    assert status == 2
    assert len(err.splitlines()) == 1, err
    assert re.match(rf"fgtrain: .*{message}", err)
    assert out == ""
    assert not list(tmp_path.rglob("events*"))


ACCUMULATE = "+callbacks.x={_target_: lightning.pytorch.callbacks.GradientAccumulationScheduler, scheduling: {0: 2}}"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (
            "trainer.check_val_every_n_epoch=1",
            r"`val_check_interval` \(500\) must be less than .*; trainer.val_check_interval=1.0 validates after",
        ),
        ("trainer.overfit_batches=0.01", r"You requested to check .*; trainer.overfit_batches and limit_.* also take"),
        (ACCUMULATE, "Automatic gradient accumulation .* is not supported for manual optimization"),
    ],
    ids=["loop", "share", "callback"],
)
def test_what_lightning_refuses_is_one_line(argument, message, tmp_path):
    status, _, err = train(tmp_path, argument, "quiet=true")
    assert (status, err.count("\n")) == (2, 1)
    assert re.match(rf"fgtrain: {message}", err)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts what /proc/self shows")
def test_runs_of_one_process_leave_nothing_open(tmp_path):
    counts = []
    for i in range(5):
        status, _, err = train(tmp_path, f"hydra.run.dir={i}", "trainer.max_steps=3", "method=backprop")
        assert status == 0, err
        counts.append([len(os.listdir(f"/proc/self/{what}")) for what in ("fd", "task")])
    assert counts[-1] == counts[1]


def test_warnings_are_shown_once_on_stderr(tmp_path, monkeypatch):
    source = """
from torch import nn


class PlainNet(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.out = nn.Linear(64, num_classes)

    def forward(self, x):
        return self.out(x.flatten(1))
"""
    (tmp_path / "plain_net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    fast = ["trainer.max_steps=3", "self_check=false"]
    status, out, err = train(tmp_path, "method=backprop_checkpoint", "model._target_=plain_net.PlainNet", *fast)
    warning = "PlainNet has no nn.Sequential or nn.ModuleList to checkpoint: memory is that of Backprop\n"
    assert (status, err.count(warning)) == (0, 1), err
    assert warning not in out


@pytest.mark.slow
def test_a_reader_that_has_seen_enough(tmp_path):
    command = f"{sys.executable} {ROOT / 'scripts' / 'train.py'} --cfg job | true"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.slow  # as the README's commands are
def test_from_the_shell(tmp_path):
    command = [sys.executable, ROOT / "scripts" / "train.py", "method.num_tangents=0"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    expected = (2, "", "fgtrain: method: num_tangents must be an integer of at least 1, got 0\n")
    assert (done.returncode, done.stdout, done.stderr) == expected
