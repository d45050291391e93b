"""Cheaper exchanges than the plain mean of a whole gradient: a compressed mean, or the mean of weights now and then.

`distributed.gradients` takes one of these names. They apply to exact gradients, as of backpropagation:

- mean: the mean of all gradients at every step, in one flat bucket. This is the default, and needs nothing from here.
- fp16: the same in half precision, by PyTorch's communication hook `fp16_compress_hook`.
- power_sgd: two thin matrices of rank 2 for each weight matrix, by PyTorch's `powerSGD_hook` (Vogels, Karimireddy,
  Jaggi 2019, arXiv:1905.13727). The error of a step is added to the gradient of the next one.
- local: nothing. Each rank steps with its own gradient, and every `distributed.local_steps` steps all ranks take the
  mean of their weights (Stich 2019, arXiv:1805.09767).

PyTorch's hooks run in the backward pass of a module in DistributedDataParallel. Lightning registers them on a GPU only,
and estimators call no backward pass. So the exchange has a small module whose backward pass yields a given gradient.

Two limits: the memory of power_sgd is not in checkpoints, and a checkpoint of local holds the weights of rank 0.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from fgtrain.distributed import Ranks, lost_ranks_named
from fgtrain.errors import ConfigError, DivergenceError
from fgtrain.estimators import GradientEstimator
from fgtrain.estimators.gradients import unused_by_all_ranks, without_numbers
from fgtrain.network.parameters import trainable_params

Gradients = Literal["mean", "fp16", "power_sgd", "local"]
GRADIENTS = get_args(Gradients)
Exchange = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""The gradients to use on this rank, from those of its own shard of the batch."""


def exchange_of(gradients: Gradients, estimator: GradientEstimator, model: nn.Module, ranks: Ranks) -> Exchange | None:
    """What replaces the plain mean of gradients; None for "mean" and for a single rank.

    Args:
        gradients: one of the names above.
        estimator: the method.
        model: owner of the parameters, on its final device.
        ranks: the processes. All of them must call this together.

    Raises:
        ConfigError: the method sends something else than exact gradients.
    """
    if gradients == "mean" or ranks.size == 1:
        return None
    if estimator.scalar_reducible or "exact" not in estimator.claims:
        raise ConfigError(
            f"distributed.gradients={gradients} is for exact gradients, and {estimator} sends something else; use "
            "Backprop, or distributed.gradients=mean"
        )
    return _finite if gradients == "local" else Compressed(gradients, model, ranks)


class Compressed:
    """The mean of gradients over ranks, through one of PyTorch's communication hooks.

    Args:
        gradients: "fp16" or "power_sgd".
        model: owner of the parameters.
        ranks: the processes, which count the bytes.
    """

    def __init__(self, gradients: Gradients, model: nn.Module, ranks: Ranks) -> None:
        self._ranks = ranks
        self._module = _WithGradient(model)
        self._ddp = DistributedDataParallel(self._module, process_group=ranks.group, init_sync=False)
        self._state: Any = None
        if gradients == "fp16":
            self._ddp.register_comm_hook(ranks.group, fp16_compress_hook)
        else:
            self._state = PowerSGDState(ranks.group, matrix_approximation_rank=2, start_powerSGD_iter=2)
            self._ddp.register_comm_hook(self._state, powerSGD_hook)

    def __call__(self, grads: dict[str, Tensor]) -> dict[str, Tensor]:
        params, before = self._module.params, self._numbers_sent()
        every = {name: grads.get(name, p.detach()) for name, p in zip(self._module.names, params, strict=True)}
        with torch.enable_grad(), lost_ranks_named(self._ranks.rank):
            self._ddp(every).backward()
        found = dict(zip(self._module.names, (p.grad for p in params), strict=True))
        for p in params:
            p.grad = None
        size = sum(p.nbytes for p in params)
        if self._state is None:
            size = 2 * sum(p.numel() for p in params)
        elif (sent := self._numbers_sent() - before) > 0:  # its first steps send the whole gradient
            size = params[0].element_size() * sent
        self._ranks.count_all_reduce(size)
        of_some_rank = {name: name in grads for name in without_numbers(found)}
        unused = unused_by_all_ranks(of_some_rank, params[0], self._ranks.mean)
        return {name: g for name, g in found.items() if name not in unused}

    def _numbers_sent(self) -> int:
        return 0 if self._state is None else self._state.compression_stats()[2]


class _WithGradient(nn.Module):
    """Parameters p = 0 like those of a model, with the loss sum_i p_i g_i, whose gradient is g."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        params = trainable_params(model)
        self.names = list(params)
        self.params = nn.ParameterList(torch.zeros_like(p) for p in params.values())

    def forward(self, grads: dict[str, Tensor]) -> Tensor:
        products = [(p * grads[name]).sum() for name, p in zip(self.names, self.params, strict=True)]
        return torch.stack(products).sum()


def _finite(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    if all(g.isfinite().all() for g in grads.values()):
        return grads
    raise DivergenceError(
        "a gradient is not finite, and with distributed.gradients=local no rank can skip a step alone; lower lr, or "
        "use distributed.gradients=mean"
    )


@torch.no_grad()
def average_weights(model: nn.Module, ranks: Ranks) -> None:
    """Give all ranks the mean of their trained parameters, sent in one flat bucket."""
    params = list(trainable_params(model).values())
    mean = ranks.mean(torch.cat([p.flatten() for p in params]))
    for p, piece in zip(params, mean.split([p.numel() for p in params]), strict=True):
        p.copy_(piece.view_as(p))
