"""The cost of one step of a method, without the loop around it: time, memory, traffic."""

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch.utilities import CombinedLoader
from omegaconf import DictConfig
from torch import Tensor

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.estimators import write_grads
from fgtrain.estimators.base import BackwardPass
from fgtrain.memory import peak_mib
from fgtrain.random import keyed_generator
from fgtrain.runs.build import build
from fgtrain.studies.timing import synchronize

ROUNDS = 15  # measurements of a step; their median counts
LONG_ENOUGH = 0.1  # seconds; faster steps are timed several at a time


class StepCost(NamedTuple):
    """The cost of one gradient and one optimizer step.

    Args:
        milliseconds: their time.
        peak_mib: their memory above parameters and data.
        floats_sent: numbers that a process sends to the others, if there are several.
        bytes_sent: the size of these numbers.
        backward_pass: see `GradientEstimator`.
    """

    milliseconds: float
    peak_mib: float
    floats_sent: int
    bytes_sent: int
    backward_pass: BackwardPass


def step_costs(configs: Mapping[str, DictConfig]) -> dict[str, StepCost]:
    """The cost of one gradient and one optimizer step on the first batch of every configuration, measured in turns.

    Args:
        configs: {name: configuration of a run}.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps = {name: _step(cfg, device) for name, cfg in configs.items()}
    peaks = {}
    for name, step in steps.items():
        step.run()
        peaks[name] = peak_mib(step.run, device)
    repeats = {name: 1 + int(min(19, LONG_ENOUGH / _seconds(step.run, device, 1))) for name, step in steps.items()}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            times[name].append(_seconds(step.run, device, repeats[name]))
    return {
        name: StepCost(1e3 * median(times[name]), peaks[name], step.floats, step.bytes, step.backward_pass)
        for name, step in steps.items()
    }


def refusal(cfg: DictConfig) -> str | None:
    """The reason why a method cannot train this model with this loss; None if it can.

    Args:
        cfg: configuration of a run. One gradient is estimated, on the first batch.
    """
    try:
        _step(cfg, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except (UnsupportedOperation, LossError) as error:
        return str(error)
    return None


class _Step(NamedTuple):
    """A step as in training, the numbers and bytes it would send, and its kind of backward pass."""

    run: Callable[[], None]
    floats: int
    bytes: int
    backward_pass: BackwardPass


def _step(cfg: DictConfig, device: torch.device) -> _Step:
    module, data, *_ = build(cfg)
    data.prepare_data()
    data.setup("fit")
    model = module.model.to(device)
    loaders = CombinedLoader(data.train_dataloader(), "max_size_cycle")  # as Lightning takes them
    batch = move_data_to_device(next(iter(loaders))[0], device)

    def losses(net: Any) -> Tensor:
        return module.task.losses(net, batch)

    optimizer = module.make_optimizer(p for p in model.parameters() if p.requires_grad)

    def step() -> None:
        estimate = module.estimator(model, losses, generator=keyed_generator(cfg.seed))
        write_grads(model, estimate.grads, check_finite=False)
        optimizer.step()

    sent: list[tuple[int, int]] = []

    def counted(tensor: Tensor) -> Tensor:
        sent.append((tensor.numel(), tensor.nbytes))
        return tensor

    module.estimator(model, losses, generator=keyed_generator(cfg.seed), reduce=counted)
    numbers, num_bytes = (sum(sizes) for sizes in zip(*sent, strict=True))
    return _Step(step, numbers, num_bytes, module.estimator.backward_pass)


def _seconds(step: Callable[[], None], device: torch.device, repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    synchronize(device)
    return (time.perf_counter() - start) / repeats
