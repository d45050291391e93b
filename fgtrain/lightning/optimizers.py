"""Several optimizers as one, since Lightning's automatic optimization accepts only one; and L-BFGS."""

import math
from collections import ChainMap
from collections.abc import Callable, Iterable
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from torch.optim import LBFGS, Optimizer

from fgtrain.lightning._lightning import configure_optimizers


class Together(Optimizer):
    """Optimizers over different parameters that step on the same gradient.

    Args:
        optimizers: at least one.
    """

    def __init__(self, optimizers: list[Optimizer]) -> None:
        self.optimizers = optimizers
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        super().__init__(groups, {})
        self.param_groups = groups  # shared with the optimizers, so that they see changes of the learning rate
        self.state = _States(*(optimizer.state for optimizer in optimizers))  # ty: ignore[invalid-assignment]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None if closure is None else closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self.param_groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        self.state = _States(*(optimizer.state for optimizer in self.optimizers))  # ty: ignore[invalid-assignment]

    def __eq__(self, other: object) -> bool:  # a scheduler refers to one of them
        return self is other or any(optimizer is other for optimizer in self.optimizers)

    __hash__ = Optimizer.__hash__


class _States(ChainMap[Any, Any]):
    """The states of several optimizers; each parameter's stays with its own optimizer."""

    def __getitem__(self, key: Any) -> Any:
        return self._having(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._having(key)[key] = value

    def _having(self, key: Any) -> Any:
        return next((state for state in self.maps if key in state), self.maps[0])


def _searched(optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any]) -> None:
    Search(optimizer, closure).run(step)


def step_together(configured: Any) -> Any:
    """The return value of configure_optimizers, with several optimizers merged into one; L-BFGS steps by `Search`."""
    if configured is None:
        return None
    optimizers, schedulers, _ = configure_optimizers(configured)
    for optimizer in optimizers:
        if isinstance(optimizer, LBFGS):
            searched = partial(_searched, optimizer, optimizer.step)
            setattr(optimizer, "step", update_wrapper(searched, optimizer.step))  # a scheduler has marked it
    return configured if len(optimizers) < 2 else ([Together(optimizers)], schedulers)


class _Failed(Exception):
    """A later evaluation of a step of L-BFGS was not finite."""


class Search:
    """A step of L-BFGS, which is taken back if a loss or gradient on its way is not finite.

    If the first is not, it gets no gradient, with which L-BFGS does not move.

    Args:
        optimizer: L-BFGS; if its step is taken back, it forgets its history, which led there.
        evaluate: writes the gradients and returns the loss; None if one of them is not finite.
    """

    def __init__(self, optimizer: Optimizer, evaluate: Callable[[], Any]) -> None:
        self._optimizer = optimizer
        self._evaluate = evaluate
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._before = [p.detach().clone() for p in self._params]
        self._evaluations = 0

    def run(self, step: Callable[[Callable[[], Any]], Any]) -> None:
        """Do the step, which gets the closure."""
        try:
            step(self._closure)
        except BaseException as error:
            with torch.no_grad():
                for p, before in zip(self._params, self._before, strict=True):
                    p.copy_(before)
            self._optimizer.state.clear()
            if not isinstance(error, _Failed):
                raise

    def _closure(self) -> Any:
        self._evaluations += 1
        loss = self._evaluate()
        if loss is not None:
            return loss
        if self._evaluations > 1:
            raise _Failed
        for p in self._params:
            p.grad = None
        return math.nan


def lbfgs(params: Iterable[nn.Parameter], lr: float = 1.0, max_iter: int = 20, weight_decay: float = 0.0) -> Optimizer:
    """L-BFGS with a line search: a step does up to `max_iter` iterations and evaluates the batch again in each.

    Raises:
        ValueError: weight_decay is not 0; L-BFGS has none.
    """
    if weight_decay:
        raise ValueError(f"L-BFGS takes optimizer.weight_decay=0, got {weight_decay}")
    return LBFGS(params, lr=lr, max_iter=max_iter, line_search_fn="strong_wolfe")
