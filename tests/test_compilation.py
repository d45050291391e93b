"""compile=true changes only the time of a run."""

import copy
import re
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fgtrain import Backprop, ForwardGradient, LowRank, Normal
from fgtrain.errors import ConfigError, LossError
from fgtrain.forward_ad import _Engines, jvp, stacked
from fgtrain.forward_ad.compiled import CompiledPass
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.lightning.callbacks import FirstBatch, SelfCheck
from fgtrain.network.compilation import compile_model
from fgtrain.network.parameters import slots_of
from tests.cases import CASES
from tests.commands import results_under, train
from tests.conditions import compiles
from tests.coverage_layers import PENALTIES, chain, named
from tests.derivatives import COVERAGE, InTurn, assert_derivatives
from tests.small import Small, make, trainer


@pytest.fixture
def fresh():
    """Start without what this process has compiled, and restore all changes."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("method", ["backprop", "fwdgrad", "spsa", "activity", "backprop_checkpoint"])
def test_same_numbers_through_the_script(method, fresh, tmp_path, monkeypatch):
    source = """
from torch import nn


class DropoutNet(nn.Sequential):
    def __init__(self, num_classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, num_classes))
"""
    (tmp_path / "dropout_net.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for flag in ("false", "true"):
        options = ["model._target_=dropout_net.DropoutNet", "trainer.max_steps=20", "trainer.val_check_interval=10"]
        status, _, err = train(
            tmp_path, f"method={method}", f"compile={flag}", f"hydra.run.dir=compile_{flag}", *options
        )
        assert status == 0, err
        (results,) = results_under(tmp_path / f"compile_{flag}")
        found.append(results["metrics"])
    plain, compiled = found
    for name in ("train/loss", "val/loss", "test/loss"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-5), name


@pytest.mark.slow
def test_without_a_compiler_it_is_one_line(fresh):
    with (
        inductor.patch({"cpp.cxx": ("no_such_compiler",)}),
        pytest.raises(ConfigError, match=r"^compile=true: torch.compile fails here.*use compile=false$"),
    ):
        compile_model(nn.Linear(2, 2), torch.device("cpu"))


# --- passes that carry tangents ------------------------------------------------------------------------------------


def run_as_it_is(graph, inputs):
    """Replaces Inductor, since only the tracing of a pass is tested."""
    return graph


def derivatives_of(engine):
    def found(model, loss, tangents):
        losses, derivatives = engine(model, loss, tangents)
        return losses, derivatives if losses.dim() == 0 else derivatives.mean(1)

    return found


UNSUITABLE = {
    "RReLU(lower=0.125, upper=0.3333333333333333)",
    "FractionalMaxPool2d()",
    "AlphaDropout(p=0.3, inplace=False)",
    "FeatureAlphaDropout(p=0.3, inplace=False)",
    "x[...] = y of a plain tensor",
    "two parameters in a plain tensor",
    "indices",
    "loss: gaussian nll",
    "filled at random",
    "segment_reduce",
    "fake_quantize",
    "fake_quantize by channel",
    "gamma distribution",
    "zeta",
    *(case.name for case in PENALTIES),
}
"""Passes that are refused and then run uncompiled: with repeated random numbers, with sizes that depend on values, that
write into tensors without tangents, with functions that have no forward mode, and with losses that take derivatives
themselves."""


@pytest.mark.slow
@pytest.mark.parametrize("case", [*CASES, *COVERAGE], ids=lambda case: case.name)
def test_what_is_traced_is_the_derivative_or_refused(case):
    refused = case.name in UNSUITABLE or re.search(r"\b(RNN|GRU|LSTM)\b|momentum=None.*\)$", case.name) is not None
    with pytest.raises(UnsupportedByEngine) if refused else nullcontext():
        directions = [(LowRank(1), 3), (InTurn(in_order=True), 2)]
        assert_derivatives(case, directions, derivatives_of(CompiledPass(run_as_it_is)))


@pytest.mark.slow
@pytest.mark.parametrize("layer", [nn.LayerNorm([4, 5, 5]), nn.GroupNorm(2, 4), nn.InstanceNorm2d(4, affine=True)])
@pytest.mark.parametrize("moved", ["weight", "bias"])
def test_one_parameter_of_a_norm_moves_alone(layer, moved):
    model, x = layer.double(), torch.randn(3, 4, 5, 5, dtype=torch.float64)
    tangent = torch.randn(2, *getattr(model, moved).shape, dtype=torch.float64)

    def loss(m):
        return m(x).flatten(1).square().sum(1)

    (gradient,) = torch.autograd.grad(loss(model).mean(), [getattr(model, moved)])
    expected = (tangent * gradient).flatten(1).sum(1)
    for engine in (stacked.jvp, CompiledPass(run_as_it_is)):
        torch.testing.assert_close(derivatives_of(engine)(model, loss, {moved: tangent})[1], expected)


@pytest.mark.slow
def test_a_refused_pass_leaves_checkpointing_as_it_was():
    case = next(case for case in PENALTIES if case.name == "slope by func.vjp")
    model = case.build()
    with pytest.raises(UnsupportedByEngine):
        CompiledPass(run_as_it_is)(model, case.loss, Normal().sample(dict(model.named_parameters()), [0]))
    checkpoint(model, torch.ones(2, 5, dtype=torch.float64), use_reentrant=False).sum().backward()


def compiled_cases():
    layer = nn.TransformerEncoderLayer
    rows, images = torch.randn(4, 6, 8, dtype=torch.float64), torch.randn(4, 3, 8, 8, dtype=torch.float64)
    yield named("encoder", lambda: layer(8, 2, 16, dropout=0.3, batch_first=True), lambda m: m(rows))
    convolutional = [lambda: nn.Conv2d(3, 4, 3, padding=1), lambda: nn.BatchNorm2d(4), lambda: nn.ReLU(inplace=True)]
    rest = [lambda: nn.MaxPool2d(2), nn.Flatten, lambda: nn.Dropout(0.3), lambda: nn.Linear(64, 5)]
    yield chain("convolutional", images, *convolutional, *rest)


@compiles
@pytest.mark.slow
@pytest.mark.parametrize("case", list(compiled_cases()), ids=lambda case: case.name)
def test_compiled_derivatives(case, fresh):
    assert_derivatives(case, [(LowRank(1), 1), (Normal(), 3)], derivatives_of(CompiledPass()))


@compiles
@pytest.mark.slow
def test_a_compiled_model_has_compiled_derivatives(fresh, caplog):
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
    model = copy.deepcopy(plain)
    model.compile()
    x, found = torch.randn(3, 5), []
    for each in (plain, model):
        generator = torch.Generator().manual_seed(0)
        estimate = ForwardGradient(LowRank(1))(each, lambda m: m(x).square().sum(1), generator=generator)
        found.append((estimate.loss, dict(estimate.grads)))
    torch.testing.assert_close(*found)
    assert [plan.first for plan in slots_of(model).cached(_Engines, dict)._plans.values()] == [0]
    assert not [record for record in caplog.records if record.name.startswith("fgtrain")]


class Positive(nn.Module):
    """Adds the sum of the positive numbers."""

    def forward(self, x):
        return x + x[x > 0].sum()


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.RReLU(), "random numbers that must be the same for every direction"),
        (nn.AlphaDropout(0.5), "random numbers that must be the same for every direction"),
        (Positive(), "Could not guard on data-dependent expression"),
    ],
)
def test_what_cannot_be_compiled_runs_as_it_is_written(layer, reason, caplog, capfd):
    model = nn.Sequential(nn.Linear(5, 4), layer, nn.Linear(4, 2))
    tangents = LowRank().sample(dict(model.named_parameters()), [0, 1])
    x, found = torch.randn(3, 5), []
    for _ in range(2):
        torch.manual_seed(0)
        found.append(jvp(model, lambda m: m(x).square().sum(1), tangents))
        model.compile()
    torch.testing.assert_close(*found)
    assert f"the derivatives of Sequential are computed uncompiled: {reason}" in caplog.text
    assert "Traceback" not in capfd.readouterr().err


def test_a_compiler_that_errs_is_not_used(monkeypatch, caplog):
    def wrong(graph, inputs, options):
        return lambda *tensors: [2 * x for x in graph(*tensors)]

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    model = nn.Sequential(nn.Linear(5, 2))
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    x = torch.randn(3, 5)
    for _ in range(4):  # it is tried again in the third pass
        found = jvp(model, lambda m: m(x).square().sum(1), tangents)
        torch.testing.assert_close(found, stacked.jvp(model, lambda m: m(x).square().sum(1), tangents))
    assert "computed uncompiled: the compiled derivatives differ" in caplog.text


def test_rounding_in_half_precision_is_no_error_of_the_compiler(monkeypatch, caplog):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: lambda *x: graph(*_rounded(x)))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)), torch.randn(32, 6)
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])

    def loss(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return m(x).float().square().sum(1)

    jvp(model, loss, tangents)
    assert "the compiled derivatives differ" not in caplog.text
    assert [plan.first for plan in slots_of(model).cached(_Engines, dict)._plans.values()] == [0]


def _rounded(tensors):
    return [x.bfloat16().float() if x.dtype == torch.float32 else x for x in tensors]


def test_a_loss_of_nan_neither_confirms_nor_refuses_the_compiler(monkeypatch, caplog):
    def wrong(graph, inputs, options):
        return lambda *tensors: [2 * x for x in graph(*tensors)]

    monkeypatch.setattr(torch._inductor, "compile", wrong)
    model, x = nn.Sequential(nn.Linear(5, 2)), torch.full((3, 5), torch.nan)
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    assert jvp(model, lambda m: m(x).square().sum(1), tangents)[0].isnan().all()
    assert "differ" not in caplog.text
    x.fill_(1)
    found = jvp(model, lambda m: m(x).square().sum(1), tangents)
    torch.testing.assert_close(found, stacked.jvp(model, lambda m: m(x).square().sum(1), tangents))
    assert "computed uncompiled: the compiled derivatives differ" in caplog.text


@pytest.mark.parametrize(("error", "is_used"), [(1e-7, True), (1e-3, False)])
def test_a_rounding_error_that_decides_a_comparison_is_no_error_of_the_compiler(error, is_used, monkeypatch, caplog):
    def rounds_differently(graph, inputs, options):
        return lambda *tensors: graph(*[x * (1 + error) if x.shape == (64, 20) else x for x in tensors])

    monkeypatch.setattr(torch._inductor, "compile", rounds_differently)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 2)), torch.randn(64, 20)
    with torch.no_grad():
        model[0].bias -= model[0](x)[0]  # the first example's activations are 0, but for rounding errors
    model[2].bias.requires_grad_(False)  # it may have a direction, too
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    expected = stacked.jvp(model, lambda m: m(x).square().sum(1), tangents)
    model.compile()
    torch.testing.assert_close(jvp(model, lambda m: m(x).square().sum(1), tangents), expected, rtol=0, atol=0)
    assert [plan.first for plan in slots_of(model).cached(_Engines, dict)._plans.values()] == [0 if is_used else 1]
    assert ("the compiled derivatives differ" in caplog.text) != is_used


class CallsCounted(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.calls = nn.Linear(3, 2), 0

    def forward(self, x):
        self.calls += 1
        return self.calls * self.linear(x)


@pytest.mark.slow
def test_a_pass_that_is_compiled_again_counts_once(monkeypatch):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    plain, x = CallsCounted(), torch.randn(5, 3)
    model = copy.deepcopy(plain)
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    for num_calls in range(1, 12):  # after eight versions, the passes run uncompiled
        found = [jvp(each, lambda m: m(x).square().sum(1), tangents) for each in (plain, model)]
        torch.testing.assert_close(*found)
        assert plain.calls == model.calls == num_calls


def test_a_mistake_in_a_compiled_model_is_reported_once(capfd):
    model = nn.Sequential(nn.Linear(5, 2))
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        jvp(model, lambda m: m(torch.ones(3, 4)).sum(1), tangents)
    assert "Traceback" not in capfd.readouterr().err


def test_without_the_compiler_as_the_user_asked(caplog):
    model, x = nn.Sequential(nn.Linear(5, 2)), torch.randn(3, 5)
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with torch.compiler.set_stance("force_eager"):
        found = jvp(model, lambda m: m(x).square().sum(1), tangents)
    torch.testing.assert_close(found, stacked.jvp(model, lambda m: m(x).square().sum(1), tangents))
    assert not caplog.records


@pytest.mark.skipif(torch.__version__ < "2.14", reason="PyTorch does not compile modules of its own alone")
def test_only_whole_batches_are_compiled(tmp_path):
    sizes = []

    def compiler(graph, inputs):
        sizes.extend(len(x) for x in inputs if isinstance(x, torch.Tensor) and x.shape[1:] == (1, 2, 2))
        return graph

    module = make(Backprop())
    module.model.compile(backend=compiler)
    trainer(tmp_path, FirstBatch(), SelfCheck(examples=3), max_steps=2).fit(module, Small())
    assert set(sizes) == {8, 16}  # of training and validation


@pytest.mark.slow
def test_batches_of_ever_other_shapes_are_not_compiled_for_ever(monkeypatch, caplog):
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, inputs, options: graph)
    model = nn.Sequential(nn.Linear(5, 2))
    model.compile()
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    for rows in range(2, 14):
        x = torch.randn(rows, 5)
        found = jvp(model, lambda m, x=x: m(x).square().sum(1), tangents)
        torch.testing.assert_close(found, stacked.jvp(model, lambda m, x=x: m(x).square().sum(1), tangents))
    assert caplog.text.count("are computed uncompiled") == 1


@pytest.mark.slow
def test_another_batch_mode_or_constant_is_traced_anew():
    engine, model = CompiledPass(run_as_it_is), nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5), nn.Linear(3, 2))
    tangents = LowRank().sample(dict(model.named_parameters()), [0, 1])
    for rows, factor, training in [(6, 1.0, True), (4, 1.0, True), (4, 2.0, True), (4, 2.0, False), (6, 1.0, True)]:
        model.train(training)
        x = torch.randn(rows, 5)

        def loss(m, x=x, factor=factor):
            return factor * m(x).square().sum(1)

        found = []
        for derive in (engine, stacked.jvp):
            torch.manual_seed(0)
            found.append(derive(model, loss, tangents))
        torch.testing.assert_close(*found)


class Scaled:
    def __init__(self, factor, x):
        self.factor, self.x = factor, x

    def losses(self, m):
        return self.factor * m(self.x).sum(1)


def ways_to_hold(factor, x):
    """Losses that are the same code with another number in it."""
    yield lambda m: factor * m(x).sum(1)
    yield lambda m, factor=factor: factor * m(x).sum(1)
    yield lambda m, *, factor=factor: factor * m(x).sum(1)
    yield partial(lambda m, factor: factor * m(x).sum(1), factor=factor)
    yield partial(lambda factor, m: factor * m(x).sum(1), factor)
    yield Scaled(factor, x).losses
    held = [factor]
    yield lambda m: held[0] * m(x).sum(1)
    squash = torch.relu if factor == 1.0 else torch.sigmoid
    yield lambda m: squash(m(x)).sum(1)


@pytest.mark.parametrize("way", range(8))
def test_a_loss_with_another_number_in_it_is_another_loss(way):
    engine, model, x = CompiledPass(run_as_it_is), nn.Linear(5, 3), torch.randn(4, 5)
    tangents = LowRank().sample(dict(model.named_parameters()), [0])
    for factor in (1.0, 2.0, 1.0):
        loss = list(ways_to_hold(factor, x))[way]
        torch.testing.assert_close(engine(model, loss, tangents), stacked.jvp(model, loss, tangents))


def test_parameters_are_found_wherever_they_are():
    engine, x = CompiledPass(run_as_it_is), torch.randn(3, 4)
    kept = []

    def loss(m):
        hidden = m[0](x)
        kept.append(hidden)
        return F.linear(hidden, m[0].weight).square().sum(1) + m[1](x).sum(1)

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].requires_grad_(False)
    for _ in range(2):
        tangents = LowRank().sample({n: p for n, p in model.named_parameters() if p.requires_grad}, [0, 1])
        torch.testing.assert_close(engine(model, loss, tangents), stacked.jvp(model, loss, tangents))
        assert type(kept[-2]) is torch.Tensor  # what the loss gives away is the value
        model[0].weight = nn.Parameter(torch.randn(4, 4))
    other = copy.deepcopy(model)
    tangents = Normal().sample({n: p for n, p in other.named_parameters() if p.requires_grad}, [3])
    torch.testing.assert_close(engine(other, loss, tangents), stacked.jvp(other, loss, tangents))


def test_a_loss_without_a_derivative_is_an_error():
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    tangents = Normal().sample(dict(model.named_parameters()), [0])
    with pytest.raises(LossError, match="carries no tangent"):
        CompiledPass(run_as_it_is)(model, lambda m: m(x).detach().sum(1), tangents)
