"""What models that nobody here wrote do: right, or refused by one line that names the cause."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from fgtrain import (
    FDFA,
    SPSA,
    ActivityPerturbation,
    Backprop,
    CheckpointedBackprop,
    ForwardExact,
    ForwardGradient,
    GaussNewton,
    Highway,
    LocalGuess,
    LocalLosses,
    MeZO,
    Normal,
    SecondOrder,
)
from fgtrain.errors import ModelError, UnsupportedOperation
from fgtrain.estimators.second_order import curvature_in_span
from fgtrain.models import Residual
from fgtrain.tangents.directions import dense
from tests.cases import Case
from tests.derivatives import assert_derivatives, exact_hessian, reference
from tests.properties import assert_is, flat

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ENGINES = pytest.mark.parametrize("derivatives_of", [None, reference], ids=["first", "reference"])


class Net(nn.Module):
    """Two layers and a matrix, with a function of (model, hidden) between them."""

    def __init__(self, between):
        super().__init__()
        self.a, self.b, self.w = nn.Linear(4, 4), nn.Linear(4, 3), nn.Parameter(torch.randn(4, 4))
        self.between = between

    def forward(self, x):
        return self.b(self.between(self, torch.tanh(self.a(x))))


def net(between):
    def build():
        torch.manual_seed(0)
        return Net(between).double()

    return Case("net", build, lambda m: m(X).square().sum(1))


def exact(case, derivatives_of):
    assert_derivatives(case, [(Normal(), 1), (Normal(), 3)], *([derivatives_of] if derivatives_of else []))


# --- what only a backward pass does -------------------------------------------------------------------------------


class Spectral(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x):
        return (x.to(torch.complex128) @ self.weight).abs()


WITHOUT_BACKWARD = [ForwardGradient(), ForwardExact(), SPSA(), MeZO(), GaussNewton(num_tangents=2), SecondOrder()]


@pytest.mark.parametrize("estimator", WITHOUT_BACKWARD, ids=lambda e: type(e).__name__)
def test_complex_parameters_are_refused(estimator):
    with pytest.raises(
        ModelError, match=r"^'weight' of Spectral is complex, .*view_as_complex.* or train with Backprop$"
    ):
        estimator(Spectral(), lambda m: m(X).sum(1))


def test_backprop_takes_complex_parameters():
    model = Spectral()
    found = Backprop()(model, lambda m: m(X).sum(1)).grads["weight"]
    (expected,) = torch.autograd.grad(model(X).sum(1).mean(), [model.weight])
    assert torch.equal(found, expected)


@pytest.mark.parametrize("estimator", [*WITHOUT_BACKWARD, ActivityPerturbation()], ids=lambda e: type(e).__name__)
def test_a_hook_on_a_parameter_is_refused_until_it_is_removed(estimator):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    hook = model.get_parameter("0.weight").register_hook(lambda g: 2 * g)
    with pytest.raises(
        ModelError, match=r"^'0.weight' of Sequential has a hook on its gradient, .*train with Backprop$"
    ):
        estimator(model, lambda m: m(X).square().sum(1))
    hook.remove()
    estimator(model, lambda m: m(X).square().sum(1))


@pytest.mark.parametrize(
    "register", ["register_backward_hook", "register_full_backward_hook", "register_full_backward_pre_hook"]
)
@pytest.mark.parametrize("estimator", [*WITHOUT_BACKWARD, ActivityPerturbation()], ids=lambda e: type(e).__name__)
def test_a_backward_hook_of_a_module_is_refused_until_it_is_removed(estimator, register):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    loss_fn = lambda m: m(X).square().sum(1)
    estimator(model, loss_fn)
    hook = getattr(model[1], register)(lambda *_: None)
    with pytest.raises(ModelError, match=r"^module '1' of Sequential has a backward hook, .*train with Backprop$"):
        estimator(model, loss_fn)
    hook.remove()
    estimator(model, loss_fn)


def test_a_backward_hook_of_every_module_is_refused():
    hook = nn.modules.module.register_module_full_backward_hook(lambda *_: None)
    try:
        with pytest.raises(ModelError, match=r"^every module \(torch.nn.modules.module\) has a backward hook"):
            ForwardGradient()(nn.Linear(4, 3).double(), lambda m: m(X).square().sum(1))
    finally:
        hook.remove()


@pytest.mark.parametrize("estimator", [Backprop(), *WITHOUT_BACKWARD], ids=lambda e: type(e).__name__)
def test_a_hook_after_backward_is_refused_until_it_is_removed(estimator):
    """An optimizer that steps in such a hook would never step."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    hook = model.get_parameter("0.weight").register_post_accumulate_grad_hook(lambda _: None)
    with pytest.raises(ModelError, match=r"^'0.weight' of Sequential has a hook that runs after .backward\(\)"):
        estimator(model, lambda m: m(X).square().sum(1))
    hook.remove()
    estimator(model, lambda m: m(X).square().sum(1))


