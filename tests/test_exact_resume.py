"""A run interrupted at any hook, once or often, ends like an undisturbed one: weights, best checkpoint, results."""

import contextlib
import shutil
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers.logger import DummyLogger
from torch.utils.data import DataLoader, TensorDataset

from fgtrain import ForwardGradient
from fgtrain.errors import CheckpointError
from fgtrain.lightning.callbacks import Monitor, RandomState, Recovery
from fgtrain.lightning.checkpoints import AtomicCheckpointIO, read_checked
from fgtrain.runs.resume import checkpoint_to_resume
from fgtrain.schedulers import cosine
from tests.commands import results_under, train
from tests.interrupted import HOOKS, Killed, KillFirst, KillLast, Noisy, assert_same
from tests.small import Small, make, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:Checkpoint directory .* exists",
    "ignore:the run continues in the middle",
    "ignore:.* could not find the monitored key",  # of a run without validation
)

SCHEDULERS = {
    "constant": None,
    "cosine": cosine,
    "warm-up": lambda optimizer, total_steps: cosine(optimizer, total_steps, warmup_steps=3),
    "exponential": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    "one cycle": partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1),
}
TIMES = ("train/step_ms",)


HOOKS += ["on_validation_start", "on_validation_end", "on_train_end"]


class StopAt(L.Callback):
    """Ends a run after a step, as trainer.max_time does: with a validation."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step == self.step


class Plan(NamedTuple):
    """What is trained, and where it is cut: (event, after the other callbacks or before them) of each attempt."""

    length: dict[str, Any]
    scheduler: str = "cosine"
    save_every: int = 4
    validate: dict[str, Any] = {"val_check_interval": 4, "check_val_every_n_epoch": None}  # noqa: RUF012
    accumulate: int = 1
    patience: int = 100
    stop_at: int = 0
    cuts: tuple[tuple[int, bool], ...] = ()
    log_every: tuple[int, ...] = (3,)  # of each attempt, the last for the rest
    moves: bool = False  # to another folder after each cut
    from_best: bool = False  # goes on from best.ckpt after the last cut


class Log(DummyLogger):
    """Keeps what validation logs, by its step."""

    def __init__(self, entries):
        super().__init__()
        self.entries = entries

    def log_metrics(self, metrics, step=None):
        self.entries.update({(name, step): value for name, value in metrics.items() if name.startswith("val/")})


def attempt(plan, folder, checkpoint, kill, *, early_stopping=True, data=Small, logged=None, log_every=3):
    torch.manual_seed(0)
    module = make(
        ForwardGradient(),
        model=Noisy(),
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
        scheduler=SCHEDULERS[plan.scheduler],
        accumulate_grad_batches=plan.accumulate,
    )
    monitor = Monitor(log_every)
    watching = [
        *([] if isinstance(kill, KillLast) else [kill]),
        monitor,
        *([StopAt(plan.stop_at)] if plan.stop_at else []),
        RandomState(),
        *([EarlyStopping("val/loss", patience=plan.patience, strict=False)] if early_stopping else []),
        ModelCheckpoint(folder, "best", monitor="val/acc", mode="max", enable_version_counter=False),
        Recovery(str(folder), plan.save_every),
        *([kill] if isinstance(kill, KillLast) else []),
    ]
    L.seed_everything(1, verbose=False)
    options = plan.length | plan.validate | {"plugins": [AtomicCheckpointIO()]}
    options |= {"logger": False if logged is None else Log(logged)}
    run = trainer(folder, *watching, **options)
    run.fit(module, data(), ckpt_path=checkpoint, weights_only=True)
    found = {
        "steps": run.global_step,
        "lr": run.optimizers[0].param_groups[0]["lr"],
        "train_batches": len(monitor.step_seconds),
        "weights": module.state_dict(),
        "metrics": {name: v.item() for name, v in run.callback_metrics.items() if name not in TIMES},
        "skipped": module.divergence.skipped_steps,
    }
    best = folder / "best.ckpt"
    if best.exists():
        content = read_checked(best)
        found["best"] = content["state_dict"] | {"step": content["global_step"]}
    found["test"] = run.test(module, Small(), verbose=False)
    return found


def outcome(plan, data=Small):
    with TemporaryDirectory() as name:
        folder, cuts, every, saved = Path(name) / "0", list(plan.cuts), list(plan.log_every), None
        logged: dict[Any, Any] = {}
        while True:
            log_every = every.pop(0) if cuts and len(every) > 1 else every[-1]
            at, last = cuts.pop(0) if cuts else (0, True)
            try:
                kill = KillLast(at) if last else KillFirst(at)
                return attempt(plan, folder, saved, kill, data=data, logged=logged, log_every=log_every) | {
                    "logged": logged
                }
            except Killed:
                folder.mkdir(exist_ok=True)
                if plan.moves:
                    folder = folder.rename(folder.with_name(str(len(cuts) + 1)))
                saved = checkpoint_to_resume("auto", folder)
                if plan.from_best and not cuts and (folder / "best.ckpt").exists():
                    saved = folder / "best.ckpt"


def assert_exact(plan, data=Small):
    found, expected = outcome(plan, data), outcome(plan._replace(cuts=()), data)
    for metrics in (found["metrics"], expected["metrics"]) if len(set(plan.log_every)) > 1 else ():
        for name in [name for name in metrics if name.startswith("train/")]:
            del metrics[name]  # a mean since the last entry in the log, which was at another step
    assert_same(found, expected)


class SnapshotFirst(KillFirst):
    """Keeps what the run would leave, were it killed at one of the events, before other callbacks see it.

    Attributes:
        left: {which files there are: (a copy of the folder, what had been logged at each of the events)}.
    """

    def __init__(self, events, folder, logged):
        super().__init__(0)
        self.events = set(events)
        self.folder = folder
        self.logged = logged
        self.seen = 0
        self.left = {}

    def _event(self, *_):
        self.seen += 1
        if self.seen in self.events:
            self.folder.mkdir(exist_ok=True)
            files = tuple(sorted((p.name, p.stat().st_ino, p.stat().st_mtime_ns) for p in self.folder.iterdir()))
            if files not in self.left:
                copy = self.folder.with_name(f"left at {self.seen}")
                self.left[files] = shutil.copytree(self.folder, copy), []
            self.left[files][1].append(dict(self.logged))


class SnapshotLast(SnapshotFirst, KillLast):
    """After all others."""


def assert_exact_wherever_cut(plan, events, data=Small, last=True):
    """Of events that leave the same files the run goes on only once; returns what it ends with."""
    with TemporaryDirectory() as name:
        folder, logged = Path(name) / "run", {}
        snapshots = (SnapshotLast if last else SnapshotFirst)(events, folder, logged)
        expected = attempt(plan, folder, None, snapshots, data=data, logged=logged) | {"logged": logged}
        assert len(snapshots.left) > 2
        for copy, logs in snapshots.left.values():
            shutil.rmtree(folder)
            copy.rename(folder)
            again = {}
            kill = KillLast(0) if last else KillFirst(0)
            found = attempt(plan, folder, checkpoint_to_resume("auto", folder), kill, data=data, logged=again)
            for before in logs:
                assert_same(found | {"logged": before | again}, expected)
    return expected


EPOCHS = {"max_epochs": 3}  # of five batches
STEPS = {"max_steps": 12, "max_epochs": -1}
BOTH = {"max_steps": 12, "max_epochs": 4}
EVENTS = 60
EVERY_EPOCH = {"check_val_every_n_epoch": 1}


@pytest.mark.slow
@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    "plan",
    [
        Plan(EPOCHS),
        Plan(EPOCHS, save_every=5, validate=EVERY_EPOCH),
        Plan(STEPS, scheduler="exponential", save_every=5),
        Plan(BOTH, scheduler="constant", save_every=1),
    ],
    ids=["epochs", "ends of epochs", "steps", "both"],
)
def test_cut_at_any_event(plan, last):
    assert_exact_wherever_cut(plan, range(1, EVENTS, 1 if plan.save_every > 1 else 7), last=last)


PLANS = st.builds(
    Plan,
    length=st.sampled_from([EPOCHS, STEPS, BOTH, {"max_steps": 9, "max_epochs": 2}]),
    scheduler=st.sampled_from(sorted(SCHEDULERS)),
    save_every=st.sampled_from([1, 2, 3, 4, 5, 100]),
    validate=st.sampled_from(
        [{"val_check_interval": n, "check_val_every_n_epoch": None} for n in (2, 3, 4, 5, 7)]
        + [EVERY_EPOCH, {"check_val_every_n_epoch": 2}]
    ),
    accumulate=st.sampled_from([1, 1, 2]),
    patience=st.sampled_from([0, 1, 100]),
    cuts=st.lists(st.tuples(st.integers(1, EVENTS), st.booleans()), max_size=3).map(tuple),
    log_every=st.lists(st.sampled_from([1, 3, 100]), min_size=1, max_size=3).map(tuple),
    moves=st.booleans(),
    from_best=st.booleans(),
)
LONGER = st.sampled_from([{"max_steps": 17}, {"max_steps": -1, "max_epochs": 5}, {"max_steps": 16, "max_epochs": 7}])


@pytest.mark.slow
@given(plan=PLANS)
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@example(plan=Plan(EPOCHS, save_every=5, cuts=((18, True), (12, True))))
@example(plan=Plan(EPOCHS, "one cycle", cuts=((18, True), (12, True))))
def test_any_run_cut_up_to_three_times(plan):
    assert_exact(plan)


@pytest.mark.slow
@given(plan=PLANS)
@settings(max_examples=60, deadline=None, derandomize=True, phases=[Phase.generate])
def test_many_runs_cut_up_to_three_times(plan):
    assert_exact(plan)


@pytest.mark.slow
@given(
    plan=PLANS.filter(lambda plan: plan.scheduler in ("constant", "exponential") and plan.patience == 100), long=LONGER
)
@settings(max_examples=40, deadline=None, derandomize=True, phases=[Phase.generate])
def test_many_runs_made_longer(plan, long):
    """Cut or not, then finished, then extended: as if it had been so long from the beginning."""
    plan = plan._replace(moves=False, from_best=False, log_every=(3,))
    whole = plan._replace(length={"max_epochs": -1} | long, cuts=())
    with TemporaryDirectory() as name:
        folder = Path(name)
        for at, last in (*plan.cuts, (0, True)):
            with contextlib.suppress(Killed):
                saved = checkpoint_to_resume("auto", folder)
                attempt(plan, folder, saved, KillLast(at) if last else KillFirst(at))
                break
        found, expected = attempt(whole, folder, folder / "last.ckpt", KillLast(0)), outcome(whole)
    assert_same(found["weights"], expected["weights"])
    assert found["steps"] == expected["steps"]


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", [7, 10])
@pytest.mark.parametrize("validate", [{"val_check_interval": 4, "check_val_every_n_epoch": None}, EVERY_EPOCH], ids=str)
def test_stopped_run_that_is_cut(validate, stop_at):
    plan = Plan(EPOCHS, save_every=1, validate=validate, stop_at=stop_at)
    undisturbed = assert_exact_wherever_cut(plan, range(2 * stop_at, 2 * stop_at + 14, 2))
    assert undisturbed["steps"] == stop_at


@pytest.mark.slow
@pytest.mark.parametrize("save_every", [3, 4])
def test_epochs_that_end_before_their_loader(save_every):
    validate = EVERY_EPOCH if save_every == 3 else {"limit_val_batches": 0}
    plan = Plan(EPOCHS, save_every=save_every, validate=validate | {"limit_train_batches": 3})
    assert_exact_wherever_cut(plan, range(8, 32))


class Shuffled(Small):
    """A loader without a position, whose order is drawn from the global generator."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self._splits["train"]), self.batch_size, shuffle=True)


