"""Starts the processes of a run, unless torchrun or SLURM has started them, and checks their number.

Every process runs all of `fgtrain.runs.run.run` with the composed configuration. The command line is parsed only once,
so a sweep stays one sweep however many processes each of its jobs has.

    python scripts/train.py trainer=ddp trainer.devices=2 trainer.accelerator=cpu trainer.max_steps=100

- `trainer=ddp`, `ddp_spawn` and `ddp_fork` start the processes. Under `torchrun` and SLURM, leave
  `trainer.devices=auto`.
- `trainer=fsdp2 method=fwdgrad_lowrank` keeps parameters and optimizer state sharded. Parameters are gathered layer
  by layer for one forward pass. No gradient is ever gathered or scattered.
- The run ends with a one-line message if the world has the wrong size, if parameters differ between ranks (checked
  every `distributed.check_every_n_steps` steps), or if a rank is lost.
- A sweep (`-m`, also with `hydra/launcher=joblib` or `submitit_local`) names the jobs that failed.

`fgtrain.distributed` describes what the processes exchange; scripts/results/README.md holds the measured traffic.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch.multiprocessing as mp
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from omegaconf import DictConfig

from fgtrain.errors import Interrupted, RankFailed, UserError, disk_error
from fgtrain.runs.config import to_plain, to_saved, typed
from fgtrain.runs.config_check import check
from fgtrain.runs.messages import USER_ERRORS, cannot_write, one_line, silence_libraries
from fgtrain.runs.owner import owned
from fgtrain.runs.results import read_results
from fgtrain.runs.run import run
from fgtrain.runs.world import START_METHODS, plan

GRACE_SECONDS = 10.0


def launch(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Run in as many processes as the configuration asks for, and return the results of rank 0.

    Raises:
        UserError: the first one that a rank raised, or Interrupted if a signal ended all ranks.
        RankFailed: a rank was ended by a signal; the others are ended too.
        RuntimeError: a rank ended with another error; the message holds its traceback.
    """
    check(cfg)
    world = plan(to_plain(cfg)["trainer"])
    if world.started or world.size == 1 or world.strategy not in START_METHODS:
        return run(cfg, choices)
    if read_results(run_dir := Path(cfg.run_dir)) is None:
        with owned(run_dir):
            pass  # rank 0 holds the folder; here a second run fails before its ranks start
    if multiprocessing.get_start_method() not in multiprocessing.get_all_start_methods():
        multiprocessing.set_start_method(None, force=True)  # joblib's start method is unknown to children
    multiprocessing.set_forkserver_preload(["fgtrain.runs.run"])
    environ = dict(os.environ)  # a fork server keeps the environment of its own start
    environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(find_free_network_port()), "NODE_RANK": "0"}
    environ |= {"WORLD_SIZE": str(world.size), "LOCAL_WORLD_SIZE": str(world.size)}
    with tempfile.TemporaryDirectory() as folder, _Sigterm() as sigterm:
        context = mp.start_processes(
            _worker,
            (to_saved(cfg), dict(choices), environ, folder),
            world.size,
            join=False,
            start_method=_start_method(world.strategy),
        )
        assert context is not None
        try:
            sigterm.pass_on_to(context.processes)
            while not context.join(grace_period=GRACE_SECONDS):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            raise _cause(context, Path(folder), sigterm.killed) from error
        except KeyboardInterrupt:  # the ranks receive it too and save their state
            for process in context.processes:
                process.join(6 * GRACE_SECONDS)
            raise
        finally:
            for process, traced in zip(context.processes, context.error_files, strict=True):
                if process.is_alive():
                    process.kill()
                Path(traced).unlink(missing_ok=True)
        return pickle.loads((Path(folder) / "results").read_bytes())


def _start_method(strategy: str) -> str:
    """How ranks are started. A fork server needs a socket, whose name has at most 103 characters on macOS."""
    method = START_METHODS[strategy]
    is_too_long = len(os.path.join(tempfile.gettempdir(), "pymp-12345678", "listener-12345678")) > 103
    return "spawn" if method == "forkserver" and is_too_long else method