def test_backprop_calls_the_hook():
    model = nn.Linear(4, 3).double()
    before = Backprop()(model, lambda m: m(X).sum(1)).grads["weight"]
    model.weight.register_hook(lambda g: 2 * g)
    assert torch.equal(Backprop()(model, lambda m: m(X).sum(1)).grads["weight"], 2 * before)


def squared(m, h):
    return torch.autograd.grad(torch.sin(h @ m.w).sum(), h, create_graph=True)[0]


def own_jvp(m, h):
    return torch.func.jvp(lambda x: torch.sin(x @ m.w), (h,), (torch.ones_like(h),))[1]


@ENGINES
def test_derivatives_inside_the_model(derivatives_of):
    exact(net(squared), derivatives_of)


@ENGINES
def test_forward_mode_inside_the_model_is_named(derivatives_of):
    cause = "forward-mode AD of its own"
    with pytest.raises(UnsupportedOperation, match=rf"^the model \(Net\) uses {cause}, which has no forward-mode"):
        exact(net(own_jvp), derivatives_of)


def own_vjp(m, h):
    (slope,) = torch.func.vjp(lambda x: torch.sin(x @ m.w), h)[1](torch.ones_like(h))
    return slope


def test_what_is_advised_instead_of_a_jvp_inside_the_model():
    with pytest.raises(UnsupportedOperation, match=r"call torch\.func\.vjp, grad or jacrev instead of jvp and jacfwd"):
        exact(net(own_jvp), None)
    exact(net(own_vjp), None)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
def test_nested_tensors_are_constants_as_for_backpropagation():
    """`nested_tensor` copies what it is given; `as_nested_tensor` is refused by name."""
    exact(net(lambda m, h: h + torch.nested.nested_tensor([h[:1], h[1:]]).to_padded_tensor(0.0).sum()), reference)


@ENGINES
def test_a_full_backward_hook_is_named(derivatives_of):
    case = net(lambda m, h: h)
    model = case.build()
    model.b.register_full_backward_hook(lambda *_: None)
    hooked = Case("hooked", lambda: model, case.loss)
    with pytest.raises(UnsupportedOperation, match=r"^module 'b' \(Linear\) uses a full backward hook, which has no"):
        exact(hooked, derivatives_of)


SPOKEN = torch.tensor([[1, 2], [2, 2], [2, 1], [1, 0]])  # the last has one letter


@ENGINES
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("count", [torch.tensor, tuple])
def test_ctc_loss(reduction, count, derivatives_of):
    def loss(m):
        scores = m(X).view(5, 1, 3) * torch.arange(1.0, 5.0, dtype=torch.float64).view(4, 1)
        return F.ctc_loss(scores.log_softmax(-1), SPOKEN, count([5, 4, 5, 3]), count([2, 2, 2, 1]), reduction=reduction)

    exact(net(lambda m, h: h @ m.w)._replace(loss=loss), derivatives_of)


def test_an_impossible_ctc_loss_stays_infinite_or_0():
    def loss(m, zero):
        scores, lengths = m(X)[:, None].log_softmax(-1), torch.tensor([[1], [2]])
        return F.ctc_loss(scores, SPOKEN[:1], *lengths, reduction="none", zero_infinity=zero)

    for zero, value in ((True, 0.0), (False, torch.inf)):
        case = net(lambda m, h: h)
        model = case.build()
        found = ForwardGradient()(model, lambda m, zero=zero: loss(m, zero))
        assert found.loss == value


