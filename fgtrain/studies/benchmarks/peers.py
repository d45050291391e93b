"""Forward gradients by PyTorch's own functions and by torchzero, to compare the time of a step."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.func import functional_call, jvp, vmap

from fgtrain.studies.benchmarks.steps import Method, Problem

_LR = 1e-6


def peers_of(num_tangents: list[int]) -> list[Method]:
    """The other implementations, with normal tangents, for every K."""
    rows = []
    for num in num_tangents:
        name = "torch.func.jvp" if num == 1 else "torch.func, vmap(jvp)"
        rows.append(Method(name, None, "normal", num, make_step=_torch_func))
        if find_spec("torchzero") is not None:
            rows.append(Method("torchzero", None, "normal", num, make_step=_torchzero))
    return rows


def _torch_func(problem: Problem, num_tangents: int) -> Callable[[], None]:
    """A step of SGD along (1/K) sum_k d_k v_k."""
    params = {name: p.detach() for name, p in problem.model.named_parameters()}

    def loss(at: dict[str, Tensor]) -> Tensor:
        return problem.losses(lambda x: functional_call(problem.model, at, (x,))).mean()

    @torch.no_grad()
    def step() -> None:
        if num_tangents == 1:
            tangents = {name: torch.randn_like(p) for name, p in params.items()}
            slope = jvp(loss, (params,), (tangents,))[1]
            for name, p in params.items():
                p.sub_(slope * tangents[name], alpha=_LR)
            return
        tangents = {name: p.new_empty(num_tangents, *p.shape).normal_() for name, p in params.items()}
        slopes = vmap(lambda v: jvp(loss, (params,), (v,))[1])(tangents)
        for name, p in params.items():
            p.sub_(torch.tensordot(slopes / num_tangents, tangents[name], 1), alpha=_LR)

    return step


def _torchzero(problem: Problem, num_tangents: int) -> Callable[[], None]:
    torchzero = import_module("torchzero")
    estimate, rate = torchzero.m.ForwardGradient(n_samples=num_tangents), torchzero.m.LR(_LR)
    optimizer = torchzero.Optimizer(problem.model.parameters(), estimate, rate)

    def closure(backward: bool = True) -> Tensor:
        return problem.losses(problem.model).mean()

    return lambda: optimizer.step(closure)
