"""Calibration: exact gradients and steps, memory that does not grow with the steps, simulators of one's own."""

import math
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.func import jacrev

import fgtrain
from fgtrain.memory import peak_mib
from fgtrain.tasks import Calibration, Guess, calibration
from fgtrain.tasks.simulators import SIMULATORS
from tests.commands import train

SHORT: dict[str, Any] = {"trajectories": 3, "observations": 4, "steps": 3}


def problem(system="lotka_volterra", **options):
    torch.manual_seed(1)
    task = Calibration(system, **SHORT | options)
    return task, Guess(task).double()


def loss_of(task):
    return lambda model: task.losses(model, None)


def odeint(field, start, times, *, options):
    """A plain solver that is called like torchdiffeq's."""
    states, h = [start], options["step_size"]
    for before, after in pairwise(times):
        y = states[-1]
        for i in range(round(float(after - before) / h)):
            y = y + h * field(before + i * h, y)
        states.append(y)
    return torch.stack(states)


def spring(trajectories, times, steps, *, stiffness=1.5, friction=-0.1):
    """Masses on springs, with a state (trajectories, 2) and a matrix in the right-hand side."""
    start = torch.linspace(1, 2, 2 * trajectories).to(times).view(trajectories, 2)
    zero, one = torch.zeros(()).to(times), torch.ones(()).to(times)
    matrix = torch.stack([torch.stack([zero, one]), torch.stack([-1 * stiffness * one, friction * one])])
    step = float(times[1] - times[0]) / steps
    return odeint(lambda t, y: y @ matrix.T, start, times, options={"step_size": step})


@pytest.mark.parametrize("system", [*SIMULATORS, spring], ids=[*SIMULATORS, "spring"])
def test_forward_mode_and_checkpoints_have_the_gradient_of_backpropagation(system):
    task, guess = problem(system)
    expected = fgtrain.Backprop()(guess, loss_of(task))
    for estimator in (fgtrain.ForwardExact(), fgtrain.CheckpointedBackprop()):
        found = estimator(guess, loss_of(task))
        torch.testing.assert_close(found.loss, expected.loss)
        torch.testing.assert_close(found.grads, expected.grads)


@pytest.mark.parametrize("system", SIMULATORS)
def test_gauss_newton_in_unit_directions_is_the_dense_step(system):
    task, guess = problem(system)
    found = fgtrain.GaussNewton(num_tangents=None, damping=0.1, max_change=None)(guess, loss_of(task))

    def states(change):
        return (task.simulate(guess.first * change.exp()) / task.scale).flatten()

    jacobian = jacrev(states)(guess.change.detach())
    curvature = 2 / len(jacobian) * jacobian.mT @ jacobian
    damped = curvature + 0.1 * curvature.diagonal().mean() * torch.eye(len(curvature))
    gradient = fgtrain.Backprop()(guess, loss_of(task)).grads["change"]
    torch.testing.assert_close(found.grads["change"], torch.linalg.solve(damped, gradient))


def test_gauss_newton_in_unit_directions_is_rebuilt_from_its_weights():
    task, guess = problem()
    estimator = fgtrain.GaussNewton(num_tangents=None)
    estimate = estimator(guess, loss_of(task))
    assert estimate.weights is not None
    rebuilt = estimator.replay(guess, estimate.weights, torch.Generator())
    assert torch.equal(rebuilt["change"], estimate.grads["change"])


@pytest.mark.slow
def test_memory_is_that_of_few_states_at_any_number_of_steps():
    def peak(estimator, steps):
        task, guess = problem(trajectories=500, observations=1, steps=steps)
        estimator(guess, loss_of(task))
        return peak_mib(lambda: estimator(guess, loss_of(task)), torch.device("cpu"))

    forward, stored, few = fgtrain.ForwardExact(), fgtrain.Backprop(), fgtrain.CheckpointedBackprop()
    assert peak(forward, 16) == pytest.approx(peak(forward, 4), rel=0.02)
    assert 3 < peak(stored, 16) / peak(stored, 4) < 4.5
    assert peak(few, 24) < 0.5 * peak(stored, 24)