# --- transforms and scripts inside the model ----------------------------------------------------------------------


def mapped(m, h):
    return torch.vmap(lambda row: torch.tanh(m.w @ row))(h)


@ENGINES
@pytest.mark.parametrize("between", [mapped, lambda m, h: torch.vmap(torch.dot, (0, None))(h, m.w[0])[:, None] * h])
def test_vmap_inside_the_model(between, derivatives_of):
    exact(net(between), derivatives_of)


def test_gauss_newton_in_the_reference_engine():
    plain, case = net(lambda m, h: torch.tanh(h @ m.w.T)), net(mapped)
    found = GaussNewton(num_tangents=3)(case.build(), case.loss, generator=torch.Generator().manual_seed(0))
    expected = GaussNewton(num_tangents=3)(plain.build(), plain.loss, generator=torch.Generator().manual_seed(0))
    assert_is(found.grads, expected.grads, 1e-9)


@torch.jit.script
def scripted(x: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros((), device=x.device, dtype=x.dtype)
    slope = torch.where(x.isclose(zero), 1.0, 0.5)  # PyTorch implements isclose in Python
    return x * slope * (1.0 + torch.tanh(0.8 * (x + 0.04 * x * x * x)))


class WithScript(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.Tanh())), nn.Linear(4, 3)

    def forward(self, x):
        return self.b(scripted(self.a(x)))


def with_script():
    torch.manual_seed(0)
    return WithScript().double()


@ENGINES
def test_scripted_modules_and_functions(derivatives_of):
    exact(Case("script", with_script, lambda m: m(X).square().sum(1)), derivatives_of)


def test_activity_perturbation_names_a_script():
    with pytest.raises(UnsupportedOperation, match=r"^module 'a' \(\w+\) uses a TorchScript function, which has no"):
        ActivityPerturbation()(with_script(), lambda m: m(X).square().sum(1))


# --- second derivatives -------------------------------------------------------------------------------------------


def noisy(m, h):
    return h * m.w[0] + torch.normal(torch.zeros_like(h), 0.1)


def test_second_derivatives_beside_random_numbers_with_a_tensor_as_mean():
    case = net(noisy)
    model = case.build()
    sampled = Normal().sample(dict(model.named_parameters()), [0, 1])
    v = {name: dense(tangent) for name, tangent in sampled.items()}
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        _, _, found = curvature_in_span(model, case.loss, v)
    directions = torch.cat([v[name].flatten(1) for name in sorted(v)], 1)
    torch.testing.assert_close(found, directions @ exact_hessian(case) @ directions.T)


def gamma(m, h):
    return torch.distributions.Gamma(F.softplus(h) + 0.5, 1.0).rsample()


def test_a_sample_without_a_second_derivative_is_named():
    case = net(gamma)
    with pytest.raises(UnsupportedOperation, match=r"^the model \(Net\) uses _standard_gamma, which has no"):
        SecondOrder()(case.build(), case.loss)


def test_memory_of_a_result_cannot_be_read():
    def loss(model):
        out = model(X)
        return out.square().sum(1) * bool(out.data_ptr())

    with pytest.raises(UnsupportedOperation, match=r"^the loss function uses an operation that reads memory itself"):
        SecondOrder()(nn.Linear(4, 3).double(), loss)


# --- what stays from one step to the next -------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(4, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


def test_a_recurrent_layer_stays_in_the_fast_engine_if_its_output_is_kept(caplog):
    torch.manual_seed(0)
    model, kept, x = Recurrent().double(), [], X[None].transpose(0, 1)

    def loss(m):
        kept[:] = [m(x)]
        return kept[0].square().sum(1)

    estimator = ActivityPerturbation(num_tangents=2)
    for step in range(3):
        found = estimator(model, loss, generator=torch.Generator().manual_seed(step)).grads
        fresh = copy.deepcopy(Recurrent().double())
        fresh.load_state_dict(model.state_dict())
        assert_is(found, estimator(fresh, loss, generator=torch.Generator().manual_seed(step)).grads)
        ForwardGradient()(model, loss)
    assert "slower reference engine" not in caplog.text


