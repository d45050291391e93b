"""Training by two hosts over a link of limited rate: seconds to an accuracy against bandwidth.

The hosts are network namespaces on this machine, each with one rank of the run that `fgtrain train trainer=ddp` does.
Seconds are of training, on the wall clock, without validations. A run ends at the highest target or with its budget.
The learning rate of each method is the best of three in one process without a link, constant over the run.
"""

import json
import os
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch

from fgtrain.errors import RankFailed, UserError
from fgtrain.runs.messages import USER_ERRORS, one_line, silence_libraries
from fgtrain.runs.run import run
from fgtrain.studies.compare.plan import compose_run
from fgtrain.studies.hosts import FIRST_ADDRESS, connected, enter, sent_bytes

METHODS: dict[str, tuple[str, ...]] = {
    "backprop": ("method=backprop", "trainer.val_check_interval=5"),
    "backprop, fp16": ("method=backprop", "distributed.gradients=fp16", "trainer.val_check_interval=5"),
    "backprop, PowerSGD": ("method=backprop", "distributed.gradients=power_sgd", "trainer.val_check_interval=5"),
    "backprop, local SGD": (
        "method=backprop",
        "distributed.gradients=local",
        "distributed.local_steps=16",
        "trainer.val_check_interval=16",
    ),
    "fwdgrad_lowrank": ("method=fwdgrad_lowrank", "trainer.val_check_interval=20"),
    "gauss_newton": ("method=gauss_newton", "trainer.val_check_interval=20"),
}
"""{name: arguments of the command line}."""


class Problem(NamedTuple):
    """What is learnt.

    Args:
        arguments: of the command line.
        targets: validation accuracies, in rising order.
        seconds: of training after which a run ends.
        rates: {method: learning rate}, where it is not the method's own.
    """

    arguments: tuple[str, ...]
    targets: tuple[float, ...]
    seconds: float
    rates: dict[str, float]


PROBLEMS = {
    "mnist_subset": Problem(("data=mnist_subset",), (0.8, 0.9), 100, {"gauss_newton": 0.1}),
    "mnist1d": Problem(("data=mnist1d",), (0.3, 0.54), 30, {method: 1.5 for method in METHODS if "backprop" in method}),
}


class Measured(NamedTuple):
    """One run over the link.

    Args:
        data: a key of `PROBLEMS`.
        method: a key of `METHODS`.
        mbit: the rate of the link in Mbit/s.
        points: (step, seconds, validation accuracy) of every validation.
        accuracy: on the test split at the end.
        bytes_counted: `comm/bytes_per_step` of the run: what one rank sends for a step.
        cpu_ms: CPU time of rank 0 for a step.
        bytes_on_wire: what the interface of rank 0 sent per step outside validations, with headers and
            acknowledgements.
    """

    data: str
    method: str
    mbit: float
    points: list[tuple[int, float, float]]
    accuracy: float
    cpu_ms: float
    bytes_counted: float
    bytes_on_wire: float

    def seconds_to(self, target: float) -> float | None:
        """Seconds until the first validation at `target`; None if there is none."""
        return next((seconds for _, seconds, accuracy in self.points if accuracy >= target), None)

    @property
    def best(self) -> float:
        """The best validation accuracy."""
        return max(accuracy for _, _, accuracy in self.points)


class Course(L.Callback):
    """Records seconds, accuracy and sent bytes at every validation, and ends the run at the target or with its budget.

    Args:
        path: file for the records of rank 0.
        target: validation accuracy.
        seconds: of training.
    """

    def __init__(self, path: str, target: float, seconds: float) -> None:
        self.path = Path(path)
        self.target = target
        self.budget = seconds
        self._points: list[tuple[int, float, float]] = []
        self._used = self._since = (0.0, 0.0, 0.0)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._since = _meters()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            used = zip(self._used, _meters(), self._since, strict=True)
            self._used = tuple(before + now - since for before, now, since in used)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        seconds, accuracy = self._used[0], trainer.callback_metrics["val/acc"].item()
        self._points.append((trainer.global_step, seconds, accuracy))
        over = trainer.strategy.broadcast(seconds >= self.budget)
        trainer.should_stop = trainer.should_stop or over or accuracy >= self.target
        self._since = _meters()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            _, cpu, sent = self._used
            self.path.write_text(json.dumps({"points": self._points, "cpu": cpu, "sent": sent}))


def _meters() -> tuple[float, float, float]:
    """Wall-clock seconds, CPU seconds of this process, bytes sent."""
    return time.perf_counter(), time.process_time(), float(sent_bytes())


def measure_pair(data: str, method: str, mbit: float, problem: Problem) -> Measured:
    """Train with one rank on each of two hosts.

    Args:
        data: a key of `PROBLEMS`.
        method: a key of `METHODS`.
        mbit: the rate of the link in Mbit/s, each way.
        problem: its data, targets and budget.

    Raises:
        NoNamespaces: this machine cannot make the hosts.
        UserError: the run failed; the message is that of the first rank that failed.
    """
    with tempfile.TemporaryDirectory() as folder, connected(2, mbit) as hosts:
        course = Path(folder, "course.json")
        arguments = [*problem.arguments, *METHODS[method], f"run_dir={folder}/run"]
        if method in problem.rates:
            arguments.append(f"lr={problem.rates[method]}")
        arguments += [
            f"+callbacks.course._target_={__name__}.Course",
            f"+callbacks.course.path={course}",
            f"+callbacks.course.target={problem.targets[-1]}",
            f"+callbacks.course.seconds={problem.seconds}",
        ]
        results = _together(hosts, arguments)
        noted = json.loads(course.read_text())
    points = [tuple(point) for point in noted["points"]]
    accuracy, steps = results["metrics"]["test/acc"], points[-1][0]
    counted = results["comm/bytes_per_step"]
    return Measured(data, method, mbit, points, accuracy, 1e3 * noted["cpu"] / steps, counted, noted["sent"] / steps)


def _together(hosts: Sequence[str], arguments: Sequence[str]) -> dict[str, Any]:
    """The results of a run with one rank on each host; raises the first error of a rank."""
    context, pending, ranks = get_context("forkserver"), [], []
    context.set_forkserver_preload([__name__])
    for i, host in enumerate(hosts):
        end, other_end = context.Pipe(duplex=False)
        ranks.append(context.Process(target=_rank, args=(other_end, i, host, arguments)))
        ranks[-1].start()
        other_end.close()
        pending.append(end)
    results: dict[str, Any] = {}
    try:
        while pending:
            ready: list[Any] = wait(pending)
            for end in ready:
                found = end.recv()
                if isinstance(found, Exception):
                    raise found
                results |= found
                pending.remove(end)
    except EOFError:
        raise RankFailed("a rank of the run over the link was ended by a signal, or by an error shown above") from None
    except BaseException:
        for rank in ranks:
            rank.terminate()
        raise
    finally:
        for rank in ranks:
            rank.join()
    return results


def _rank(end: Connection, rank: int, host: str, arguments: Sequence[str]) -> None:
    """One rank, as torchrun would start it on its host; sends its results or its error."""
    enter(host)
    silence_libraries()
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": FIRST_ADDRESS, "MASTER_PORT": "29517", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"RANK": str(rank), "NODE_RANK": str(rank), "LOCAL_RANK": "0", "OMP_NUM_THREADS": "1"}
    shared = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.max_steps=1000000", "scheduler=constant")
    shared += ("callbacks=none", "logger=none", "self_check=false")
    try:
        cfg, choices = compose_run(shared, *arguments)
        end.send(run(cfg, choices))
    except USER_ERRORS as error:
        end.send(UserError(one_line(error)))