class ShuffledByItsOwn(Small):
    """As `Shuffled`, with a generator of its own."""

    def train_dataloader(self):
        generator, examples = torch.Generator().manual_seed(3), TensorDataset(*self._splits["train"])
        return DataLoader(examples, self.batch_size, shuffle=True, generator=generator)


@pytest.mark.slow
@pytest.mark.parametrize("data", [Shuffled, ShuffledByItsOwn])
@pytest.mark.parametrize("validate", [EVERY_EPOCH, {"check_val_every_n_epoch": 2}, {"limit_val_batches": 0}], ids=str)
def test_cut_at_the_end_of_an_epoch_without_a_position(validate, data):
    """After its last step a checkpoint needs no position of the loader, in whichever hook it is written."""
    plan = Plan(EPOCHS, save_every=5, validate=validate)
    assert_exact_wherever_cut(plan, range(12, 40), data)


class Pass:
    """A loader that, like torchdata's StatefulDataLoader, gives nothing after it got the state of a finished pass."""

    def __init__(self, loader):
        self.loader = loader
        self.passes = self.batch = 0
        self.loaded = False

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        if not self.loaded:
            self.passes, self.batch = self.passes + 1, 0
        self.loaded = False
        batches = list(self.loader)
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.passes)).tolist()
        while self.batch < len(batches):
            self.batch += 1
            yield batches[order[self.batch - 1]]

    def state_dict(self):
        return {"passes": self.passes, "batch": self.batch}

    def load_state_dict(self, state):
        self.passes, self.batch, self.loaded = state["passes"], state["batch"], True


