"""A sweep ends with its runs in a table, best first."""

import csv
import importlib.util
import json
import math
import re
import shlex

import pytest
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fgtrain.runs.cli import CONF
from fgtrain.runs.messages import one_line
from fgtrain.runs.sweeps import SweepTable, objective
from tests.commands import options, results_under, train

pytestmark = pytest.mark.slow


def events_of(folder):
    return EventAccumulator(str(folder)).Reload()


OPTUNA = importlib.util.find_spec("optuna") is not None


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    command = ["experiment=lr_sweep", "method=backprop", "lr=0.001,1.0,-1,0.1", "trainer.max_steps=30"]
    return folder, *train(folder, *command, "trainer.val_check_interval=15")


def test_best_first_and_failed_last(sweep):
    folder, status, out, err = sweep
    assert status == 2
    lines = err.splitlines()
    assert lines[0] == "fgtrain: job 2_lr=-1,method=backprop failed: lr must be positive, got -1.0"
    assert re.match(r"fgtrain: some jobs of multirun/.* failed; the others are complete", lines[1])
    (path,) = folder.rglob("sweep.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["done", "done", "done", "failed"]
    losses = [float(row["val/loss"]) for row in rows[:3]]
    assert losses == sorted(losses)
    assert losses == sorted(r["metrics"]["val/loss"] for r in results_under(folder))
    assert rows[-1]["run"] == "lr=-1"
    shown = [re.search(r"lr=[\d.-]+", line) for line in out.splitlines()]
    assert [found.group() for found in shown if found][-4:] == [row["run"] for row in rows]
    assert "--logdir multirun" in out.splitlines()[-1]
    assert "best first by final val/loss" in out


@pytest.mark.parametrize("name", ["train/loss", "loss"])
def test_the_title_names_the_value_that_orders_the_runs(name, tmp_path, capsys, monkeypatch):
    for job, value in enumerate((3.0, 1.0, 2.0)):
        (tmp_path / str(job)).mkdir()
        (tmp_path / str(job) / "overrides.yaml").write_text(f"[lr={value}]")
        results = {"metrics": {name: value, "val/acc": 0.5}, "steps": 4, "train_seconds": 1.0}
        (tmp_path / str(job) / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr(SweepTable, "_folder", tmp_path)
    SweepTable.close()
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.rstrip() == f"runs of the sweep, best first by final {name}"
    assert [float(found[1]) for line in lines if (found := re.search(r"lr=([\d.]+)", line))] == [1, 2, 3]
    with (tmp_path / "sweep.csv").open() as file:
        assert [float(row[name]) for row in csv.DictReader(file)] == [1, 2, 3]


def test_names_with_brackets_and_colons_are_shown_as_they_are(tmp_path, capsys, monkeypatch):
    """Rich would take them for markup and emoji."""
    folder = tmp_path / "a [b] :smile:"
    (folder / "0").mkdir(parents=True)
    (folder / "0" / "overrides.yaml").write_text(json.dumps(["data.paths=[/x/y]", "logger=[csv]"]))
    (folder / "0" / "results.json").write_text(json.dumps({"metrics": {"loss": 1.0}, "steps": 4, "train_seconds": 1.0}))
    monkeypatch.setattr(SweepTable, "_folder", folder)
    SweepTable.close()
    out = capsys.readouterr().out
    assert "data.paths=[/x/y] logger=[csv]" in out
    assert f"sweep.csv in {folder}\n" in out
    assert shlex.split(out.splitlines()[-1])[-1] == str(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"metrics": 3}'])
def test_damaged_results_are_a_failed_row(text, tmp_path, capsys, monkeypatch):
    for job, content in enumerate(('{"metrics": {"loss": 1.0}}', text)):
        (tmp_path / str(job)).mkdir()
        (tmp_path / str(job) / "overrides.yaml").write_text(f"[seed={job}]")
        (tmp_path / str(job) / "results.json").write_text(content)
    monkeypatch.setattr(SweepTable, "_folder", tmp_path)
    SweepTable.close()
    capsys.readouterr()
    with (tmp_path / "sweep.csv").open() as file:
        assert [(row["run"], row["status"]) for row in csv.DictReader(file)] == [
            ("seed=0", "done"),
            ("seed=1", "failed"),
        ]


def test_a_sweep_started_again_continues_in_its_folders(tmp_path):
    command = ["-m", "lr=0.1,-1", "method=backprop", "trainer.max_steps=2", "quiet=true", "hydra.sweep.dir=sweep"]
    assert train(tmp_path, *command)[0] == 2
    before = sorted(tmp_path.glob("sweep/*_*"))
    assert "job 0_lr=0.1,method=backprop failed: run_dir=" in train(tmp_path, *command)[2]
    failed, *_ = train(tmp_path, *command, "resume=auto")[2].splitlines()
    assert failed == "fgtrain: job 1_lr=-1,method=backprop failed: lr must be positive, got -1.0"
    assert sorted(tmp_path.glob("sweep/*_*")) == before


def test_names_of_runs_are_short(sweep):
    names = sorted(path.parent.name for path in sweep[0].rglob("results.json"))
    assert names == [f"{i}_lr={lr},method=backprop" for i, lr in ((0, "0.001"), (1, "1.0"), (3, "0.1"))]


def test_a_path_among_the_arguments_is_no_path_of_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "text.txt").write_text("all that is gold does not glitter " * 50)
    command = [
        "task=language_modeling",
        "method=backprop",
        "data.path=deep/text.txt",
        "seed=0,1",
        "trainer.max_steps=2",
    ]
    status, out, err = train(tmp_path, "-m", *command)
    assert status == 0, err
    (sweep,) = {path.parents[1] for path in tmp_path.rglob("results.json")}
    assert sorted(path.name.split(",")[0] for path in sweep.glob("*_*")) == [
        f"{i}_data.path=deep-text.txt" for i in (0, 1)
    ]
    assert (sweep / "sweep.csv").exists()
    assert "sweep.csv in multirun" in out


def test_objective():
    assert objective({"metrics": {"val/loss": 0.5, "test/loss": 0.1}}) == 0.5
    assert objective({"metrics": {"loss": 2.0}}) == 2.0
    assert objective({"metrics": {"val/loss": math.nan}}) == math.inf


@pytest.mark.parametrize("name", options("experiment"))
def test_recipes_begin_with_their_command(name):
    lines = (CONF / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"  # Hydra wants it first
    assert lines[1].startswith(f"# python scripts/train.py experiment={name}")


@pytest.mark.skipif(OPTUNA, reason="optuna is installed")
def test_optuna_is_optional():
    with (
        pytest.raises(Exception, match="hydra/sweeper/optuna") as caught,
        initialize_config_dir(str(CONF), version_base="1.3"),
    ):
        compose("train", ["experiment=optuna"])
    assert one_line(caught.value) == (
        'hydra/sweeper=optuna is not installed; pip install -e ".[sweeps]" installs optuna and joblib'
    )


@pytest.mark.skipif(not OPTUNA, reason="the extra sweeps is not installed")
@pytest.mark.filterwarnings("ignore")
def test_optuna(tmp_path):
    command = ["experiment=optuna", "method=backprop", "trainer.max_steps=10", "trainer.val_check_interval=5"]
    status, out, err = train(tmp_path, *command, "hydra.sweeper.n_trials=3")
    assert status == 0, err
    assert len(results_under(tmp_path)) == 3
    assert "best first by final val/loss" in out


def test_mean_and_spread_over_seeds_are_curves(tmp_path):
    command = ["-m", "method=backprop", "data.batch_size=64,128", "seed=0,1,2", "quiet=true", "self_check=false"]
    status, out, err = train(tmp_path, *command, "trainer.max_steps=6", "trainer.val_check_interval=3")
    assert status == 0, err
    assert "Directory watcher" not in out + err  # TensorBoard's reader of events reports its progress
    (folder,) = (path.parent for path in tmp_path.rglob("sweep.csv"))
    runs = {path.parent for path in folder.rglob("seeds/*/*/events*")}
    assert len(runs) == 2 * 3
    ends = [
        events_of(path.parent).Scalars("val/loss")[-1]
        for path in folder.glob("*/results.json")
        if "data.batch_size=64" in path.parent.name
    ]
    losses = [end.value for end in ends]
    for name, expected in (("mean", sum(losses) / 3), ("lowest", min(losses)), ("highest", max(losses))):
        (run,) = (run for run in runs if run.name == name and "data.batch_size=64" in run.parent.name)
        point = events_of(run).Scalars("val/loss")[-1]
        assert (point.step, point.value) == (ends[0].step, pytest.approx(expected))
