"""Estimators and what writes their gradients."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from fgtrain import (
    FDFA,
    ActivityPerturbation,
    Backprop,
    CheckpointedBackprop,
    ForwardExact,
    ForwardGradient,
    ForwardInTime,
    Highway,
    LocalGuess,
    LocalLosses,
    LowRank,
    Normal,
    write_grads,
)
from fgtrain.errors import DivergenceError, LossError, UnsupportedOperation
from fgtrain.models import DiagonalRNN, Residual
from fgtrain.tasks import Points, Rosenbrock
from tests import properties
from tests.cases import CASES, INPUTS, LABELS, Case
from tests.properties import estimated_grads, exact_grads, flat


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_projection_on_the_whole_space_is_the_gradient(case):
    gradient = exact_grads(case)
    estimator = ForwardGradient(Normal(), flat(gradient).numel(), combine="projection")
    torch.testing.assert_close(flat(estimated_grads(estimator, case)), flat(gradient), rtol=1e-6, atol=1e-8)


def test_projection_in_one_number():
    model, generator = nn.ParameterDict({"x": torch.tensor(3.0)}), torch.Generator().manual_seed(0)
    estimate = ForwardGradient(combine="projection")(model, lambda m: m["x"] ** 2, generator=generator)
    torch.testing.assert_close(estimate.grads["x"], torch.tensor(6.0))


def test_projection_has_the_least_error_in_the_span():
    gradient = flat(exact_grads(CASES[0]))
    errors = {
        combine: (flat(estimated_grads(ForwardGradient(Normal(), 5, combine), CASES[0])) - gradient).norm()
        for combine in ("mean", "projection")
    }
    assert errors["projection"] < min(gradient.norm(), errors["mean"])


def test_estimate_is_the_derivative_times_the_direction():
    model = CASES[0].build()
    estimate = ForwardGradient()(model, CASES[0].loss, generator=torch.Generator().manual_seed(0))
    assert estimate.directional_derivatives is not None
    direction = flat(estimate.grads) / estimate.directional_derivatives
    exact = flat(exact_grads(CASES[0])) @ direction
    torch.testing.assert_close(exact, estimate.directional_derivatives[0])


def test_derivative_is_clipped():
    free, clipped = (
        ForwardGradient(clip_derivative=clip)(
            CASES[0].build(), CASES[0].loss, generator=torch.Generator().manual_seed(0)
        )
        for clip in (None, 1e-3)
    )
    assert free.directional_derivatives is not None
    assert clipped.directional_derivatives is not None
    assert free.directional_derivatives.abs() > 1e-3
    torch.testing.assert_close(clipped.directional_derivatives, 1e-3 * free.directional_derivatives.sign())


def test_reduce_sees_the_derivatives_and_shapes_the_estimate():
    estimator, seen = ForwardGradient(num_tangents=3), []

    def double(tensor):
        seen.append(tensor.shape)
        return 2 * tensor

    plain = estimator(CASES[0].build(), CASES[0].loss, generator=torch.Generator().manual_seed(0))
    doubled = estimator(CASES[0].build(), CASES[0].loss, generator=torch.Generator().manual_seed(0), reduce=double)
    assert seen == [(3,)]
    torch.testing.assert_close(flat(doubled.grads), 2 * flat(plain.grads))


def test_ranks_average_sparse_gradients():
    """Those of an embedding with sparse=True, for optimizers such as SparseAdam."""
    model, tokens = nn.Sequential(nn.Embedding(5, 2, sparse=True), nn.Linear(2, 1)), torch.tensor([1, 3, 3])
    alone = Backprop()(model, lambda m: m(tokens).square().mean()).grads
    reduced = Backprop()(model, lambda m: m(tokens).square().mean(), reduce=lambda x: 2 * x).grads
    assert reduced["0.weight"].is_sparse
    for name, g in reduced.items():
        torch.testing.assert_close(g.to_dense(), 2 * alone[name].to_dense())


def test_reduce_sees_the_exact_gradient_of_the_last_layer_too():
    """So its derivatives and seeds alone do not make the estimate of the whole batch."""
    estimator, seen = ForwardGradient(num_tangents=3, exact_head=True), []

    def double(tensor):
        seen.append(tensor.numel())
        return 2 * tensor

    plain, doubled = (
        estimator(CASES[0].build(), CASES[0].loss, generator=torch.Generator().manual_seed(0), reduce=reduce).grads
        for reduce in (None, double)
    )
    assert sorted(seen) == [3, 4 * 3 + 3]
    properties.assert_is(doubled, properties.scaled(plain, 2))
    assert not estimator.scalar_reducible


def test_frozen_parameters_are_left_out():
    model = CASES[0].build()
    model[0].requires_grad_(False)
    for estimator in (Backprop(), ForwardGradient()):
        assert set(estimator(model, CASES[0].loss).grads) == {"2.weight", "2.bias"}


def test_model_without_trainable_parameters():
    for estimator in (Backprop(), ForwardGradient()):
        with pytest.raises(ValueError, match="ReLU has no parameter with requires_grad=True: nothing to train"):
            estimator(nn.ReLU(), lambda m: m(torch.ones(1)))


def test_without_generator_the_global_seed_decides_and_is_not_consumed():
    torch.manual_seed(11)
    state = torch.get_rng_state()
    estimator = ForwardGradient()
    first, second = (flat(estimator(CASES[0].build(), CASES[0].loss).grads) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(flat(ForwardGradient()(CASES[0].build(), CASES[0].loss).grads), first)


def test_rows_are_problems_of_their_own():
    task = Rosenbrock(starts=3, start="domain", dim=4)
    torch.manual_seed(0)
    model = Points(task)
    estimator = ForwardGradient(num_tangents=2, rowwise=True)
    estimate = estimator(model, lambda m: task.losses(m, None), generator=torch.Generator().manual_seed(0))
    exact = Backprop()(model, lambda m: task.losses(m, None)).grads["points"]
    assert estimate.directional_derivatives is not None
    d = estimate.directional_derivatives.view(2, 3)
    # g_i = (1/K) sum_k d_ki v_ki, d_ki = g_i . v_ki: the inner product with the exact row is a sum of squares
    torch.testing.assert_close((estimate.grads["points"] * exact).sum(1), d.square().mean(0))


def test_accumulated_gradients_add_up():
    model = CASES[0].build()
    grads = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    write_grads(model, grads)
    write_grads(model, {name: 2 * g for name, g in grads.items()}, accumulate=True)
    assert all(bool((p.grad == 3).all()) for p in model.parameters())
    write_grads(model, {"0.bias": torch.ones(4, dtype=torch.float64)})
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["0.bias"]


DTYPES = torch.float16, torch.float32, torch.float64


@pytest.mark.parametrize("dtypes", [*itertools.permutations(DTYPES, 2)], ids=str)
def test_gradients_of_several_dtypes_are_written(dtypes):
    """Their norms are finite in single precision, but one of them is not in half."""
    model = nn.ParameterDict({dtype_name(dtype): torch.zeros(2, dtype=dtype) for dtype in dtypes})
    grads = {name: torch.full_like(p, 6e4) for name, p in model.items()}
    write_grads(model, grads)
    assert all(p.grad is grads[name] for name, p in model.items())
    grads[dtype_name(dtypes[1])][0] = torch.nan
    with pytest.raises(DivergenceError, match=f"the gradient of '{dtype_name(dtypes[1])}' is not finite"):
        write_grads(model, grads)


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def test_gradients_of_another_model_are_not_written():
    model, bias = CASES[0].build(), torch.ones(4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"^gradients for net.0.bias, which the model's named_parameters\(\) do not"):
        write_grads(model, {"net.0.bias": bias, "0.bias": bias})
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_tangents": 0}, "num_tangents must be an integer of at least 1, got 0"),
        ({"num_tangents": -1}, "got -1"),
        ({"num_tangents": 1.5}, "got 1.5"),
        ({"num_tangents": True}, "got True"),
        ({"combine": "sum"}, "combine must be one of mean, projection, got 'sum'"),
        ({"tangents": "normal"}, r"tangents must be a law of directions such as Normal\(\), got 'normal'"),
        ({"clip_derivative": 0.0}, "clip_derivative must be positive or None, got 0.0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ForwardGradient(**arguments)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("options", [{}, {"combine": "projection"}, {"tangents": LowRank(2)}], ids=str)
def test_chunks_change_nothing(case, options):
    whole, chunked = (
        estimated_grads(ForwardGradient(num_tangents=5, chunk_size=size, **options), case) for size in (None, 2)
    )
    torch.testing.assert_close(flat(whole), flat(chunked), rtol=1e-7, atol=1e-9)
    properties.assert_leaves_no_trace(ForwardGradient(num_tangents=5, chunk_size=2, **options), case)


def test_exact_head_that_is_the_whole_model():
    case = Case("linear", lambda: torch.nn.Linear(3, 3), CASES[0].loss)
    estimate = estimated_grads(ForwardGradient(num_tangents=4, exact_head=True), case)
    torch.testing.assert_close(flat(estimate), flat(exact_grads(case)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_head_under_autocast(dtype):
    model, loss = CASES[0].build().float(), lambda m: F.cross_entropy(m(INPUTS.float()), LABELS, reduction="none")
    exact = Backprop()(model, loss).grads
    with torch.autocast("cpu", dtype):
        found = ForwardGradient(exact_head=True)(model, loss).grads
    for name in ("2.weight", "2.bias"):
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name], exact[name], rtol=0.05, atol=0.01)  # half precision has 8 bits


@pytest.mark.parametrize("options", [{"chunk_size": 0}, {"exact_head": True, "rowwise": True}], ids=str)
def test_options_that_cannot_be(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        ForwardGradient(**options)


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3)).double()


def of_rows(model):
    return F.cross_entropy(model(INPUTS), LABELS, reduction="none")


def of_stream(model):
    return model(torch.tensor([[0, 1, 1]])).square().sum()


KEEPING = pytest.mark.parametrize(
    ("make", "build", "loss"),
    [
        (LocalLosses, network, of_rows),
        (LocalGuess, network, of_rows),
        (FDFA, network, of_rows),
        (ForwardInTime, lambda: DiagonalRNN(2, width=3), of_stream),
    ],
    ids=["local", "local_guess", "fdfa", "forward_in_time"],
)


@KEEPING
def test_the_state_of_a_model_serves_no_other(make, build, loss):
    estimator, first, second = make(), build(), build()
    estimator(first, loss)
    with pytest.raises(UnsupportedOperation, match=r"keeps the .* of the model that it was called with before"):
        estimator(second, loss)
    estimator(nn.Sequential(*first) if isinstance(first, nn.Sequential) else first, loss)  # the same parameters
    estimator.load_state_dict(make().state_dict(), strict=False)
    estimator(second, loss)


@KEEPING
def test_a_copy_of_the_estimator_serves_a_copy_of_the_model(make, build, loss):
    pair = build(), make()
    pair[1](pair[0], loss)
    copied = copy.deepcopy(pair)
    found, expected = (
        estimator(model, loss, generator=torch.Generator().manual_seed(1)).grads for model, estimator in (copied, pair)
    )
    assert torch.equal(flat(found), flat(expected))


def test_local_losses_by_the_tail_keep_nothing():
    estimator, build = LocalLosses(head="tail"), lambda: nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)]).double()
    for model in (build(), build()):
        estimator(model, of_rows)


def residual():
    return nn.Sequential(nn.Linear(3, 4), Residual(nn.Linear(4, 4)), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("estimator", [Highway(ActivityPerturbation()), FDFA(), LocalLosses()], ids=str)
def test_an_empty_batch_is_one_line(estimator):
    with pytest.raises(LossError, match=r"needs (an example|a row), but [^\n]*$"):
        estimator(residual(), lambda m: m(INPUTS[:0]).square().sum())


@pytest.mark.parametrize(
    "estimator",
    [Backprop(), CheckpointedBackprop(), Highway(), Highway(ActivityPerturbation()), LocalGuess()],
    ids=str,
)
def test_inputs_of_inference_mode_are_named(estimator):
    with torch.inference_mode():
        inputs = INPUTS.clone()
    with pytest.raises(UnsupportedOperation, match=r"made in torch.inference_mode\(\), [^\n]* clone them first$"):
        estimator(residual(), lambda m: F.cross_entropy(m(inputs), LABELS, reduction="none"))


@pytest.mark.parametrize("estimator", [CheckpointedBackprop(), Highway(), Highway(ForwardExact())], ids=str)
def test_other_parameters_by_functional_call_are_named(estimator):
    def loss(m):
        return functional_call(m, {name: 2 * p for name, p in m.named_parameters()}, (INPUTS,)).square().sum(1)

    with pytest.raises(UnsupportedOperation, match=r"torch.func.functional_call[^\n]*Backprop$"):
        estimator(residual(), loss)


class Reentrant(nn.Sequential):
    """Activation checkpointing as PyTorch had it first, and Hugging Face's models still have it."""

    def forward(self, input):  # noqa: A002 - the name of nn.Sequential
        return checkpoint(super().forward, input, use_reentrant=True)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("estimator", [Backprop(), CheckpointedBackprop(), ForwardExact(), Highway()], ids=str)
def test_reentrant_checkpoints_hide_no_parameter(estimator, needs_grad):
    def model(kind):
        torch.manual_seed(0)
        return nn.Sequential(kind(nn.Linear(3, 4), nn.Tanh()), Residual(kind(nn.Linear(4, 4))), nn.Linear(4, 3))

    def losses(m):
        return F.cross_entropy(m(INPUTS.clone().requires_grad_(needs_grad)), LABELS, reduction="none")

    expected = Backprop()(model(nn.Sequential), losses).grads
    torch.testing.assert_close(estimator(model(Reentrant), losses).grads, expected)


class Hidden(torch.autograd.Function):
    """Calls a module, whose parameters no engine sees."""

    @staticmethod
    def forward(ctx, module, x):
        ctx.module = module
        ctx.save_for_backward(x)
        return module(x.detach())

    @staticmethod
    def backward(ctx, *grads):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.module(x)
        torch.autograd.backward(out, grads[0])
        return None, x.grad


@pytest.mark.parametrize("estimator", [Backprop(), ForwardGradient()], ids=str)
def test_a_function_that_hides_parameters_is_refused(estimator):
    first, hidden, last = nn.Linear(3, 3).double(), nn.Linear(3, 4).double(), nn.Linear(4, 3).double()
    model = nn.ModuleList([first, hidden, last])
    with pytest.raises(UnsupportedOperation, match=r"a custom autograd\.Function (calls backward|without jvp)"):
        estimator(model, lambda _: last(Hidden.apply(hidden, first(INPUTS))).square().sum(1))


@pytest.mark.parametrize("estimator", [Backprop(), Highway()], ids=str)
def test_a_residual_block_that_hides_parameters_is_refused(estimator):
    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.last = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return x + self.last(Hidden.apply(self.hidden, x))

    model = nn.Sequential(nn.Linear(3, 3), Hiding(), Residual(nn.Linear(3, 3))).double()
    with pytest.raises(UnsupportedOperation, match=r"a custom autograd\.Function calls backward inside"):
        estimator(model, lambda m: m(INPUTS).square().sum(1))


def test_a_function_that_hides_none_is_taken():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 2 * x

        @staticmethod
        def backward(ctx, *grads):
            return 2 * grads[0]

    model = nn.ModuleList([nn.Linear(3, 4).double(), nn.Linear(2, 2).double()])
    estimate = Backprop()(model, lambda m: Double.apply(m[0](INPUTS)).sum(1))
    assert estimate.grads.keys() == {"0.weight", "0.bias"}
