"""TensorBoard as a dashboard: one page of charts for all runs below a folder, and a table that compares them.

`tensorboard --host 127.0.0.1 --logdir` over a folder of runs shows

- in *Custom scalars*: the loss and accuracy of all runs in one chart each, the quality of their estimates (with
  `callbacks=gradient_quality`) and the cost of a step;
- in *HPARAMS*: a table with method, tangents, K, learning rate and the final metrics under `final/`;
- in *Images*: the paths on test functions;
- in *Histograms*: the directional derivatives;
- in *Text*: the resolved configuration.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from omegaconf import OmegaConf

LAYOUT = {
    "progress": {
        "loss": ["Multiline", ["train/loss", "val/loss"]],
        "accuracy": ["Multiline", ["val/acc"]],
        "distance to the minimum": ["Multiline", ["val/distance_to_minimum"]],
    },
    "estimator quality": {
        "cosine to the gradient": ["Multiline", ["quality/cosine", "quality/expected_cosine"]],
        "relative squared error": ["Multiline", ["quality/relative_squared_error"]],
        "directional derivative": ["Multiline", ["train/directional_derivative_abs"]],
        "gradient norm": ["Multiline", ["train/grad_norm"]],
    },
    "cost": {
        "milliseconds a step": ["Multiline", ["train/step_ms"]],
        "learning rate": ["Multiline", ["train/lr"]],
    },
}


_ENDS = ("test", "val", "loss", "distance_to_minimum")  # the final metrics


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
                logger.experiment.add_custom_scalars(LAYOUT)
                text = OmegaConf.to_yaml(OmegaConf.create(self.config))
                logger.experiment.add_text("config", "    " + text.replace("\n", "\n    "))  # markdown's code block


def log_final(trainer: L.Trainer, config: Mapping[str, Any], results: Mapping[str, Any]) -> None:
    """Write the run's row of the HPARAMS table: its settings and its final metrics.

    TensorBoard first shows the five columns whose names sort first: settings of the method come before `with/...`, the
    settings it was compared on. The metrics get separate tags at the last step: `final/test/acc` beside `val/acc`.
    """
    method = config["method"]
    tangents = method.get("tangents") or {}
    columns = {
        "method": results["method"],
        "tangents": str(tangents.get("_target_", "none")).rsplit(".", 1)[-1],
        "K": method.get("num_tangents", 0),
        "lr": config["lr"],
        "with/batch_size": (config["data"] or {}).get("batch_size", 0),
        "with/seed": config["seed"],
    }
    columns |= {f"with/{name}": results.get(name) for name in ("task", "data", "model")}
    ends = {f"final/{name}": value for name, value in results["metrics"].items() if name.split("/")[0] in _ENDS}
    ends |= {f"final/{name}": results[name] for name in ("train_seconds", "step_ms_median", "steps")}
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger):
            logger.log_metrics(ends, results["steps"])
        elif trainer.is_global_zero:
            logger.log_hyperparams({k: "none" if v is None else v for k, v in columns.items()}, ends, results["steps"])
        logger.finalize("success")
        if isinstance(logger, WandbLogger) and trainer.is_global_zero:
            logger.experiment.finish()  # or the next run of a sweep would continue this one