def test_the_simulator_of_the_documentation_works():
    (code,) = re.findall(r"^    def decay.*?stack\(states\)$", str(calibration.__doc__), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"torch": torch}
    exec("\n".join(line[4:] for line in code.split("\n")), names)
    task, guess = problem(names["decay"], noise=0.0)
    assert task.true == {"rate": 0.5}
    expected = fgtrain.Backprop()(guess, loss_of(task)).grads
    torch.testing.assert_close(fgtrain.ForwardExact()(guess, loss_of(task)).grads, expected)


def test_the_noise_depends_on_the_seed_alone():
    """The difference of two draws deviates by sqrt(2) times the noise, known to 1 / sqrt(2 N) of it."""
    first, same, other = (Calibration(**SHORT, seed=seed, noise=0.5).observed for seed in (0, 0, 1))
    assert torch.equal(first, same)
    bound = 5 / math.sqrt(2 * first.numel())
    assert bound < 1
    assert (first - other).square().mean().sqrt().item() == pytest.approx(0.5 * math.sqrt(2), rel=bound)


def test_a_parameter_keeps_its_sign_and_its_error_is_relative():
    task, guess = problem(spring)
    assert (guess().sign() == torch.tensor([1, -1])).all()
    assert task.relative_errors(torch.tensor([3.0, -0.2])).tolist() == pytest.approx([1, 1])


def shape(trajectories, times, steps, *, rate=0.5):
    return torch.zeros(2)


def whole(trajectories, times, steps, *, rate=2):
    return (rate * times).long()


def grows(trajectories, times, steps, *, rate=0.5):
    return rate * times[:, None].expand(-1, 1 if rate == 0.5 else 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"system": "nonsense"}, "there is no simulator nonsense; choose one of lotka_volterra, pendulum"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"noise": -1.0}, "duration must be positive and noise at least 0"),
        ({"system": lambda trajectories, times, steps: times}, "must have keyword-only parameters whose defaults"),
        ({"system": lambda a, times, b, *, rate=0.0: times * rate}, "finite and not 0"),
        ({"system": shape}, r"shape must return a real tensor with one state for each of 5 times, got .* \(2,\)"),
        ({"system": whole}, r"whole must return a real tensor with one state for each of 5 times, got torch.int64"),
        ({"system": "reaction_diffusion", "duration": 1e4}, r"not finite at its true parameters; take more steps"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        Calibration(**SHORT | options)


def test_states_that_change_their_shape_are_refused():
    task, guess = problem(grows)
    with pytest.raises(ValueError, match=r"grows must return states of one shape, \(5, 1\), but returns \(5, 3\)"):
        task.losses(guess, None)


COMMAND = ("task=calibration", "task.trajectories=4", "task.steps=2", "self_check=false", "task.system=pendulum")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        ["gauss_newton", "method.num_tangents=null", "optimizer=sgd", "lr=1"],
        ["backprop", "optimizer=lbfgs", "lr=1"],
        ["forward_exact", "optimizer=lbfgs", "lr=1"],
    ],
    ids=" ".join,
)
def test_a_run_finds_the_parameters(method, tmp_path):
    status, out, err = train(tmp_path, *COMMAND, f"method={method[0]}", *method[1:], "trainer.max_steps=6")
    assert status == 0, err
    assert "parameter_error" in out
    (error,) = re.findall(r"parameter_error\W+([0-9.e-]+)", out)
    assert float(error) < 0.03


@pytest.mark.slow
def test_a_simulation_that_diverges_ends_with_advice(tmp_path):
    command = [*COMMAND[:-1], "task.system=reaction_diffusion", "method=forward_exact", "model.spread=30", "seed=1"]
    status, _, err = train(tmp_path, *command, "trainer.max_steps=60", "max_skipped_steps=3", "max_skipped_share=null")
    assert status != 0
    assert "Traceback" not in err
    assert re.search(r"step 0: the loss is (nan|inf), for 3 batches in a row .*task.steps=", err)