class Passes(Small):
    def train_dataloader(self):
        return Pass(self._loader("train", self.batch_size))


class Pair(Small):
    """Two loaders; when an epoch ends, a pass of the shorter one has not."""

    def loader(self, split):
        return Pass(self._loader(split, self.batch_size))

    def train_dataloader(self):
        return [self.loader("train"), self.loader("val")]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if not isinstance(batch[0], list | tuple):
            return batch
        (a, labels), (b, _) = batch
        return a + b.mean(), labels


class PairOfOurs(Pair):
    def loader(self, split):
        return self._loader(split, self.batch_size, shuffle=True)


class Counting(Small):
    """Its state changes with every training batch."""

    count = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        assert self.trainer is not None
        if self.trainer.training:
            self.count += 1
        return batch[0] * (1 + self.count % 3), batch[1]

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


class Drawing(Pass):
    """Draws a random number for an iterator, which its state after a load makes too, as StatefulDataLoader's."""

    drawn = True

    def __iter__(self):
        torch.rand(())
        self.drawn = True
        return super().__iter__()

    def state_dict(self):
        if not self.drawn:
            torch.rand(())
        self.drawn = True
        return super().state_dict()

    def load_state_dict(self, state):
        self.drawn = False
        super().load_state_dict(state)


class Unsized(Drawing):
    """Of its batches Lightning fetches one ahead, to know which is the last."""

    __len__: Any = None

    def __iter__(self):
        return (self.batch_of(inputs + 0.1 * torch.randn_like(inputs), labels) for inputs, labels in super().__iter__())

    def batch_of(self, inputs, labels):
        return inputs, labels


