"""A step compiled with its derivatives gives the derivatives of the loop that it is repeated in."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

import fgtrain
from fgtrain.forward_ad.compiled_steps import CompiledSteps
from fgtrain.network.repeated_steps import repeat, run_by
from fgtrain.tasks import Calibration, Guess


def run_as_it_is(graph, inputs):
    return graph


def problem(system="lotka_volterra", **options):
    torch.manual_seed(1)
    task = Calibration(system, trajectories=3, observations=2, steps=2, **options)
    return task, Guess(task).double(), lambda model: task.losses(model, None)


def warnings(caplog):
    return [record.message for record in caplog.records if record.name.startswith("fgtrain")]


@pytest.mark.parametrize(
    ("system", "estimator"),
    [("lotka_volterra", fgtrain.ForwardExact()), ("pendulum", fgtrain.GaussNewton(num_tangents=None))],
    ids=["forward_exact", "gauss_newton"],
)
def test_the_derivatives_are_those_of_uncompiled_steps(system, estimator, caplog):
    task, guess, loss = problem(system)
    expected = estimator(guess, loss)
    task.compiled = CompiledSteps(run_as_it_is)
    found = estimator(guess, loss)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.grads, expected.grads)
    assert not warnings(caplog)


def test_a_step_is_compiled_once():
    task, guess, loss = problem()
    task.compiled = CompiledSteps(run_as_it_is)
    for _ in range(3):
        fgtrain.ForwardExact()(guess, loss)
        guess.change.data += 0.1
    assert task.compiled._jvp.num_compilations == 1


def test_a_state_may_hold_integers(caplog):
    def grown(model):
        rate = model["rate"] * 2
        y, count = repeat(lambda state: (state[0] + rate * state[0], state[1] + 1), (torch.ones(2), torch.tensor(0)), 5)
        return (y * count).sum()

    model = nn.ParameterDict({"rate": torch.tensor(0.3)})
    expected = fgtrain.ForwardExact()(model, grown)
    with run_by(CompiledSteps(run_as_it_is)):
        found = fgtrain.ForwardExact()(model, grown)
    torch.testing.assert_close(found.grads, expected.grads)
    assert not warnings(caplog)


@dataclass
class Amounts:
    first: torch.Tensor


@pytest.mark.parametrize(("kind", "is_compiled"), [(Amounts, False), (lambda y: {"first": y, "second": None}, True)])
def test_no_derivative_is_lost_in_an_object_of_the_state(kind, is_compiled, caplog):
    def grown(model):
        rate = model["rate"] * 2

        def step(state):
            held, y = state
            first = held.first if isinstance(held, Amounts) else held["first"]
            return kind(first + rate * first), y + rate

        held, y = repeat(step, (kind(torch.ones(2)), torch.ones(2)), 5)
        return ((held.first if isinstance(held, Amounts) else held["first"]) * y).sum()

    model = nn.ParameterDict({"rate": torch.tensor(0.3)})
    expected = fgtrain.Backprop()(model, grown)
    with run_by(CompiledSteps(run_as_it_is)):
        found = fgtrain.ForwardExact()(model, grown)
    torch.testing.assert_close(found.grads, expected.grads)
    assert bool(warnings(caplog)) != is_compiled


class Growth(nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, advance):
        return repeat(advance(self), torch.ones(2, dtype=torch.float64), 5).sum()


def in_a_closure(model):
    rate = model.rate * 2
    return lambda y: y + rate * y


def in_a_default(model):
    def step(y, rate=model.rate * 2):
        return y + rate * y

    return step


def in_a_nested_function(model):
    inner = in_a_closure(model)
    return lambda y: inner(y) * 1


def of_the_model(model):
    return lambda y: y + 2 * model.rate * y


def that_prints(model):
    rate = model.rate * 2

    def step(y):
        print(end="")
        return y + rate * y

    return step


@pytest.mark.parametrize(
    ("advance", "is_compiled"),
    [
        (in_a_closure, True),
        (in_a_default, True),
        (in_a_nested_function, True),
        (of_the_model, False),
        (that_prints, False),
    ],
)
def test_parameters_may_be_anywhere(advance, is_compiled, caplog):
    """A step that cannot be compiled runs uncompiled."""
    steps, model = CompiledSteps(run_as_it_is), Growth()
    for _ in range(2):
        with run_by(steps):
            grads = fgtrain.ForwardExact()(model, lambda m: m(advance)).grads
        assert grads["rate"].item() == pytest.approx(2 * 5 * 2 * (1 + 2 * model.rate.item()) ** 4)
    assert bool(steps._jvp.num_compilations) == is_compiled
    assert bool(warnings(caplog)) == (advance is that_prints)


def grown_from(start):
    return lambda m: repeat(in_a_closure(m), torch.full((2,), start, dtype=torch.float64), 5).sum()


@pytest.mark.parametrize("first", [torch.nan, torch.inf])
def test_states_that_are_not_finite_decide_nothing(first, caplog):
    """They agree with nothing. The steps are compared once their numbers are finite, and then run compiled."""
    steps, model = CompiledSteps(run_as_it_is), Growth()
    for start in (first, 1.0, 2.0):
        loss = grown_from(start)
        expected = fgtrain.Backprop()(model, loss).grads
        with run_by(steps):
            torch.testing.assert_close(fgtrain.ForwardExact()(model, loss).grads, expected, equal_nan=True)
    assert not warnings(caplog)
    assert (steps._jvp.num_compilations, steps._jvp.confirm) == (1, None)


def test_a_step_compiled_wrongly_is_found_wrong_after_states_of_nan(caplog):
    def wrong(graph, inputs):
        return lambda *values: [None if x is None else 2 * x for x in graph(*values)]

    steps, model = CompiledSteps(wrong), Growth()
    for start in (torch.nan, 1.0):
        loss = grown_from(start)
        expected = fgtrain.Backprop()(model, loss).grads
        with run_by(steps):
            torch.testing.assert_close(fgtrain.ForwardExact()(model, loss).grads, expected, equal_nan=True)
    assert warnings(caplog) == ["steps of the simulation run uncompiled: the compiled derivatives differ"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo's own
def test_compiled_methods_agree():
    _, guess, loss = problem(compile=True)
    expected = fgtrain.Backprop()(guess, problem()[2]).grads
    for estimator in (fgtrain.Backprop(), fgtrain.CheckpointedBackprop(), fgtrain.ForwardExact()):
        torch.testing.assert_close(estimator(guess, loss).grads, expected)
