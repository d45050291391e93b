import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fgtrain import Backprop, CheckpointedBackprop
from fgtrain.errors import UnsupportedOperation
from fgtrain.network.repeated_steps import repeat
from fgtrain.studies.benchmarks.methods import methods_of
from fgtrain.studies.benchmarks.steps import measure


class Residual(nn.Module):
    """A block with a norm, Dropout and an in-place activation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Dropout(0.5))

    def forward(self, x):
        return x + self.body(x)


class Listed(nn.Module):
    """Blocks in a ModuleList, called with a keyword."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        padding = torch.zeros(1, len(x), dtype=torch.bool)
        return self.head(self.encoder(x[None], src_key_padding_mask=padding))


def repeated():
    """One layer, one activation and one chain, each called more than once."""
    layer, act = nn.Linear(4, 4), nn.ReLU()
    chain = nn.Sequential(layer, nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(4, 4), act, layer, act, chain, chain, nn.Linear(4, 1))


class ListedTwice(nn.Module):
    """A list that holds one block twice, and one chain that two modules own."""

    def __init__(self):
        super().__init__()
        block, chain = Residual(), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.blocks = nn.ModuleList([block, Residual(), block])
        self.left, self.right = nn.ModuleDict({"a": chain}), nn.ModuleDict({"a": chain})

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.left["a"](self.right["a"](x))


class InPlace(nn.Module):
    """Has a chain that changes its input, which is used afterwards."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.head = nn.Sequential(nn.Dropout(0.3, inplace=True), nn.ReLU(inplace=True), *(Residual() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x) * 1
        return self.head(hidden) + hidden


MODELS = {
    "a chain that starts in place": InPlace,
    "repetitions": repeated,
    "repetitions in a list": ListedTwice,
    "nested chains": lambda: nn.Sequential(
        nn.Flatten(), nn.Sequential(Residual(), nn.Tanh(), Residual()), nn.Sequential(Residual(), nn.Linear(4, 1))
    ),
    "chains within a module": lambda: nn.ModuleDict({"0": nn.Sequential(*(Residual() for _ in range(5)))}),
    "a list": Listed,
    "statistics in use": lambda: nn.Sequential(*(Residual() for _ in range(5))).eval(),
}
INPUTS = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


def loss(model):
    return (model["0"] if isinstance(model, nn.ModuleDict) else model)(INPUTS).square().mean()


@pytest.mark.parametrize("name", MODELS)
def test_equals_backprop_bit_for_bit(name):
    outcomes = []
    for estimator in (Backprop(), CheckpointedBackprop()):
        torch.manual_seed(0)
        model = MODELS[name]()
        grads = estimator(model, loss).grads
        outcomes.append({**grads, **dict(model.named_buffers()), "random state": torch.get_rng_state()})
        assert all("forward" not in module.__dict__ for module in model.modules())
    assert outcomes[0].keys() == outcomes[1].keys()
    for key, value in outcomes[0].items():
        assert torch.equal(value, outcomes[1][key]), key


@pytest.mark.slow
def test_stores_about_the_square_root():
    """24 layers need 24 activations, or five between the segments and five in one of them; the gradients are small."""
    batch = 1024
    methods = methods_of(["backprop_checkpoint"], [], [])
    rows = measure("deep24", batch, methods, torch.device("cpu"), rounds=1)
    activation = batch * 256 * 4 / 2**20
    peaks = {row.method: row.peak_mib / activation for row in rows}
    assert peaks["backprop"] >= 24
    assert peaks["backprop_checkpoint"] <= 2 * math.sqrt(24) + 3


def test_module_without_a_chain_is_trained_and_told(caplog):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    model = Plain()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            CheckpointedBackprop()(model, loss)
    assert caplog.messages == ["Plain has no nn.Sequential or nn.ModuleList to checkpoint: memory is that of Backprop"]


def test_changed_input_is_refused():
    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x.mul_(2) * self.scale

    model = nn.Sequential(nn.Linear(4, 4), Doubled())
    with pytest.raises(UnsupportedOperation, match="Doubled changes its input in place, so it cannot be run again"):
        CheckpointedBackprop()(model, loss)


class Cached(nn.Module):
    """A block that stores its result and returns it from then on."""

    def __init__(self):
        super().__init__()
        self.layer, self.known = nn.Linear(3, 3), None

    def forward(self, x):
        if self.known is None:
            self.known = torch.tanh(self.layer(x))
        return self.known * 2


def test_a_block_that_computes_something_else_when_it_runs_again_is_refused():
    model = nn.ModuleList([Cached()])
    with pytest.raises(
        UnsupportedOperation, match=r"^a block or a step of ModuleList computes something else when it runs again"
    ):
        CheckpointedBackprop()(model, lambda m: m[0](torch.ones(2, 3)).sum())


class Noisy(nn.Module):
    """A block with a random generator of its own."""

    def __init__(self):
        super().__init__()
        self.layer, self.generator = nn.Linear(4, 4), torch.Generator()

    def forward(self, x):
        return self.layer(x) * torch.rand(4, generator=self.generator)


@pytest.mark.parametrize(
    ("model", "run"),
    [
        (nn.Sequential(Noisy(), nn.Linear(4, 1)), lambda model: model(INPUTS)),
        (nn.ModuleList([Noisy()]), lambda model: model[0](INPUTS)),
        (Noisy(), lambda model: repeat(model, INPUTS, 3)),
    ],
    ids=["chain", "list", "steps"],
)
def test_random_numbers_that_differ_in_the_second_run_are_refused(model, run):
    with pytest.raises(UnsupportedOperation, match=r"has its own random generator, [^\n]*; train with Backprop$"):
        CheckpointedBackprop()(model, lambda m: run(m).sum())


def test_a_step_that_ends_in_nan_is_not_taken_for_another():
    model = nn.Linear(4, 4)
    estimate = CheckpointedBackprop()(model, lambda m: repeat(lambda y: m(y) / 0, INPUTS, 3).sum())
    assert not estimate.loss.isfinite()


@pytest.mark.parametrize("warm", [True, False])
def test_compiled_models_are_checkpointed_as_they_were_written(warm):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)))
    compiled: Any = torch.compile(model, backend="eager")
    inputs = torch.randn(3, 4)
    if warm:
        compiled(inputs)
    grads = CheckpointedBackprop()(compiled, lambda m: m(inputs).square().mean()).grads
    exact = Backprop()(model, lambda m: m(inputs).square().mean()).grads
    assert {name.removeprefix("_orig_mod."): g.tolist() for name, g in grads.items()} == {
        name: g.tolist() for name, g in exact.items()
    }