class Student(nn.Module):
    """Its forward pass moves a teacher, which is not trained, towards it."""

    def __init__(self):
        super().__init__()
        self.student, self.teacher = nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def forward(self, x):
        with torch.no_grad():
            for new, old in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                old.data.mul_(0.9).add_(new.data, alpha=0.1)
            target = self.teacher(x)
        return (self.student(x) - target).square().sum(1)


@pytest.mark.parametrize(
    "estimator", [SPSA(), MeZO(), ForwardExact(1), ActivityPerturbation()], ids=lambda e: type(e).__name__
)
def test_a_pass_that_changes_a_frozen_parameter_is_not_repeated(estimator):
    with pytest.raises(
        UnsupportedOperation, match=r"^the loss function changes 'teacher.weight', .*on_train_batch_end$"
    ):
        estimator(Student().double(), lambda m: m(X))


def test_a_single_pass_may_change_a_frozen_parameter():
    model = Student().double()
    other = copy.deepcopy(model)
    exact_grads = Backprop()(other, lambda m: m(X)).grads
    estimate = ForwardGradient(num_tangents=2)(model, lambda m: m(X), generator=torch.Generator().manual_seed(0))
    assert estimate.directional_derivatives is not None
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    torch.testing.assert_close(  # sum_k d_k (v_k . g) / K with d_k = v_k . g
        estimate.directional_derivatives.square().mean(), flat(estimate.grads) @ flat(exact_grads)
    )


def set_by_method(p, requires_grad):
    p.requires_grad_(requires_grad)


def set_as_attribute(p, requires_grad):
    p.requires_grad = requires_grad


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("change", [set_by_method, set_as_attribute])
def test_a_loss_that_freezes_and_unfreezes(change, before):
    model = nn.Linear(4, 3).double()
    model.bias.requires_grad_(before)

    def loss(model):
        change(model.bias, not before)
        return model(X).square().sum(1)

    for estimator in [*WITHOUT_BACKWARD, ActivityPerturbation(), ActivityPerturbation(memory="replay"), FDFA()]:
        with pytest.raises(UnsupportedOperation, match=rf"sets requires_grad={not before} of bias; do this before"):
            estimator(model, loss)
    estimate = Backprop()(model, loss)
    assert ("bias" in estimate.grads) == (model.bias.requires_grad) == (not before)


def test_a_loss_that_freezes_the_parameter_itself():
    model = nn.Linear(4, 3).double()
    held = model.bias

    def loss(m):
        held.requires_grad_(False)
        return m(X).square().sum(1)

    for estimator in WITHOUT_BACKWARD:
        with pytest.raises(UnsupportedOperation, match=r"sets requires_grad=False of bias"):
            estimator(model, loss)


def of_blocks():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 4), Residual(nn.Linear(4, 4)), Residual(nn.Linear(4, 4)), nn.Linear(4, 3)
    ).double()


WITHIN_BLOCKS = {
    "highway": Highway,
    "highway without a backward pass": lambda: Highway(ForwardExact()),
    "local": lambda: LocalLosses(ForwardExact()),
    "local guess": LocalGuess,
    "local tail": lambda: LocalLosses(ForwardExact(), head="tail"),
    "local tail, by backpropagation": lambda: LocalLosses(Backprop(), head="tail"),
}


@pytest.mark.parametrize("through", ["the model", "the parameters themselves"])
@pytest.mark.parametrize("name", WITHIN_BLOCKS)
def test_a_loss_that_trains_what_is_trained(name, through):
    """It changes nothing, also where a method holds a part of the model constant."""
    model, plain = of_blocks(), lambda m: m(X).square().sum(1)
    params = list(model.parameters())

    def loss(m):
        for p in m.parameters() if through == "the model" else params:
            p.requires_grad_()
        return plain(m)

    expected = WITHIN_BLOCKS[name]()(model, plain).grads
    assert_is(WITHIN_BLOCKS[name]()(model, loss).grads, expected)