class Drawn(Small):
    def train_dataloader(self):
        return Drawing(self._loader("train", self.batch_size))


class Stream(Counting):
    def train_dataloader(self):
        return Unsized(self._loader("train", self.batch_size))


class PairOfStreams(Pair):
    """The second begins again while the first goes on."""

    def loader(self, split):
        return (Unsized if split == "train" else Pass)(self._loader(split, self.batch_size))


class Going(Pass):
    """Goes on where it was, also after the end of an epoch, as a stream does."""

    def __iter__(self):
        batches = list(self.loader)
        while self.batch < len(batches):
            self.batch += 1
            yield batches[self.batch - 1]
        self.batch = 0


class GoingWithAnother(Pair):
    def loader(self, split):
        return (Pass if split == "train" else Going)(self._loader("train", 8 if split == "train" else 16))


class Batch(NamedTuple):
    inputs: torch.Tensor
    labels: torch.Tensor


def test_a_batch_that_a_checkpoint_cannot_hold_is_told(tmp_path):
    class Named(Unsized):
        def batch_of(self, inputs, labels):
            return Batch(inputs, labels)

    class Data(Small):
        def train_dataloader(self):
            return Named(self._loader("train", self.batch_size))

    plan = Plan(EPOCHS, save_every=3, validate={"limit_val_batches": 0}, scheduler="constant")
    saved = cut(plan, tmp_path, data=Data)
    with pytest.warns(UserWarning, match="one batch is left out; give the loader a __len__, or let its batches be of"):
        attempt(plan, tmp_path, saved, KillLast(0), data=Data)


def test_a_checkpoint_holds_no_more_than_the_batch_that_was_fetched_ahead(tmp_path):
    class Views(Unsized):
        whole = torch.zeros(1_000_000)

        def batch_of(self, inputs, labels):
            return self.whole[: inputs.numel()].view_as(inputs), labels

    class Data(Small):
        def train_dataloader(self):
            return Views(self._loader("train", self.batch_size))

    saved = cut(Plan(EPOCHS, "constant", save_every=3, validate={"limit_val_batches": 0}), tmp_path, data=Data)
    assert saved is not None
    assert saved.stat().st_size < 100_000


OWN_STATES = pytest.mark.parametrize("data", [Passes, Pair, PairOfOurs, Counting, Drawn, Stream, GoingWithAnother])


