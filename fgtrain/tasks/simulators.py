"""Simulators whose parameters `Calibration` finds, and the solver that they share.

A simulator is a plain function. `fgtrain.tasks.calibration` says how to write one.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from fgtrain.network.repeated_steps import repeat


def rk4(field: Callable[[Tensor], Tensor], start: Tensor, times: Tensor, steps: int) -> Tensor:
    """States (T, *start.shape) of dy/dt = field(y) at the times (T,), by the classical Runge-Kutta method.

    Args:
        field: the right-hand side, without explicit dependence on time.
        start: the state at the first time.
        times: increasing times.
        steps: steps of equal length between two times. `CheckpointedBackprop` stores about sqrt(steps) states of them.
    """
    states = [start]
    for h in (times.diff() / steps).unbind():
        half, sixth = h / 2, h / 6

        def step(y: Tensor, h: Tensor = h, half: Tensor = half, sixth: Tensor = sixth) -> Tensor:
            k1 = field(y)
            k2 = field(y + half * k1)
            k3 = field(y + half * k2)
            k4 = field(y + h * k3)
            return y + sixth * (k1 + 2 * (k2 + k3) + k4)

        states.append(repeat(step, states[-1], steps))
    return torch.stack(states)


def lotka_volterra(
    trajectories: int,
    times: Tensor,
    steps: int,
    *,
    birth: float | Tensor = 1.1,
    predation: float | Tensor = 0.4,
    growth: float | Tensor = 0.1,
    death: float | Tensor = 0.4,
) -> Tensor:
    """Prey x and predators y, (T, 2, trajectories): x' = birth x - predation x y, y' = growth x y - death y."""

    def field(state: Tensor) -> Tensor:
        prey, predators = state
        meetings = prey * predators
        return torch.stack([birth * prey - predation * meetings, growth * meetings - death * predators])

    return rk4(field, 1 + 3 * _spread(2, trajectories, times), times, steps)


def pendulum(
    trajectories: int, times: Tensor, steps: int, *, stiffness: float | Tensor = 2.0, damping: float | Tensor = 0.2
) -> Tensor:
    """Angle and velocity of a pendulum, (T, 2, trajectories): angle'' = -stiffness sin(angle) - damping angle'."""

    def field(state: Tensor) -> Tensor:
        angle, velocity = state
        return torch.stack([velocity, -stiffness * angle.sin() - damping * velocity])

    return rk4(field, 4 * _spread(2, trajectories, times) - 2, times, steps)


def reaction_diffusion(
    trajectories: int, times: Tensor, steps: int, *, diffusion: float | Tensor = 0.5, rate: float | Tensor = 0.6
) -> Tensor:
    """A population u on a ring of 32 places, (T, 32, trajectories): u' = diffusion u_xx + rate u (1 - u) (Fisher, KPP).

    Stable for a step below 0.7 / diffusion.
    """

    def field(u: Tensor) -> Tensor:
        around = torch.cat([u[-1:], u, u[:1]])
        return diffusion * (around[:-2] - 2 * u + around[2:]) + rate * u * (1 - u)

    return rk4(field, _spread(32, trajectories, times) ** 8, times, steps)


def _spread(size: int, trajectories: int, like: Tensor) -> Tensor:
    """(size, trajectories) starting values, spread over [0, 1): fractional parts of multiples of roots."""
    rates = torch.arange(2.5, size + 2, dtype=torch.float64).sqrt()
    return (rates[:, None] * torch.arange(1, trajectories + 1, dtype=torch.float64)).frac().to(like)


SIMULATORS: dict[str, Callable[..., Tensor]] = {
    "lotka_volterra": lotka_volterra,
    "pendulum": pendulum,
    "reaction_diffusion": reaction_diffusion,
}
"""The simulators by name."""
