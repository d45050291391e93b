"""TensorBoard as a dashboard: one page of charts for all runs below a folder, and a table that compares them.

`tensorboard --host 127.0.0.1 --logdir` over a folder of runs shows

- in *Custom scalars*: one chart of all runs' losses, one of their accuracies, then the quality of their estimates (with
  `callbacks=gradient_quality`) and the cost of a step; charts that the run would leave empty are omitted;
- in *HPARAMS*: a table with method, tangents, K, learning rate and the last values of the metrics;
- in *Images*: the paths on test functions;
- in *Histograms*: the directional derivatives;
- in *Text*: the resolved configuration.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

from fgtrain.lightning.callbacks.quality import GradientQuality
from fgtrain.tasks import Function


class Curves(TensorBoardLogger):
    """TensorBoard without Lightning's curve of epochs, which would be the first of all charts."""

    _is_row = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if not self._is_row:
            super().log_metrics({name: value for name, value in metrics.items() if name != "epoch"}, step)

    def log_row(self, settings: Mapping[str, Any], ends: Mapping[str, float]) -> None:
        """Write a row of the HPARAMS table; its metrics are the last values of the curves that `ends` names."""
        self._is_row = True  # Lightning would add a point to each of them
        try:
            self.log_hyperparams(dict(settings), dict(ends))
        finally:
            self._is_row = False


def layout(*, is_function: bool, has_quality: bool, has_derivatives: bool) -> dict[str, dict[str, list[Any]]]:
    """The charts of a run: progress, then quality, then cost.

    Args:
        is_function: whether the task is a test function, which has no accuracy.
        has_quality: whether the estimates are compared with the gradient.
        has_derivatives: whether the method takes derivatives along directions.
    """
    end = {"distance to the minimum": ["val/distance_to_minimum"]} if is_function else {"accuracy": ["val/acc"]}
    progress = {"loss": ["train/loss", "val/loss"]} | end
    quality = {"gradient norm": ["train/grad_norm"]}
    if has_derivatives:
        quality = {"directional derivative": ["train/directional_derivative_abs"]} | quality
    if has_quality:
        cosines = {"cosine to the gradient": ["quality/cosine", "quality/expected_cosine"]}
        quality = cosines | {"relative squared error": ["quality/relative_squared_error"]} | quality
    cost = {"steps a second": ["train/steps_per_second"], "memory in MiB": ["train/memory_mib"]}
    groups = {"progress": progress, "estimator quality": quality, "cost": cost | {"learning rate": ["train/lr"]}}
    return {group: {title: ["Multiline", tags] for title, tags in charts.items()} for group, charts in groups.items()}


class Dashboard(L.Callback):
    """Writes the layout of the custom scalars and the resolved configuration, as text, when training starts.

    Args:
        config: the configuration of the run, as plain values.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = dict(config)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):
                logger.log_hyperparams(self.config)
            elif trainer.is_global_zero:
                module: Any = pl_module
                charts = layout(
                    is_function=isinstance(module.task, Function),
                    has_quality=any(isinstance(callback, GradientQuality) for callback in trainer.callbacks),  # ty: ignore[missing-attribute]
                    has_derivatives=module.estimator.gives_derivatives,
                )
                logger.experiment.add_custom_scalars(charts)
                text = OmegaConf.to_yaml(OmegaConf.create(self.config))
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))  # markdown's code block


def log_final(trainer: L.Trainer, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the run's row of the HPARAMS table: its settings and its final metrics.

    TensorBoard first shows the five columns whose names sort first: settings of the method come before `with/...`, the
    settings it was compared on. The metrics are the last values of curves, so that they need no charts of their own.
    """
    method = config["method"]
    columns = {
        "method": results["method"],
        "tangents": _tangents(method),
        "K": method.get("num_tangents", (method.get("estimator") or {}).get("num_tangents", 0)),
        "lr": config["lr"],
        "train_seconds": results["train_seconds"],
        "with/batch_size": (config["data"] or {}).get("batch_size", 0),
        "with/seed": config["seed"],
        "with/steps": results["steps"],
    }
    columns |= {f"with/{name}": results.get(name) for name in ("task", "data", "model")}
    found = {name: float(value) for name, value in trainer.callback_metrics.items()} | results["metrics"]
    ends = {name: value for name, value in found.items() if name.startswith(("test/", "val/"))}
    ends |= {"train/steps_per_second": 1e3 / max(1e-9, results["step_ms_median"])}
    ends |= {"train/memory_mib": results["peak_memory_mib"]}
    for logger in trainer.loggers:
        if isinstance(logger, Curves):
            logger.log_row({k: "none" if v is None else v for k, v in columns.items()}, ends)
        else:
            logger.log_metrics(ends, results["steps"])
        logger.finalize("success")
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()  # or the next run of a sweep would continue this one


def _tangents(method: Mapping[str, Any]) -> str:
    """The law of a method's tangents, or how it draws its noise."""
    if method.get("tangents"):
        return str(method["tangents"].get("_target_")).rsplit(".", 1)[-1]
    if "noise" in method:
        return f"{method['noise']} noise on outputs"
    if method.get("estimator"):
        return _tangents(method["estimator"])
    return "the method's own" if "num_tangents" in method else "none"
