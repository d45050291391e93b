"""The parts of a comparison that need no run: the search for a learning rate, targets, cosines by layer."""

import math

import pytest

from fgtrain.errors import ConfigError
from fgtrain.studies.compare.finished import Finished
from fgtrain.studies.compare.plan import parse
from fgtrain.studies.compare.search import best_of, is_at_edge, search
from fgtrain.studies.compare.target import resolution, steps_to, target_value


@pytest.mark.parametrize(
    ("optimum", "tried", "found", "at_edge"),
    [
        (1.0, [0.316, 1.0, 3.16], 1.0, False),
        (4.0, [0.316, 1.0, 3.16, 10.0], 3.16, False),
        (0.1, [0.0316, 0.1, 0.316, 1.0, 3.16], 0.1, False),
        (1e3, [0.316, 1.0, 3.16, 10.0, 31.6], 31.6, True),
        (1e-3, [0.0316, 0.1, 0.316, 1.0, 3.16], 0.0316, True),
    ],
)
def test_a_search_is_widened_towards_its_best(optimum, tried, found, at_edge):
    losses = search(1.0, 3, lambda lr: abs(math.log(lr / optimum)))
    assert list(losses) == tried
    assert best_of(losses) == found
    assert is_at_edge(found, losses) == at_edge


def finished(method, values, seed=0, tag="val/acc"):
    """A run of 40 steps of 0.1 s, validated every 10 steps."""
    steps = range(10, 10 * len(values) + 1, 10)
    curves = {tag: list(zip(steps, values, strict=True)), "clock/seconds": [(20, 2.0), (40, 4.0)]}
    return Finished(method, seed, {"steps": 40}, curves)


def test_an_absolute_target():
    run = finished("backprop", [0.5, 0.8, 0.7, 0.9])
    assert target_value("0.8", ["backprop"], [run]) == 0.8
    assert steps_to(0.8, "val/acc", run) == 20
    assert steps_to(0.6, "val/acc", run) == 20
    assert steps_to(0.95, "val/acc", run) is None
    assert steps_to(0.5, "val/loss", finished("backprop", [0.9, 0.6, 0.5, 0.55], tag="val/loss")) == 30
    assert [run.seconds_at(step) for step in (0, 10, 40)] == [0, 1, 4]
    assert resolution("val/acc", [run]) == 0.25


def test_a_target_relative_to_a_method():
    runs = [finished("a", [0.5, 0.9, 0.8, 0.9]), finished("a", [0.5, 0.6, 0.7, 0.8], seed=1), finished("a:k=2", [0.7])]
    labels = ["a", "a:k=2"]
    assert target_value("a-0.05", labels, runs) == pytest.approx(0.85 - 0.05)
    assert target_value("a+0.05", labels, runs) == pytest.approx(0.85 + 0.05)
    assert target_value("a:k=2-1e-1", labels, runs) == pytest.approx(0.7 - 0.1)
    assert target_value("a-0.05", labels, runs[2:]) is None
    assert [steps_to(0.8, "val/acc", run) for run in runs] == [20, 40, None]


def test_exactly_computed_layers_are_no_merit():
    def of(module, cosine, error):
        tag = f"quality_of_{module}"
        return {f"{tag}/cosine": [(0, cosine), (5, cosine)], f"{tag}/relative_squared_error": [(0, error), (5, error)]}

    curves = of("first", 0.1, 0.9) | of("second", 0.3, 0.8) | of("head", 1.0, 1e-12)
    run = Finished("fdfa", 0, {}, curves | {"quality/cosine": [(0, 0.95), (5, 0.95)]})
    assert run.is_exact("head")
    assert not run.is_exact("first")
    assert run.cosine() == [(0, pytest.approx(0.2)), (5, pytest.approx(0.2))]
    exact = Finished("backprop", 0, {}, of("head", 1.0, 0.0) | {"quality/cosine": [(0, 1.0), (5, 1.0)]})
    assert exact.cosine() == [(0, 1.0), (5, 1.0)]


@pytest.mark.parametrize("argument", ["logger=csv", "logger.tensorboard.version=1"])
def test_the_loggers_of_a_comparison_are_its_own(argument):
    with pytest.raises(ConfigError, match=r"leave logger=\.\.\. out"):
        parse(["methods=[backprop]", argument])


def test_of_a_key_given_twice_the_last_counts_as_in_train():
    assert parse(["methods=[backprop]", "seeds=1", "seeds=2"]).seeds == 2


def test_a_list_without_brackets_is_told():
    with pytest.raises(ConfigError, match=r"^methods takes a list in brackets: methods=\[backprop,fwdgrad\]$"):
        parse(["methods=backprop,fwdgrad"])