@pytest.mark.parametrize("estimator", [LocalLosses(Backprop()), LocalGuess()], ids=str)
def test_local_losses_of_a_loss_that_unfreezes_a_layer(estimator):
    """It gets a gradient, as under backpropagation; it is no part of a head."""
    model, plain = of_blocks(), lambda m: m(X).square().sum(1)
    expected = copy.deepcopy(estimator)(model, plain).grads
    model[0].requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    assert_is(estimator(model, lambda m: plain(m.requires_grad_(True))).grads, expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


# --- parameters that a loss asks whether they are trained ----------------------------------------------------------


def of_trained(m):
    """A loss with the norm of all parameters that are trained."""
    return m(X).square().sum(1) + torch.stack([p.square().sum() for p in m.parameters() if p.requires_grad]).norm()


def partly_frozen():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4), *(Residual(nn.Sequential(nn.Linear(4, 4), nn.Tanh())) for _ in range(2))]
    model = nn.Sequential(*layers, nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)
    return model


@pytest.mark.parametrize(
    "estimator",
    [
        *(SPSA(epsilon=1e-6), MeZO(epsilon=1e-6), ForwardExact(chunk_size=5), ForwardGradient(), SecondOrder()),
        *(Highway(), LocalLosses(Backprop(), head="tail"), CheckpointedBackprop()),
    ],
    ids=lambda e: type(e).__name__,
)
def test_a_penalty_on_the_parameters_that_are_trained(estimator):
    exact = Backprop()(partly_frozen(), of_trained)
    model = partly_frozen()
    found = estimator(model, of_trained, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.loss, exact.loss, rtol=1e-5, atol=0)
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in partly_frozen().parameters()]
    if isinstance(estimator, ForwardExact):
        assert_is(found.grads, exact.grads)
    if isinstance(estimator, (SPSA, MeZO)):
        assert found.directional_derivatives is not None
        directions = flat({name: g / found.directional_derivatives for name, g in found.grads.items()})
        torch.testing.assert_close(found.directional_derivatives[0], flat(exact.grads) @ directions, rtol=1e-6, atol=0)


def descended(m, **options):
    """The losses after a step of gradient descent, and the size of its gradient."""
    losses, params = m(X).square().sum(1), dict(m.named_parameters())
    slopes = torch.autograd.grad(losses.mean(), list(params.values()), create_graph=True, **options)
    moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), slopes, strict=True) if g is not None}
    return functional_call(m, moved, (X,)).exp().sum(1) + sum(g.square().sum() for g in slopes if g is not None)


def first_order(m):
    """As `descended`, with a gradient that is a constant."""
    losses, params = m(X).square().sum(1), dict(m.named_parameters())
    slopes = torch.autograd.grad(losses.mean(), list(params.values()))
    moved = {name: p - 0.1 * g for (name, p), g in zip(params.items(), slopes, strict=True)}
    return functional_call(m, moved, (X,)).exp().sum(1)


def of_features(m):
    """A penalty on the slope of the outputs in what a layer computes."""
    features = m[0](X).tanh()
    outputs = m[2](features)
    (slopes,) = torch.autograd.grad(outputs.square().sum(), features, create_graph=True)
    return (slopes * features).sum(1).square() + outputs.sum(1)


LEARNT = [descended, lambda m: descended(m, allow_unused=True), first_order, of_features]


