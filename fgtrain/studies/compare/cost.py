"""The cost of one step of a method, without the loop around it: time, memory, traffic."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from fgtrain.errors import LossError, UnsupportedOperation
from fgtrain.estimators import write_grads
from fgtrain.memory import peak_mib
from fgtrain.random import keyed_generator
from fgtrain.runs.run import build


class StepCost(NamedTuple):
    """Milliseconds, peak MiB above parameters and data, and bytes that several processes would exchange per step."""

    milliseconds: float
    peak_mib: float
    bytes_sent: int


def step_costs(configs: Mapping[str, DictConfig], rounds: int = 15) -> dict[str, StepCost]:
    """The cost of one gradient and one optimizer step on the first batch of every configuration, measured in turns.

    Args:
        configs: {name: configuration of a run}.
        rounds: measurements per configuration; their median is returned.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, peaks, traffic = {}, {}, {}
    for name, cfg in configs.items():
        steps[name], traffic[name] = _step(cfg, device)
        steps[name]()
        peaks[name] = peak_mib(steps[name], device)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            times[name].append(_seconds(step, device))
    return {name: StepCost(1e3 * median(times[name]), peaks[name], traffic[name]) for name in steps}


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


def _step(cfg: DictConfig, device: torch.device) -> tuple[Callable[[], None], int]:
    """A step as in training, and the bytes it would send."""
    module, data, *_ = build(cfg)
    data.prepare_data()
    data.setup("fit")
    model = module.model.to(device)
    first = next(iter(data.train_dataloader()))
    batch = [part.to(device) for part in first] if isinstance(first, (tuple, list)) else first.to(device)
    losses = partial(module.task.losses, batch=batch)
    optimizer = module.make_optimizer(p for p in model.parameters() if p.requires_grad)

    def step() -> None:
        estimate = module.estimator(model, losses, generator=keyed_generator(cfg.seed))
        write_grads(model, estimate.grads, check_finite=False)
        optimizer.step()

    sent = 0

    def counted(tensor: Tensor) -> Tensor:
        nonlocal sent
        sent += tensor.nbytes
        return tensor

    module.estimator(model, losses, generator=keyed_generator(cfg.seed), reduce=counted)
    return step, sent


def _seconds(step: Callable[[], None], device: torch.device, repeats: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats
