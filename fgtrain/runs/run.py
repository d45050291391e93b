"""One training run, from a configuration to its results.

Before the first step a run prints its parameters, its tangents, the error and cosine to expect of one estimate, and
the memory of a step. Then it shows a progress bar on a terminal, ten lines in a file, or nothing with `quiet=true`.
The last line is the `tensorboard` command; `fgtrain.lightning.callbacks.dashboard` describes the charts, and
`fgtrain.runs.loggers` other places for them.

**Stop and continue.** Ctrl-C, SIGTERM and SIGHUP save after the step in progress, on all processes of a run. A
checkpoint is also written every `callbacks.recovery.every_n_steps` steps. A command with its own folder and
`resume=auto` starts a run, continues it, or shows its results if it has finished:

    python scripts/train.py hydra.run.dir=runs/mine resume=auto trainer.max_steps=500

The weights are the same, bit for bit, as those of an undisturbed run. `resume=` also takes a checkpoint or the folder
of another run. A folder that holds a run is never overwritten. `fgtrain.runs.changes` lists what the command of
a resumed run may change.

**Repeat.** `config.yaml` is the resolved configuration: `--config-dir runs/mine --config-name config` runs it again.
`provenance.json` holds the command, seed, package versions and git commit. With `callbacks=replay_log` a run is
stored as its seed and K floats a step, and `python scripts/replay.py runs/mine weights.pt` rebuilds its weights
without the data.

**Self-check.** Before the first step, the run tries the method on the first batch; `self_check=false` skips this. Two
evaluations with one seed must agree, and derivatives must equal those of backpropagation and of finite differences. If
the model breaks an assumption, one line says which.

**Bad numbers.** A run skips and counts each step whose loss, derivative or gradient is not finite. It ends after ten
such steps in a row (`max_skipped_steps`), after more than a tenth of all steps (`max_skipped_share`), or when the loss
stays above 1000 times its lowest value for ten steps (`detect_divergence`).

**What can run code.** Checkpoints and logs are read with `weights_only=True`. Nothing in them, in a data file or in a
value of a configuration can run code. The exception is `_target_`, which names a function that will be called: read
somebody else's configuration before you run it.
"""

import json
import signal
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.model_helpers import is_overridden
from omegaconf import DictConfig

from fgtrain.distributed import lost_ranks_named
from fgtrain.errors import ConfigError, Interrupted
from fgtrain.lightning.atomic_files import write_atomically
from fgtrain.lightning.callbacks import FirstBatch, Trajectory
from fgtrain.lightning.callbacks.dashboard import log_final
from fgtrain.lightning.module import EstimatorModule
from fgtrain.memory import keep_freed_memory
from fgtrain.runs.build import Run, build
from fgtrain.runs.changes import is_extended, stop_holds
from fgtrain.runs.config import to_saved
from fgtrain.runs.library_errors import library_errors_named
from fgtrain.runs.owner import owned
from fgtrain.runs.provenance import save_provenance
from fgtrain.runs.results import RESULTS, read_results
from fgtrain.runs.resume import checkpoint_to_resume
from fgtrain.runs.starters import is_follower


@library_errors_named()
def run(cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Train and test, write results.json into the run's folder and return its content.

    Args:
        cfg: the composed configuration.
        choices: the names of the chosen method, task, data and model.
    """
    keep_freed_memory()
    if (results := _results_so_far(cfg)) is not None:
        return results
    parts = build(cfg)
    with nullcontext() if is_follower() else owned(Path(cfg.run_dir)):
        results = _results_so_far(cfg)  # of the folder's last owner
        return _train(parts, cfg, choices) if results is None else results


def _results_so_far(cfg: DictConfig) -> dict[str, Any] | None:
    """The results of a finished run that `resume=auto` need not continue."""
    run_dir = Path(cfg.run_dir)
    if not (run_dir / RESULTS).exists():
        return None
    if cfg.resume != "auto":
        raise ConfigError(f"run_dir={run_dir} holds a finished run; name another folder with hydra.run.dir=...")
    return None if is_extended(cfg, run_dir) else read_results(run_dir)


class _Beginning(L.Callback):
    """Writes the provenance of the run, once all its processes have read the previous content of its folder.

    It also gives `Trajectory` the method's name for its picture.
    """

    def __init__(self, cfg: DictConfig, choices: Mapping[str, str]) -> None:
        self.cfg = cfg
        self.choices = choices

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit" and trainer.is_global_zero:
            (Path(self.cfg.run_dir) / RESULTS).unlink(missing_ok=True)  # from the shorter run that this extends
            save_provenance(self.cfg, self.choices)
        for callback in trainer.callbacks:  # ty: ignore[missing-attribute]
            if isinstance(callback, Trajectory):
                callback.method = self.choices["method"]


def _train(parts: Run, cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    module, data, trainer, _ = parts
    run_dir = Path(cfg.run_dir)
    checkpoint = checkpoint_to_resume(cfg.resume, run_dir)
    if checkpoint is None and (run_dir / RESULTS).exists():
        raise ConfigError(f"run_dir={run_dir} holds a finished run without a checkpoint to continue from")
    module.position.keeps_stop = checkpoint is None or stop_holds(cfg, checkpoint)
    first_batch = FirstBatch()
    trainer.callbacks[:0] = [first_batch, _Beginning(cfg, choices)]  # ty: ignore[missing-attribute]
    with _ctrl_c_named(trainer):
        with first_batch.bad_batches_named(trainer), lost_ranks_named(trainer.global_rank):
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        return _results(parts, cfg, choices)


def _results(parts: Run, cfg: DictConfig, choices: Mapping[str, str]) -> dict[str, Any]:
    """Test, write results.json and return its content."""
    module, data, trainer, monitor = parts
    if trainer.global_step == 0:
        raise ConfigError(
            f"nothing was trained: trainer.max_steps={trainer.max_steps}, trainer.max_epochs={trainer.max_epochs}, "
            f"{trainer.num_training_batches} batches an epoch, {module.divergence.skipped_steps} batches skipped"
        )
    results: dict[str, Any] = {name: choices.get(name) for name in ("method", "task", "data", "model")}
    results |= {"seed": cfg.seed, "steps": trainer.global_step, **monitor.summary()}
    results["skipped_steps"] = module.divergence.skipped_steps
    sent = trainer.callback_metrics.pop("comm/bytes_per_step", torch.zeros(())).item()
    results |= {"world_size": trainer.world_size, "comm/bytes_per_step": sent}
    results["num_parameters"] = sum(p.numel() for p in module.model.parameters())
    results["num_trained"] = sum(p.numel() for p in module.model.parameters() if p.requires_grad)
    found = module.task.results(module.model)
    if found is None:
        metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
        found = {"metrics": metrics | _tested(module, data, trainer)}
    results |= found
    log_final(trainer, to_saved(cfg), results)
    if trainer.is_global_zero:
        write_atomically(json.dumps(results, indent=2) + "\n", Path(cfg.run_dir) / RESULTS)
    return results


def _tested(module: EstimatorModule, data: L.LightningDataModule, trainer: L.Trainer) -> dict[str, float]:
    """The metrics on the test split. Without such a split they are empty, and a line on stderr says so.

    Of several loaders, each has its own: test/loss/dataloader_idx_0, test/loss/dataloader_idx_1.
    """
    has_split = is_overridden("test_dataloader", data)
    found = trainer.test(module, data, verbose=False) if has_split else []
    if not any(found) and trainer.limit_test_batches != 0 and trainer.is_global_zero:
        what = "is empty" if has_split else "is missing (no test_dataloader)"
        print(f"fgtrain: the test split of {type(data).__name__} {what}: no test/... in the results", file=sys.stderr)
    return {name: value for of_loader in found for name, value in of_loader.items()}


@contextmanager
def _ctrl_c_named(trainer: L.Trainer) -> Generator[None]:
    """Raise Interrupted where Lightning would end the process silently, at a signal that `Recovery` does not handle."""
    try:
        yield
    except SIGTERMException as end:
        raise Interrupted("stopped by SIGTERM before anything was trained", signal.SIGTERM) from end
    except SystemExit as end:
        if trainer.state.status != TrainerStatus.INTERRUPTED:
            raise
        fate = "which was not saved" if trainer.state.fn == TrainerFn.FITTING else "during the test"
        raise Interrupted(f"interrupted after step {trainer.global_step}, {fate}", signal.SIGINT) from end
