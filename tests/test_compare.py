"""scripts/compare.py: fair, resumable, and the same numbers in every format."""

import csv
import io
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from fgtrain.commands.compare import main
from fgtrain.commands.compare import run as run_command
from fgtrain.data import Digits
from fgtrain.errors import ConfigError, Interrupted
from fgtrain.runs.build import build
from fgtrain.runs.messages import USER_ERRORS
from fgtrain.studies.compare import compare, parse, write_report
from fgtrain.studies.compare.finished import read
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.compare.search import is_at_edge
from fgtrain.studies.compare.table import table_of
from fgtrain.studies.compare.trajectories import trajectories
from tests.commands import PACKAGE, composed, options, results_under, run_compare

pytestmark = pytest.mark.slow

COMMAND = ["methods=[backprop,fwdgrad]", "seeds=2", "budget=40steps", "data.batch_size=64"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, *run_compare(folder, *COMMAND, "out=here")


def test_all_methods_start_and_see_the_same():
    seen = []
    for method in options("method"):
        cfg, _ = compose_run(["data.batch_size=16"], f"method={method}", "seed=3", "run_dir=.")
        module, data, *_ = build(cfg)
        data.setup("fit")
        batches = [inputs for inputs, _ in data.train_dataloader()][:3]
        seen.append([*module.model.state_dict().values(), *batches])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_formats_agree(compared):
    folder, out, err = compared
    report = json.loads((folder / "here" / "table.json").read_text())
    rows = report["rows"]
    with (folder / "here" / "table.csv").open() as file:
        written = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == [row["method"] for row in written] == ["backprop", "fwdgrad"]
    assert [float(row["accuracy_mean"]) for row in written] == [row["accuracy_mean"] for row in rows]
    markdown = (folder / "here" / "table.md").read_text()
    for row in rows:
        accuracy = f"{100 * row['accuracy_mean']:.1f} ± {100 * row['accuracy_std']:.1f}"
        assert accuracy in markdown
        assert accuracy in out
        runs = results_under(folder / "here" / row["method"])
        assert row["accuracy_mean"] == pytest.approx(sum(r["metrics"]["test/acc"] for r in runs) / 2)
        assert {r["steps"] for r in runs} == {40}
        assert 0 < row["seconds"] < max(r["train_seconds"] for r in runs)
    assert rows[0]["step_time_to_backprop"] == rows[0]["peak_memory_to_backprop"] == 1
    assert [row["bytes_per_step"] for row in rows] == [4 * 4810, 4]
    assert [row["floats_per_step"] for row in rows] == [4810, 1]
    assert [row["backward_pass"] for row in rows] == ["whole", "none"]
    for row in rows:
        cfg = composed(f"method={row['method']}")
        assert (row["clip_grad_norm"], row["weight_decay"]) == (cfg.clip_grad_norm, cfg.optimizer.weight_decay)
    curve = read(folder / "here" / "backprop" / "seed=0", "backprop", 0).curves["val/acc"]
    assert [step for step, _ in curve] == list(range(1, 41))
    assert report["cosine_by_layer"]["backprop"] == {"1": "exact", "3": "exact"}
    assert "| 1 | exact | " + f"{report['cosine_by_layer']['fwdgrad']['1']:.3f} |" in markdown
    assert "for each seed all methods start from the same parameters" in markdown
    assert "Learning rates: those of conf/method" in markdown
    assert (folder / "here" / "curves.png").stat().st_size > 20_000
    assert (folder / "here" / "cosine.png").stat().st_size > 10_000
    assert re.search(r"\[3/4\] fwdgrad seed 1", err)
    long = {"method": "fwdgrad_lowrank:num_tangents=16", "lr_at_edge": True, "backward_pass": "within a block"}
    printed = io.StringIO()
    Console(file=printed, width=140).print(table_of([*rows, rows[0] | long | {"floats_per_step": 11_227_812}]))
    assert all(line[-1] in "┓┃┩│┘" for line in printed.getvalue().splitlines())


def test_goes_on_where_it_was_stopped(compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = parse([*COMMAND, "seeds=1", "out=again"])

    def stop(text, done, total):
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(plan, stop)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("results.json")}
    assert len(kept) == 1
    outcome = compare(plan, lambda *_: None)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    straight = {(r["method"], r["seed"]): r["metrics"]["test/loss"] for r in results_under(compared[0])}
    found = {(r.method, r.seed): r.results["metrics"]["test/loss"] for r in outcome.runs}
    assert found == {run: straight[run] for run in (("backprop", 0), ("fwdgrad", 0))}


def test_search_treats_methods_equally_and_keeps_off_the_compared_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["methods=[backprop,fwdgrad]", "seeds=1", "budget=20steps", "lr=search", "lr_points=3", "out=here"]
    plan = parse(command)
    told = []
    outcome = compare(plan, lambda *call: told.append(call))
    assert told[-1] == ("cost of a step", len(told) - 1, len(told) - 1)
    for method, losses in outcome.tried.items():
        assert composed(f"method={method}").lr in losses
        assert losses[outcome.lrs[method]] == min(losses.values())
        for lr, loss in losses.items():
            runs = results_under(tmp_path / "here" / "search" / method / f"lr={lr:g}")
            assert [run["seed"] for run in runs] == [10_000, 10_001]
            assert loss == pytest.approx(sum(run["metrics"]["val/loss"] for run in runs) / 2)
    assert all(run.seed == 0 for run in outcome.runs)
    rows = write_report(plan, outcome, "command")
    edges = [is_at_edge(outcome.lrs[m], losses) for m, losses in outcome.tried.items()]
    assert [row["lr_at_edge"] for row in rows] == edges
    text = (tmp_path / "here" / "table.md").read_text()
    assert text.count("(edge)") == sum(edges)
    assert ("Still at the edge" in text) == any(edges)


def test_seconds_become_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = compare(parse(["methods=[backprop]", "seeds=1", "budget=0.1s", "task=sphere"]), lambda *_: None)
    (trial,) = results_under(next(tmp_path.glob("comparisons/*/trial")))
    assert outcome.runs[0].results["steps"] == max(1, int(100 / trial["step_ms_median"]))
    assert outcome.runs[0].results["metrics"].keys() == {"loss", "distance_to_minimum"}


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["methods=[backprop]", "seeds=1", "budget=40steps", "optimizer.lr=1e9", "out=here"]
    plan = parse(command)
    (row,) = write_report(plan, compare(plan, lambda *_: None), "command")
    assert (row["runs"], row["diverged"], row["accuracy_mean"]) == (1, 1, None)
    assert "backprop: 1 of 1 runs diverged" in (tmp_path / "here" / "table.md").read_text()


def test_paths_on_a_function_are_on_one_contour(tmp_path):
    command = ["methods=[backprop,fwdgrad]", "seeds=1", "budget=4steps", "task=beale", "out=here"]
    out, _ = run_compare(tmp_path, *command)
    assert "curves.png, trajectories.png in here" in out
    assert (tmp_path / "here" / "trajectories.svg").exists()
    figure = trajectories(parse([*command[:-1], f"out={tmp_path / 'here'}"]), {"backprop": 0.01, "fwdgrad": 0.01})
    assert figure is not None
    assert figure.axes[0].get_title() == "Beale, lr 0.01, seed 0"
    paths = [np.array(line.get_data()) for line in figure.axes[0].get_lines() if line.get_marker() == "None"]
    assert [path.shape for path in paths] == [(2, 5), (2, 5)]
    assert (paths[0][:, 0] == paths[1][:, 0]).all()
    assert (paths[0][:, 1] != paths[1][:, 1]).all()
    assert trajectories(parse(["methods=[backprop]", f"out={tmp_path}"]), {}) is None


OWN = """
# @package _global_
method:
  _target_: my_method_of_comparisons.Doubled
lr: 0.05
"""


def test_a_diverged_trial_run_is_a_refusal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plan = parse(["methods=[backprop]", "seeds=1", "budget=1s", "optimizer.lr=1e9", "out=here"])
    with pytest.raises(USER_ERRORS, match="backprop: its trial run of 200 steps diverged"):
        compare(plan, lambda *_: None)


def test_variants_and_own_methods(tmp_path):
    (tmp_path / "my_method_of_comparisons.py").write_text(PACKAGE)
    (tmp_path / "my_conf" / "method").mkdir(parents=True)
    (tmp_path / "my_conf" / "method" / "mine.yaml").write_text(OWN)
    methods = ["mine", "fwdgrad_lowrank:num_tangents=1", "fwdgrad_lowrank:num_tangents=8+combine=mean"]
    command = [f"methods=[{','.join(methods)}]", "seeds=1", "budget=2steps", "target=mine-0.5", "out=here"]
    run_compare(tmp_path, "--config-dir", "my_conf", *command)
    rows = json.loads((tmp_path / "here" / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    assert [row["floats_per_step"] for row in rows] == [1, 1, 8]
    assert rows[0]["lr"] == 0.05
    folders = ["mine", "fwdgrad_lowrank-num_tangents=1", "fwdgrad_lowrank-num_tangents=8+combine=mean"]
    assert all((tmp_path / "here" / folder / "seed=0" / "results.json").exists() for folder in folders)


def test_help_lists_every_argument_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        run_command(["--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert "Compare methods under equal conditions" in said
    for key, default in {"seeds": 3, "budget": "2000steps", "lr": "yaml", "search_seeds": 2, "target": "null"}.items():
        assert f"    {key}={default}\n" in said
    assert "--config-dir" in said


BAD = [
    ("seeds=2", "methods is not set"),
    ("methods=[backprop,nope]", "methods: there is no nope; conf/method has"),
    ("methods=[backprop] seeds=0", "seeds must be at least 1, got 0"),
    ("methods=[backprop] seeds=many", "Value 'many' of type 'str' could not be converted to Integer"),
    ("methods=[backprop] budget=10", "budget must be a number of steps or seconds, such as 2000steps or 60s, got 10"),
    ("methods=[backprop] budget=0steps", "budget must be a number of steps or seconds"),
    ("methods=[backprop] lr=0.1", "lr must be yaml or search, got 0.1: one rate for all methods favours one"),
    ("methods=[backprop] lr_points=4", "lr_points must be odd and at least 3"),
    ("methods=[backprop] search_seeds=0", "search_seeds must be at least 1, got 0"),
    ("methods=[backprop] target=fwdgrad-0.1", "target must be a number or a compared method's final value with"),
    ("methods=[backprop] target=backprop-x", "such as backprop-0.003, got backprop-x"),
    ("methods=[backprop,backprop]", "methods: backprop is listed twice"),
    ("methods=[fwdgrad:num_tangents]", "methods: fwdgrad:num_tangents is not a method's file and, after a colon"),
    ("methods=[fwdgrad:num_tangets=2]", "num_tangets"),
    ("methods=[fwdgrad:_target_=mine.Method]", "methods: .* changes the class of fwdgrad; write a file with _target_"),
    ("methods=[backprop] --config-dir nowhere", "--config-dir: there is no folder nowhere"),
    ("methods=[backprop] --confg-dir conf", "unrecognized arguments: --confg-dir"),
    ("methods=[backprop] modle=cnn", "modle"),
    ("methods=[backprop] data=nope", "Could not find 'data/nope'"),
    ("methods=[backprop] seed=3", "compare sets seed of its runs itself; leave seed=... out; seeds=... is the number"),
    ("methods=[backprop] +trainer.max_steps=3", "leave trainer.max_steps=... out; budget=...steps"),
    ("methods=[backprop] target=nan", "target must be a number"),
    ("methods=[backprop:]", "is not a method's file"),
    ("methods=[,]", r"methods=\[,\] cannot be read"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_mistakes_are_told_before_anything_runs(arguments, message, tmp_path):
    with pytest.raises(USER_ERRORS, match=message):
        run_compare(tmp_path, *arguments.split())
    assert not list(tmp_path.rglob("results.json"))


def test_a_corrected_comparison_may_use_the_folder_of_a_refused_one(tmp_path):
    plan = parse(["methods=[backprop]", "model=nope", f"out={tmp_path}"])
    plan.remember()
    replace(plan, overrides=["model=mlp"]).remember()
    assert "model=mlp" in (tmp_path / "plan.json").read_text()


def test_a_folder_keeps_one_comparison(compared):
    with pytest.raises(USER_ERRORS, match="here holds another comparison; give another folder with out="):
        run_compare(compared[0], *COMMAND, "target=0.5", "out=here")


def test_data_without_other_splits(tmp_path):
    target = "tests.test_first_batch.OnlyTraining"
    data = ["methods=[backprop,fwdgrad]", "seeds=1", "budget=4steps", f"data._target_={target}", "out=here"]
    out, err = run_compare(tmp_path, *data)
    assert f"data {target}, model mlp" in out
    assert (
        "There is no validation split, so the table has no time to a target and the curves show the training loss."
        in out
    )
    assert "There is no test split, so the table has no final accuracy or loss." in out
    assert "never" not in out
    assert err.count("the test split of OnlyTraining is missing") == 2
    assert (tmp_path / "here" / "curves.png").exists()
    with pytest.raises(ConfigError, match=r"lr=search chooses by the validation loss, but the data has no validation"):
        run_compare(tmp_path, *data[:-1], "out=there", "lr=search")


class TwoTests(Digits):
    def test_dataloader(self):
        return [self.val_dataloader(), super().test_dataloader()]


def test_data_with_several_test_splits(tmp_path):
    """Each has its columns, in all formats and in the row of a refused method."""
    data = ["methods=[highway,backprop]", "seeds=2", "budget=4steps", "data._target_=tests.test_compare.TwoTests"]
    out, _ = run_compare(tmp_path, *data, "out=here")
    assert "There are 2 test splits, which are numbered from 0." in out
    refused, row = json.loads((tmp_path / "here" / "table.json").read_text())["rows"]
    runs = [json.loads(path.read_text())["metrics"] for path in (tmp_path / "here").glob("*/seed=*/results.json")]
    for name, key in (("accuracy", "acc"), ("loss", "loss")):
        for i in range(2):
            expected = sum(metrics[f"test/{key}/dataloader_idx_{i}"] for metrics in runs) / 2
            assert row[f"{name}_{i}_mean"] == pytest.approx(expected)
            assert refused[f"{name}_{i}_mean"] is None
    assert row["accuracy_0_mean"] == sum(metrics["val/acc"] for metrics in runs) / 2
    head, _, *lines = [line for line in (tmp_path / "here" / "table.md").read_text().splitlines() if line[:1] == "|"]
    assert "| lr | accuracy 0, % | accuracy 1, % | loss 0 | loss 1 | training loss |" in head
    assert "| refused |" in lines[0]
    assert lines[0].count("|") == lines[1].count("|") == head.count("|")


def test_a_method_that_cannot_train_the_model_is_a_row(tmp_path):
    out, _ = run_compare(tmp_path, "methods=[backprop,highway]", "seeds=1", "budget=4steps", "out=here")
    reason = "MLP has no residual block: no member of an nn.Sequential or nn.ModuleList returns its input"
    assert f"highway is refused: {reason}" in out
    rows = json.loads((tmp_path / "here" / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["backprop", "highway"]
    assert rows[0]["refused"] is None
    assert rows[0]["steps"] == 4
    assert rows[1]["refused"].startswith(reason)
    assert rows[1]["steps"] is None
    lines = (tmp_path / "here" / "table.md").read_text().splitlines()
    trained, refused = (next(line for line in lines if line.startswith(f"| {m} ")) for m in ("backprop", "highway"))
    assert refused.count("|") == trained.count("|")
    with pytest.raises(USER_ERRORS, match="highway: MLP has no residual block"):
        run_compare(tmp_path, "methods=[highway]", "seeds=1", "budget=4steps", "out=there")


@pytest.mark.parametrize(
    ("raised", "status"), [(KeyboardInterrupt(), 130), (Interrupted("stopped by SIGTERM", 15), 143)]
)
def test_a_signal_is_the_exit_status(raised, status, monkeypatch, capsys):
    def stopped(_):
        raise raised

    monkeypatch.setattr("fgtrain.commands.compare.run", stopped)
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == status
    assert capsys.readouterr().err == "fgtrain: stopped; the same command continues the interrupted run\n"