@pytest.mark.parametrize("data", [Passes, Pair, PairOfOurs, Counting, Drawn, Stream, PairOfStreams])
def test_cut_in_the_middle_of_an_epoch_of_data_with_a_state(data):
    plan = Plan(EPOCHS, "constant", save_every=3, validate={"limit_val_batches": 0}, cuts=((14, True), (12, True)))
    assert_exact(plan, data)


@OWN_STATES
def test_cut_at_the_end_of_an_epoch_of_data_with_a_state(data):
    plan = Plan(EPOCHS, "constant", save_every=5, validate={"limit_val_batches": 0}, cuts=((12, True), (14, True)))
    assert_exact(plan, data)


@pytest.mark.slow
@pytest.mark.parametrize("loader", [Pass, Going])
@pytest.mark.parametrize("save_every", [2, 3])
def test_epochs_that_end_before_a_loader_with_a_position(save_every, loader):
    class Data(Small):
        def train_dataloader(self):
            return loader(self._loader("train", self.batch_size))

    plan = Plan(EPOCHS, "constant", save_every, {"limit_val_batches": 0, "limit_train_batches": 3})
    assert_exact_wherever_cut(plan, range(8, 32), Data)


@pytest.mark.slow
@pytest.mark.parametrize("data", [Passes, Stream])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("save_every", [3, 5])
def test_loaders_that_are_made_anew_every_few_epochs(save_every, every, data):
    reload = {"reload_dataloaders_every_n_epochs": every}
    plan = Plan({"max_epochs": 4}, "constant", save_every, EVERY_EPOCH | reload)
    assert_exact_wherever_cut(plan, range(12, 50), data)


@pytest.mark.slow
@OWN_STATES
@pytest.mark.parametrize("length", [EPOCHS, STEPS], ids=str)
@pytest.mark.parametrize("save_every", [4, 5])
def test_data_with_a_state(save_every, length, data):
    validate = EVERY_EPOCH if save_every == 5 else {"val_check_interval": 4, "check_val_every_n_epoch": None}
    plan = Plan(length, "constant", save_every=save_every, validate=validate)
    assert_exact_wherever_cut(plan, range(12, 40), data)


@pytest.mark.slow
@OWN_STATES
@pytest.mark.parametrize("short", [{"max_epochs": 1}, {"max_epochs": 2, "max_steps": 8}], ids=str)
def test_a_longer_run_of_data_with_a_state(short, data, tmp_path):
    attempt(Plan(short, scheduler="constant"), tmp_path, None, KillLast(0), data=data)
    plan = Plan(EPOCHS, scheduler="constant")
    found = attempt(plan, tmp_path, tmp_path / "last.ckpt", KillLast(0), data=data)
    expected = outcome(plan, data)
    assert_same(found["weights"], expected["weights"])
    assert found["steps"] == expected["steps"]


def cut(plan, folder, event=20, data=Small):
    with pytest.raises(Killed):
        attempt(plan, folder, None, KillLast(event), data=data)
    return checkpoint_to_resume("auto", folder)


@pytest.mark.parametrize("plan", [Plan(EPOCHS), Plan(STEPS)], ids=["epochs", "steps"])
@pytest.mark.parametrize("name", ["last.ckpt", "best.ckpt"])
def test_in_another_folder(plan, name, tmp_path):
    cut(plan, tmp_path / "first", event=30)
    (tmp_path / "first").rename(tmp_path / "moved")
    found, expected = attempt(plan, tmp_path / "second", tmp_path / "moved" / name, KillLast(0)), outcome(plan)
    del expected["logged"]  # what the first attempt validated is not in the second one's log
    assert_same(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("long", [{"max_steps": 12}, {"max_steps": 18}, {"max_steps": -1, "max_epochs": 4}], ids=str)
@pytest.mark.parametrize("short", [{"max_steps": 7}, {"max_steps": 10}, {"max_steps": -1, "max_epochs": 2}], ids=str)
def test_longer_run(short, long, tmp_path):
    plan = Plan({"max_epochs": -1} | short, scheduler="constant")
    attempt(plan, tmp_path, None, KillLast(0))
    plan = plan._replace(length={"max_epochs": -1} | long)
    found, expected = attempt(plan, tmp_path, tmp_path / "last.ckpt", KillLast(0)), outcome(plan)
    assert_same(found["weights"], expected["weights"])
    assert found["steps"] == expected["steps"]


def test_state_that_nobody_loads_is_refused(tmp_path):
    saved = cut(Plan(EPOCHS), tmp_path)
    with pytest.raises(CheckpointError, match=r"holds the state of EarlyStopping.*, which this run lacks; give it"):
        attempt(Plan(EPOCHS), tmp_path, saved, KillLast(0), early_stopping=False)

    class Forgetful(Small):
        def train_dataloader(self):
            return list(super().train_dataloader())

    with pytest.raises(CheckpointError, match=r"positions of 1 training loaders, but 0 of this run's can restore one"):
        attempt(Plan(EPOCHS), tmp_path, saved, KillLast(0), data=Forgetful)

    class Hasty(Small):
        def setup(self, stage):
            super().setup(stage)
            assert self.trainer is not None
            self.trainer.fit_loop.setup_data()

    with pytest.raises(CheckpointError, match="something asked for the training loader before its position was read"):
        attempt(Plan(EPOCHS), tmp_path, saved, KillLast(0), data=Hasty)


def test_another_number_of_threads_is_told(tmp_path, capsys):
    saved = cut(Plan(EPOCHS), tmp_path)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        attempt(Plan(EPOCHS), tmp_path, saved, KillLast(0))
    finally:
        torch.set_num_threads(threads)
    expected = f"written with threads {threads}, not {threads + 1}: the last bits may differ\n"
    assert capsys.readouterr().err.endswith(expected)


@pytest.mark.parametrize("options", [{"max_epochs": 2, "max_steps": -1}, {"max_epochs": -1, "max_steps": 6}], ids=str)
def test_length_is_known_without_a_loader_of_the_run(options, tmp_path):
    class Counted(Small):
        def train_dataloader(self):
            loader = super().train_dataloader()
            loaders.append(loader)
            return loader

    loaders = []
    run = trainer(tmp_path, **options)
    run.fit(make(ForwardGradient(), scheduler=cosine), Counted())
    assert [loader._epoch >= 0 for loader in loaders] == [False] * (len(loaders) - 1) + [True]


@pytest.mark.slow
def test_results_of_a_run_cut_twice(tmp_path, monkeypatch):
    """Through the script, with a validation on the step of a checkpoint, and a cut before results.json is written."""
    options = ("trainer.max_steps=-1", "trainer.max_epochs=4", "trainer.val_check_interval=8", "hydra.run.dir=run")
    options += ("callbacks.recovery.every_n_steps=8", "callbacks=early_stopping", "resume=auto")
    for folder, cuts in (("cut", [12, 30]), ("straight", [])):
        (tmp_path / folder).mkdir()
        for event in [*cuts, 0]:
            with monkeypatch.context() as patch:
                patch.setattr("fgtrain.runs.build.StepProgress", lambda event=event: KillFirst(event))
                if event:
                    with pytest.raises(Killed):
                        train(tmp_path / folder, *options)
                else:
                    status, _, err = train(tmp_path / folder, *options)
                    assert status == 0, err
    (found,), (expected,) = results_under(tmp_path / "cut"), results_under(tmp_path / "straight")
    for results in (found, expected):
        for name in ("train_seconds", "step_ms_median", "peak_memory_mib"):
            del results[name]
        del results["metrics"]["train/step_ms"]
    assert found == expected
    assert {"val/loss", "train/loss", "test/acc"} <= found["metrics"].keys()


class Jittered(TensorDataset):
    """Examples with noise, which a worker draws."""

    def __getitem__(self, index):
        inputs, labels = super().__getitem__(index)
        return inputs + torch.randn_like(inputs), labels


class Workers(Small):
    """A loader that starts its worker once, or in every epoch."""

    persistent = True

    def train_dataloader(self):
        whole = super().train_dataloader()
        examples = Jittered(whole.inputs, whole.labels)
        return DataLoader(examples, 8, shuffle=True, num_workers=1, persistent_workers=self.persistent)


@pytest.mark.slow
def test_random_numbers_of_workers(monkeypatch):
    """They continue exactly, or a line says that they do not."""
    plan = Plan({"max_epochs": 2}, validate={"limit_val_batches": 0}, save_every=5, cuts=((14, True),))
    with pytest.warns(UserWarning, match="persistent_workers=False avoids it"):
        outcome(plan, Workers)
    monkeypatch.setattr(Workers, "persistent", False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_exact(plan, Workers)
    assert not [w for w in caught if "persistent_workers=False avoids" in str(w.message)]
