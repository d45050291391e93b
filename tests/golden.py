"""Golden numbers: the result of training with every method, bit for bit, before and after a change to the code.

    python -m tests.golden record FILE    # before
    python -m tests.golden compare FILE   # after, on the same machine with the same libraries

A run is one of scripts/train.py, or of a LightningModule under `convert`. A recording holds the loss of every step as a
hexadecimal float, a digest of the weights and of the estimator's state, and the results without times. If two
recordings differ, the command lists the runs and ends with status 1.
"""

import hashlib
import json
import runpy
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fgtrain.estimators import ForwardGradient
from fgtrain.lightning import convert

ROOT = Path(__file__).resolve().parents[1]
METHODS = sorted(
    {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    - {"highway", "highway_forward", "forward_in_time"}
)
SEEDS = (0, 1, 2)
TIMES = {"train_seconds", "step_ms_median", "peak_memory_mib"}
TWO = "trainer.accelerator=cpu trainer.devices=2"
OTHERS = [
    "method=fwdgrad model=cnn trainer.max_steps=20",
    "method=fwdgrad_lowrank model=local_mixer trainer.max_steps=20",
    "method=local model=local_mixer trainer.max_steps=10",
    "method=highway model=local_mixer trainer.max_steps=10",
    "method=fwdgrad data=text task=language_modeling model=transformer trainer.max_steps=10",
    "method=fwdgrad data=text task=language_modeling model=lstm trainer.max_steps=10",
    "method=fwdgrad optimizer=adam scheduler=exponential trainer.max_epochs=2 trainer.max_steps=-1",
    "method=fwdgrad accumulate_grad_batches=3 clip_grad_norm=1",
    "method=fwdgrad tangents=sphere method.num_tangents=4 method.combine=projection",
    "method=fwdgrad trainer.precision=bf16-mixed",
    "method=fwdgrad task=beale trainer.max_steps=50",
    "method=backprop task=rosenbrock trainer.max_steps=50",
    f"trainer=ddp {TWO} method=fwdgrad",
    f"trainer=ddp {TWO} method=backprop",
    f"trainer=ddp {TWO} method=activity distributed.tangents=per_rank",
    f"trainer=fsdp2 {TWO} method=fwdgrad_lowrank",
]
if torch.cuda.is_available():
    OTHERS.append("method=fwdgrad trainer.accelerator=gpu trainer.precision=16-mixed")


def commands() -> Iterator[str]:
    """The runs of scripts/train.py."""
    for method in METHODS:
        for seed in SEEDS:
            yield f"method={method} seed={seed}"
    yield from OTHERS


def trained(command: str, folder: Path) -> dict[str, Any]:
    """The recording of a run of scripts/train.py."""
    length = [] if "trainer.max" in command else ["trainer.max_steps=50"]
    if "task=" not in command and ("model=" not in command or "model=cnn" in command):
        length.append("model.init=torch")  # as recorded; presets may change
    options = [*length, "trainer.log_every_n_steps=1", "quiet=true", f"hydra.run.dir={folder}", *command.split()]
    run_script("train.py", *options)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    losses = [event.value.hex() for event in events.Scalars("train/loss")]
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    results = json.loads((folder / "results.json").read_text())
    kept = {key: value for key, value in results.items() if key not in TIMES}
    kept["metrics"] = {name: value for name, value in results["metrics"].items() if not name.endswith("_ms")}
    return {
        "losses": losses,
        "weights": digest(saved["state_dict"]),
        "checkpoint": sorted(saved),
        "results": json.loads(json.dumps(kept).replace(str(folder), "")),
    }


def run_script(name: str, *arguments: str) -> None:
    """Run a script as its command line does, without a process of its own."""
    before, sys.argv = sys.argv, [name, *arguments]
    try:
        with redirect_stdout(StringIO()):
            runpy.run_path(str(ROOT / "scripts" / name), run_name="__main__")
    except SystemExit as end:  # scripts end with their status
        if end.code:
            raise
    finally:
        sys.argv = before


def digest(state: dict[str, Tensor]) -> str:
    """The SHA-256 of all names and numbers."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class Own(L.LightningModule):
    """A user's module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))
        self.losses: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("train/loss", loss)
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item().hex())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def converted(seed: int, folder: Path) -> dict[str, Any]:
    """The recording of a converted module."""
    L.seed_everything(seed, verbose=False)
    data = TensorDataset(torch.randn(80, 8), torch.randint(3, (80,)))
    module = convert(Own(), ForwardGradient(num_tangents=2, shrinkage=True))
    trainer = L.Trainer(
        max_steps=50,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, shuffle=True))
    return {"losses": module.losses, "weights": digest(module.state_dict())}


def everything() -> dict[str, Any]:
    """{run: its recording}."""
    found = {}
    for command in commands():
        with TemporaryDirectory() as name:
            found[command] = trained(command, Path(name) / "run")
        print(command, found[command]["weights"][:12], flush=True)
    for seed in SEEDS:
        with TemporaryDirectory() as name:
            found[f"convert seed={seed}"] = converted(seed, Path(name))
    return found


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """One line for each run that differs."""
    lines = []
    for run in before.keys() | after.keys():
        old, new = before.get(run, {}), after.get(run, {})
        parts = [part for part in old.keys() | new.keys() if old.get(part) != new.get(part)]
        if parts:
            lines.append(f"{run}: {', '.join(sorted(parts))} differ")
    return sorted(lines)


def main() -> None:
    what, file = sys.argv[1], Path(sys.argv[2])
    found = everything()
    if what == "record":
        file.write_text(json.dumps(found, indent=1))
        return
    lines = differences(json.loads(file.read_text()), found)
    print("\n".join(lines) or f"all {len(found)} runs as before")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