@pytest.mark.parametrize("loss", LEARNT, ids=["step", "with some unused", "first order", "features"])
@pytest.mark.parametrize("estimator", [ForwardExact(), ForwardExact(chunk_size=3)], ids=str)
def test_a_loss_that_differentiates_in_the_parameters(loss, estimator):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    expected = Backprop()(model, loss).grads
    for _ in range(2):  # the second call knows the loss
        torch.testing.assert_close(estimator(model, loss).grads, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("loss", LEARNT[:3], ids=["step", "with some unused", "first order"])
@pytest.mark.parametrize(
    "estimator",
    [SPSA(), MeZO(), GaussNewton(num_tangents=2), SecondOrder(), ActivityPerturbation(), FDFA()],
    ids=lambda e: type(e).__name__,
)
def test_a_loss_that_differentiates_in_the_parameters_is_refused(estimator, loss):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    with pytest.raises(UnsupportedOperation, match=r"a derivative with respect to a.*, or train with"):
        estimator(model, loss)


class Marked(nn.Module):
    """Has a parameter with an attribute, and stores a parameter under another name as it runs."""

    def __init__(self):
        super().__init__()
        self.l = nn.Linear(4, 3)
        setattr(self.l.weight, "decays", True)

    def forward(self, x):
        self.bias = self.l.bias
        return self.l(x) + self.bias


def of_marked(m):
    decayed = [p for p in m.parameters() if isinstance(p, nn.Parameter) and getattr(p, "decays", False)]
    return m(X).square().sum(1) + sum(p.square().sum() for p in decayed)


@pytest.mark.parametrize(
    "estimator",
    [SPSA(epsilon=1e-6), MeZO(epsilon=1e-6), ForwardExact(chunk_size=5), ForwardGradient(), SecondOrder()],
    ids=lambda e: type(e).__name__,
)
@pytest.mark.parametrize("frozen", [True, False])
def test_parameters_stay_parameters_with_attributes(estimator, frozen):
    torch.manual_seed(0)
    model = Marked().double()
    model.l.bias.requires_grad_(not frozen)
    other = copy.deepcopy(model)
    setattr(other.l.weight, "decays", True)
    exact, found = Backprop()(other, of_marked), estimator(model, of_marked)
    torch.testing.assert_close(found.loss, exact.loss, rtol=1e-5, atol=0)
    assert {type(p) for p in model.parameters()} == {nn.Parameter}
    torch.testing.assert_close(estimator(model, of_marked).loss, exact.loss, rtol=1e-5, atol=0)


def test_curvature_of_a_penalty_on_the_parameters_that_are_trained():
    model = nn.Linear(4, 3).double()
    params = list(model.parameters())

    def loss(m, past_model=False):
        return m(X).sin().sum(1) + sum(p.exp().sum() for p in (params if past_model else m.parameters()))

    case = Case("penalty", lambda: copy.deepcopy(model), loss)
    tangents = {name: dense(t) for name, t in Normal().sample(dict(model.named_parameters()), range(3)).items()}
    v = torch.cat([tangents[name].flatten(1) for name in sorted(tangents)], 1)
    for past_model in (False, True):
        with torch.no_grad():
            _, _, curvature = curvature_in_span(model, lambda m, at=past_model: loss(m, at), tangents)
        torch.testing.assert_close(curvature, v @ exact_hessian(case) @ v.T)


@pytest.mark.parametrize("estimator", [SPSA(), MeZO()], ids=lambda e: type(e).__name__)
def test_parameters_that_a_loss_holds_itself_are_not_moved_by_differences(estimator):
    model = nn.Linear(4, 3).double()
    weight = model.weight
    with pytest.raises(UnsupportedOperation, match=r"uses 'weight' past the model, .*; read it from the model"):
        estimator(model, lambda m: m(X).square().sum(1) + weight.square().sum())


@pytest.mark.parametrize("estimator", [SPSA(), MeZO(), ForwardExact(4)], ids=lambda e: type(e).__name__)
def test_a_copy_of_the_model_in_the_loss(estimator):
    """A teacher that the loss copies is a constant, whose parameters may be frozen."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)).double()
    model[0].requires_grad_(False)

    def loss(m):
        return (m(X) - copy.deepcopy(m).requires_grad_(False)(X) + 1).square().sum(1)

    found = estimator(model, loss)
    torch.testing.assert_close(found.loss, torch.tensor(3.0, dtype=torch.float64), rtol=1e-4, atol=0)


# --- what a pass writes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", [ActivityPerturbation, FDFA])
def test_a_parameter_beside_the_layers_may_be_written_into_a_plain_tensor(estimator):
    """The first call looks for the layers; its pass handles all that the estimate's own pass does."""
    written = net(lambda m, h: h @ torch.zeros(4, 4, dtype=h.dtype).add_(m.w))
    added = net(lambda m, h: h @ (torch.zeros(4, 4, dtype=h.dtype) + m.w))
    found, expected = (
        estimator(num_tangents=2)(case.build(), case.loss, generator=torch.Generator().manual_seed(0))
        for case in (written, added)
    )
    assert_is(found.grads, expected.grads)