class _Sigterm:
    """A context that passes a SIGTERM on to the ranks, which save their state. (Ctrl-C reaches them directly.)

    Ranks that still run 20 seconds later are killed: they are suspended, or wait for a rank that is.

    Attributes:
        killed: the ranks that were killed.
    """

    def __init__(self) -> None:
        self.killed: list[int] = []
        self._processes: list[Any] = []
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        self._in_main = threading.current_thread() is threading.main_thread()  # only there can a handler be set
        if self._in_main:
            self._before = signal.signal(signal.SIGTERM, self._pass_on)
        return self

    def __exit__(self, *_: object) -> None:
        if self._in_main:
            signal.signal(signal.SIGTERM, self._before)
        if self._timer is not None:
            self._timer.cancel()

    def pass_on_to(self, processes: Iterable[Any]) -> None:
        """Set the ranks, and pass on a SIGTERM that arrived while they were starting."""
        self._processes = list(processes)
        if self._timer is not None:
            self._pass_on()

    def _pass_on(self, *_: Any) -> None:
        if self._timer is None:
            self._timer = threading.Timer(2 * GRACE_SECONDS, self._kill_unresponsive)
            self._timer.daemon = True
            self._timer.start()
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def _kill_unresponsive(self) -> None:
        self.killed = [rank for rank, process in enumerate(self._processes) if process.is_alive()]
        for rank in self.killed:
            self._processes[rank].kill()


def _worker(rank: int, plain: dict[str, Any], choices: dict[str, str], environ: dict[str, str], folder: str) -> None:
    silence_libraries()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the launcher's handler
    threading.Thread(target=_end_without_leader, daemon=True).start()
    os.environ |= environ | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    try:
        results = run(typed(plain), choices)
    except (*USER_ERRORS, OSError) as error:
        if isinstance(error, OSError) and disk_error(error) is None:
            raise
        reported = cannot_write(error) if isinstance(error, OSError) else error
        (Path(folder) / f"error_{rank}").write_text(one_line(reported))
        sys.exit(getattr(error, "exit_status", 2))
    if rank == 0:
        (Path(folder) / "results").write_bytes(pickle.dumps(results))


def _end_without_leader() -> None:
    """Save and end when the process that started the ranks is killed; otherwise they would train on unnoticed.

    PyTorch interrupts a rank when its parent dies, but the parent of a rank from a fork server is that server.
    """
    leader = multiprocessing.parent_process()
    assert leader is not None
    if os.getppid() != leader.pid:
        leader.join()
        os.kill(os.getpid(), signal.SIGINT)


def _cause(context: Any, folder: Path, killed: list[int]) -> Exception:
    """The first failure: a signal from outside, else the earliest error.

    Args:
        context: the ranks' process context.
        folder: the folder into which they write their errors.
        killed: the ranks that were killed because they did not react to a SIGTERM.
    """
    if killed:
        text = f"stopped by SIGTERM, to which ranks {killed} did not react; resume=.../checkpoints/last.ckpt continues"
        return Interrupted(f"{text} from the last checkpoint", signal.SIGTERM)
    for rank, process in enumerate(context.processes):
        if process.exitcode is not None and process.exitcode < 0 and -process.exitcode != signal.SIGTERM:
            name = signal.Signals(-process.exitcode).name
            return RankFailed(
                f"rank {rank} was ended by {name} (out of memory, or killed); the other ranks were stopped, "
                "resume=.../checkpoints/last.ckpt continues the run"
            )
    codes = [process.exitcode for process in context.processes]
    errors: list[tuple[float, Exception]] = []
    for rank, (code, traced) in enumerate(zip(codes, map(Path, context.error_files), strict=True)):
        if (line := folder / f"error_{rank}").is_file():
            text = line.read_text()
            error = Interrupted(text, code - 128) if code is not None and code > 128 else UserError(text)
            errors.append((line.stat().st_mtime, error))
        elif traced.is_file():
            trace = pickle.loads(traced.read_bytes())
            errors.append((traced.stat().st_mtime, RuntimeError(f"rank {rank} ended with\n{trace}")))
    if not errors and -signal.SIGTERM in codes:
        return Interrupted("stopped by SIGTERM before anything was trained", signal.SIGTERM)
    return (
        min(errors, key=lambda entry: entry[0])[1] if errors else RankFailed(f"the ranks ended with statuses {codes}")
    )
