"""The state that a user's training_step may change: noted before a call, and restored before the next one."""

from collections import UserDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.wrappers.abstract import WrapperMetric

from fgtrain._torch import tree_map
from fgtrain.errors import LossError
from fgtrain.forward_ad.dual import Dual
from fgtrain.forward_ad.native import value_of
from fgtrain.lightning._lightning import SET_FIRST


class StepSnapshot:
    """A copy of the state that a training step may change: attributes of the module, its lists, metrics.

    A metric is copied when it is first used, so it may be stored anywhere, and unused metrics cost nothing.

    Args:
        module: the module of the step.
        is_compiled: whether the step is compiled. Its use of metrics is not noticed, so all metrics of the module are
            copied.
    """

    def __init__(self, module: nn.Module, *, is_compiled: bool) -> None:
        self._module = module
        self._attributes = dict(vars(module))
        self._lengths = [(x, len(x)) for x in self._attributes.values() if isinstance(x, list)]  # lists that may grow
        self._metrics: dict[int, tuple[Metric, dict[str, Any]]] = {}  # by id, as a metric's hash depends on its state
        for part in module.modules():
            if isinstance(part, Metric if is_compiled else WrapperMetric):  # wrappers change unnoticed
                self._notice(part)

    @contextmanager
    def metrics_noticed(self) -> Generator[None]:
        """A context that copies a metric before this thread changes it, which it notices by `SET_FIRST`."""
        try:
            for noticed in _NOTICED:
                noticed.notice, noticed.thread = self._notice, get_ident()
                setattr(Metric, noticed.name, noticed)
            yield
        finally:
            for noticed in _NOTICED:
                delattr(Metric, noticed.name)

    def _notice(self, metric: Metric) -> None:
        if id(metric) not in self._metrics:
            self._metrics[id(metric)] = metric, {name: _copied(value) for name, value in _attributes_of(metric)}

    def restore(self) -> None:
        """Restore the state before the step."""
        kept = vars(self._module)
        for name in kept.keys() - self._attributes.keys():
            del kept[name]
        kept.update(self._attributes)
        for x, length in self._lengths:
            del x[length:]
        for metric, before in self._metrics.values():
            for name, _ in _attributes_of(metric):
                del vars(metric)[name]
            vars(metric).update({name: _copied(value) for name, value in before.items()})

    def drop_tangents(self) -> None:
        """Reduce the state of metrics to values; the engine handles other parts, see `forward_ad.stale`."""
        for metric, _ in self._metrics.values():
            vars(metric).update({name: _without_graph(value) for name, value in _attributes_of(metric)})


class BatchSnapshot:
    """The contents of a batch, restored before training_step takes it again.

    Lists and dictionaries get back what `pop` and its like have removed. Tensors are not copied, so a step that changes
    one in place is refused if it runs again.

    Args:
        batch: nested lists, tuples and dictionaries.
    """

    def __init__(self, batch: Any) -> None:
        self._containers: list[tuple[Any, Any]] = []
        self._tensors: list[tuple[Tensor, int]] = []
        self._note(batch)

    def _note(self, x: Any) -> None:
        if isinstance(x, (list, dict, UserDict)):
            self._containers.append((x, x.copy()))
        if isinstance(x, (dict, UserDict)):
            x = list(x.values())
        if isinstance(x, (list, tuple)):
            for part in x:
                self._note(part)
        elif isinstance(x, Tensor) and not x.is_inference():
            self._tensors.append((x, x._version))

    def restore(self) -> None:
        """Restore the lists and dictionaries.

        Raises:
            LossError: a tensor has changed.
        """
        for container, content in self._containers:
            if _entries(container) == _entries(content):
                continue  # some dictionaries refuse changes
            if isinstance(container, list):
                container[:] = content
            else:
                container.clear()
                container.update(content)
        if any(x._version != version for x, version in self._tensors):
            raise LossError(
                "training_step changes its batch in place, but it is called several times a step; change a copy "
                "instead, for example x = x * 2 for x.mul_(2), or change it in on_after_batch_transfer"
            )


def _entries(container: Any) -> list[tuple[Any, int]]:
    """The keys of a list or dictionary, with the identities of its values."""
    items = enumerate(container) if isinstance(container, list) else container.items()
    return [(key, id(value)) for key, value in items]


class _Noticed:
    """An attribute of metrics that calls `notice` before the thread `thread` sets it."""

    notice: Callable[[Metric], None]
    thread: int

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, metric: Metric, owner: type) -> Any:
        return vars(metric)[self.name]

    def __set__(self, metric: Metric, value: Any) -> None:
        is_new = self.name not in vars(metric)
        if not torch.compiler.is_compiling() and not is_new and get_ident() == self.thread:
            self.notice(metric)
        vars(metric)[self.name] = value


_NOTICED = tuple(map(_Noticed, SET_FIRST))  # created once, as compiled code has guards on them
_OF_MODULES = frozenset(vars(nn.Module()))


def _attributes_of(metric: Metric) -> list[tuple[str, Any]]:
    """The attributes of a metric, its states included, without parameters, buffers and submodules."""
    return [(name, value) for name, value in vars(metric).items() if name not in _OF_MODULES]


def _copied(x: Any) -> Any:
    """A copy of tensors, lists and dicts as by copy.deepcopy; other objects are returned uncopied."""
    if isinstance(x, Tensor):
        return x.clone()
    if isinstance(x, list):
        return [_copied(value) for value in x]
    if type(x) is dict:
        return {key: _copied(value) for key, value in x.items()}
    return x


def _without_graph(x: Any) -> Any:
    """An attribute of a metric after the step: the same lists and dicts, with tensors reduced to values."""
    if isinstance(x, Tensor):
        return without_tangents(x) if isinstance(x, Dual) or x.requires_grad else x
    if isinstance(x, list):
        x[:] = map(_without_graph, x)
    elif isinstance(x, dict):
        x.update({key: _without_graph(value) for key, value in x.items()})
    elif isinstance(x, tuple):
        return tree_map(_without_graph, x)
    return x


def without_tangents(tree: Any) -> Any:
    """The same nested values with tensors reduced to their values: no tangent, no graph."""
    return tree_map(lambda x: value_of(x).detach() if isinstance(x, Tensor) else x, tree)
