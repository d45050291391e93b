"""The calibration study: courses, failed starts, memory, and the files of the command."""

import argparse
import json
import sys

import pytest
import torch

from fgtrain.commands.calibrate import main as run_command
from fgtrain.memory import peak_mib
from fgtrain.studies import calibration
from fgtrain.studies.calibration import METHODS, SEARCHED, Course, costs, follow, rows_of
from fgtrain.studies.parts import Parts
from fgtrain.tasks import Calibration


@pytest.fixture(scope="module")
def task():
    return Calibration("pendulum", trajectories=4, observations=5, steps=3)


@pytest.mark.parametrize("method", [name for name in METHODS if "Adam" not in name])
def test_a_course_ends_at_the_true_parameters(method, task):
    course = follow(task, method, METHODS[method].lr, start=0, seconds=60, spread=0.3)
    assert not course.failed
    assert len(course.seconds) == len(course.errors)
    assert course.errors[-1] < 0.05 < course.errors[0]


@pytest.mark.slow
def test_equal_gradients_give_equal_courses(task):
    names = [name for name in METHODS if "Adam" in name]
    first, *others = [follow(task, name, 0.03, start=1, seconds=0.5, spread=0.1).errors[:3] for name in names]
    assert all(other == pytest.approx(first, rel=1e-3) for other in others)


def test_a_start_that_fails_is_counted():
    courses = [
        Course("backprop, Adam", 0.03, 0, [1.0, 2.0, 3.0], [0.5, 0.05, 0.03]),
        Course("backprop, Adam", 0.03, 1, [1.0, 2.0], [0.9, 0.8]),
        Course("backprop, Adam", 0.03, 2, [1.0], [float("nan")]),
    ]
    assert rows_of(courses) == [("backprop, Adam", "0.03", "2 of 3", "3.00%", "2.00", "2", "1000")]


@pytest.mark.slow
def test_the_command_writes_its_files(tmp_path, monkeypatch, capsys):
    small = ["--system", "pendulum", "--trajectories", "2", "--steps", "1", "--starts", "1", "--seconds", "0.1"]
    monkeypatch.setattr(sys, "argv", ["calibrate", *small, "--eager", "--memory-steps", "--out", str(tmp_path)])
    run_command()
    assert {path.name for path in tmp_path.iterdir()} == {f"calibration.{end}" for end in ("md", "json", "png", "svg")}
    found = json.loads((tmp_path / "calibration.json").read_text())
    assert [path["method"] for path in found["paths"]] == [*METHODS]
    assert all(method in (tmp_path / "calibration.md").read_text() for method in METHODS)
    assert "a start fails above an error of 10%" in capsys.readouterr().out


def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibrate", "--system", "nonsense", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code != 0
    assert capsys.readouterr().err.startswith("fgtrain: there is no simulator nonsense")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "option", ["--memory-steps=0", "--memory-limit=nan", "--seconds=inf", "--starts=0", "--spread=nan"]
)
def test_bad_numbers_are_told_before_anything_runs(option, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["calibrate", option, "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit):
        run_command()
    assert capsys.readouterr().err.startswith("fgtrain: --")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_only_backpropagation_grows_with_the_steps(tmp_path):
    parts = Parts(argparse.Namespace(out=tmp_path))
    measured = costs(Calibration("pendulum", trajectories=1000), [10, 40, 160], 2.5, parts)
    found = {(cost.method, cost.steps): cost.mib or 0.0 for cost in measured}
    stored, few, forward = (found[name, 40] for name in ("backprop", "backprop_checkpoint", "forward_exact"))
    assert forward == pytest.approx(found["forward_exact", 10], rel=0.02)
    assert few < stored / 2
    assert stored / found["backprop", 10] == pytest.approx(4, rel=0.3)
    assert not found["backprop", 160]  # it would need more than the limit


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("mib", [8, 64])
def test_the_growth_of_the_process_is_the_memory_that_a_step_takes(mib):
    cpu = torch.device("cpu")
    assert peak_mib(lambda: torch.ones(mib * 2**18), cpu, is_long=True) == pytest.approx(mib, abs=2)
    assert peak_mib(lambda: None, cpu, is_long=True) < 2


@pytest.mark.parametrize("best", SEARCHED)
def test_the_learning_rate_with_the_least_error_is_taken(best):
    usual = METHODS["gauss_newton"].lr

    def course(method, lr):
        return Course(method, lr, 0, [1.0], [abs(lr / usual - best)])

    assert calibration.search(course, "gauss_newton") == pytest.approx(best * usual)
