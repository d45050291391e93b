"""scripts/compare.py: fair, resumable, and the same numbers in every format."""

import csv
import io
import json
import re
from contextlib import redirect_stderr, redirect_stdout

import pytest
import torch

from fgtrain.commands.compare import run as run_command
from fgtrain.errors import ConfigError
from fgtrain.runs.messages import USER_ERRORS
from fgtrain.runs.run import build
from fgtrain.studies.compare import compare, parse, write_report
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.compare.report import seconds_to_target
from fgtrain.studies.compare.runs import Finished
from tests.commands import composed, options, results_under

COMMAND = ["methods=[backprop,fwdgrad]", "seeds=2", "budget=40steps", "data.batch_size=64"]


def run_script(folder, *arguments):
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.chdir(folder)
        run_command(arguments)
    return out.getvalue(), err.getvalue()


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    return folder, *run_script(folder, *COMMAND, "out=here")


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
    rows = json.loads((folder / "here" / "table.json").read_text())["rows"]
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
    assert rows[0]["step_time_to_backprop"] == rows[0]["peak_memory_to_backprop"] == 1
    assert [row["bytes_per_step"] for row in rows] == [4 * 4810, 4]
    assert "for each seed all methods start from the same parameters" in markdown
    assert "Learning rates: those of conf/method" in markdown
    assert (folder / "here" / "curves.png").stat().st_size > 20_000
    assert (folder / "here" / "cosine.png").stat().st_size > 10_000
    assert re.search(r"\[3/4\] fwdgrad seed 1", err)


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


@pytest.mark.slow
def test_search_tries_equally_many(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["methods=[backprop,fwdgrad]", "seeds=1", "budget=20steps", "lr=search", "lr_points=3", "out=here"]
    outcome = compare(parse(command), lambda *_: None)
    assert {len(found) for found in outcome.tried.values()} == {3}
    for method, found in outcome.tried.items():
        assert composed(f"method={method}").lr in found
        assert found[outcome.lrs[method]] == min(found.values())
    assert all(run.seed == 0 for run in outcome.runs)


def test_seconds_become_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = compare(parse(["methods=[backprop]", "seeds=1", "budget=0.1s", "task=sphere"]), lambda *_: None)
    (trial,) = results_under(next(tmp_path.glob("comparisons/*/trial")))
    assert outcome.runs[0].results["steps"] == int(100 / trial["step_ms_median"])
    assert outcome.runs[0].results["metrics"].keys() == {"loss", "distance_to_minimum"}


def test_a_diverged_run_is_a_result(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["methods=[backprop]", "seeds=1", "budget=40steps", "optimizer.lr=1e9", "out=here"]
    plan = parse(command)
    (row,) = write_report(plan, compare(plan, lambda *_: None), "command")
    assert (row["runs"], row["diverged"], row["accuracy_mean"]) == (1, 1, None)
    assert "backprop: 1 of 1 runs diverged" in (tmp_path / "here" / "table.md").read_text()


def test_time_to_target():
    plan = parse(["methods=[backprop]", "target=0.8"])
    results = {"train_seconds": 10.0, "steps": 100}
    run = Finished("backprop", 0, results, {"val/acc": [(10, 0.5), (20, 0.8), (30, 0.7), (40, 0.9)]})
    assert seconds_to_target(plan, run) == 2.0
    assert seconds_to_target(plan, run._replace(curves={"val/acc": [(10, 0.5)]})) is None


BAD = [
    ("seeds=2", "methods is not set"),
    ("methods=[backprop,nope]", "methods: there is no nope; conf/method has"),
    ("methods=[backprop] seeds=0", "seeds must be at least 1, got 0"),
    ("methods=[backprop] seeds=many", "Value 'many' of type 'str' could not be converted to Integer"),
    ("methods=[backprop] budget=10", "budget must be a number of steps or seconds, such as 2000steps or 60s, got 10"),
    ("methods=[backprop] budget=0steps", "budget must be a number of steps or seconds"),
    ("methods=[backprop] lr=0.1", "lr must be yaml or search, got 0.1: one rate for all methods favours one"),
    ("methods=[backprop] lr_points=4", "lr_points must be odd"),
    ("methods=[backprop] modle=cnn", "modle"),
    ("methods=[backprop] data=nope", "Could not find 'data/nope'"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[arguments for arguments, _ in BAD])
def test_mistakes_are_told_before_anything_runs(arguments, message, tmp_path):
    with pytest.raises(USER_ERRORS, match=message):
        run_script(tmp_path, *arguments.split())
    assert not list(tmp_path.rglob("results.json"))


def test_a_folder_keeps_one_comparison(compared):
    with pytest.raises(USER_ERRORS, match="here holds another comparison; give another folder with out="):
        run_script(compared[0], *COMMAND, "target=0.5", "out=here")


def test_data_without_other_splits(tmp_path):
    target = "tests.test_first_batch.OnlyTraining"
    data = ["methods=[backprop,fwdgrad]", "seeds=1", "budget=4steps", f"data._target_={target}", "out=here"]
    out, err = run_script(tmp_path, *data)
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
        run_script(tmp_path, *data[:-1], "out=there", "lr=search")


def test_a_method_that_cannot_train_the_model_is_a_row(tmp_path):
    out, _ = run_script(tmp_path, "methods=[backprop,highway]", "seeds=1", "budget=4steps", "out=here")
    reason = "MLP has no residual block: no member of an nn.Sequential or nn.ModuleList returns its input"
    assert f"highway is refused: {reason}" in out
    rows = json.loads((tmp_path / "here" / "table.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["backprop", "highway"]
    assert rows[0]["refused"] is None
    assert rows[0]["steps"] == 4
    assert rows[1]["refused"].startswith(reason)
    assert rows[1]["steps"] is None
    lines = (tmp_path / "here" / "table.md").read_text().splitlines()
    assert next(line for line in lines if line.startswith("| highway")).count("|") == lines[-1].count("|")
    with pytest.raises(USER_ERRORS, match="highway: MLP has no residual block"):
        run_script(tmp_path, "methods=[highway]", "seeds=1", "budget=4steps", "out=there")
