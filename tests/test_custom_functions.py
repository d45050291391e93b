"""A custom autograd.Function or operator without jvp has the derivative that its backward gives, or is refused."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

from fgtrain import FDFA, ActivityPerturbation, Backprop, ForwardExact, LowRank, Normal, directional_derivatives
from fgtrain.errors import UnsupportedOperation
from fgtrain.forward_ad import native, stacked
from fgtrain.tangents.directions import all_dense
from tests.cases import INPUTS, LABELS

pytestmark = pytest.mark.usefixtures("float64")


class Function(torch.autograd.Function):
    """The base of those below, which differ in what they compute."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        ctx.save_for_backward(x)
        return x.sin()


class Sine(Function):
    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * ctx.saved_tensors[0].cos()


class Spike(Function):
    """A step whose backward is the derivative of another function."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] / (1 + ctx.saved_tensors[0].abs()) ** 2


class Reversed(Function):
    """The identity; its result shares the memory of its argument."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, *grads):
        return -0.3 * grads[0]


class Rectified(Function):
    """Keeps its result for backward."""

    @staticmethod
    def forward(ctx, x):
        result = x.clamp(min=0)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx, *grads):
        return grads[0] * (ctx.saved_tensors[0] > 0)


class Tripled(Function):
    """Keeps nothing for backward."""

    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, *grads):
        return 3 * grads[0]


class Both(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin(), x.cos()

    @staticmethod
    def backward(ctx, *grads):
        (x,) = ctx.saved_tensors
        return grads[0] * x.cos() - grads[1] * x.sin()


class Affine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return x @ weight.T + bias

    @staticmethod
    def backward(ctx, *grads):
        x, weight = ctx.saved_tensors
        return grads[0] @ weight, grads[0].T @ x, grads[0].sum(0)


class Total(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return x.sum()

    @staticmethod
    def backward(ctx, *grads):
        return grads[0].expand(ctx.shape)


class Complex(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.polar(torch.ones_like(x), x)

    @staticmethod
    def backward(ctx, *grads):
        return (grads[0].conj() * torch.polar(torch.ones_like(grads[0].real), ctx.saved_tensors[0])).imag.neg()


class Written(torch.autograd.Function):
    """Writes into a buffer past autograd, as torchdiffeq's solvers do."""

    @staticmethod
    def forward(ctx, buffer, x, index):
        ctx.index = index
        buffer.data[index] = x
        return buffer

    @staticmethod
    def backward(ctx, *grads):
        return grads[0], grads[0][ctx.index], None


def stages(layer):
    """Two stages of an explicit solver."""
    x, buffer = layer(INPUTS), torch.empty(2, 4, 3)
    for i in range(2):
        buffer = Written.apply(buffer, torch.tanh(x), i)
        x = x + buffer[: i + 1].sum(0)
    return x


@torch.library.custom_op("fgtrain_tests::cubed", mutates_args=())
def cubed(x: torch.Tensor, scale: float) -> torch.Tensor:
    return scale * x**3


def keep_input(ctx, inputs, output):
    ctx.x, ctx.scale = inputs


cubed.register_autograd(lambda ctx, grad: (3 * ctx.scale * grad * ctx.x**2, None), setup_context=keep_input)


def written_into(m):
    x = Sine.apply(m[0](INPUTS)).clone()
    x[:, 0] = m[1](INPUTS)[:, 0]
    return x


def model():
    torch.manual_seed(0)
    return nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)])


USES = {
    "smooth": lambda m: Sine.apply(m[0](INPUTS)),
    "of other slope": lambda m: Spike.apply(m[0](INPUTS)),
    "alias": lambda m: Reversed.apply(m[0](INPUTS)),
    "of its result": lambda m: Rectified.apply(m[0](INPUTS)),
    "several results": lambda m: sum(Both.apply(m[0](INPUTS))) * m[1](INPUTS),
    "of parameters": lambda m: Affine.apply(torch.tanh(m[0](INPUTS)), m[1].weight, m[1].bias),
    "of a parameter alone": lambda m: F.linear(INPUTS, Sine.apply(m[0].weight), m[0].bias),
    "scalar": lambda m: m[0](INPUTS) * Total.apply(m[1](INPUTS)),
    "complex inside": lambda m: Complex.apply(m[0](INPUTS)).real,
    "chained": lambda m: Spike.apply(2 * Sine.apply(m[0](INPUTS)).relu() - 1) + m[1](INPUTS),
    "used twice": lambda m: (lambda x: x * m[1](INPUTS) + x.sum(1, keepdim=True))(Sine.apply(m[0](INPUTS))),
    "solver": lambda m: stages(m[0]),
    "function of PyTorch": lambda m: torch.ormqr(torch.eye(3, 2), torch.ones(2), m[0](INPUTS).mT).mT,
    "operator": lambda m: cubed(m[0](INPUTS), 0.5),
    "written into": written_into,
    "under another one": lambda m: F.scaled_dot_product_attention(*(Sine.apply(m[0](INPUTS))[None] for _ in range(3)))[
        0
    ],
    "changed in place": lambda m: Sine.apply(m[0](INPUTS)).mul_(2).add_(1) * m[1](INPUTS),
    "changed after a use": lambda m: (lambda x: x.sum(1, keepdim=True) + x.mul_(3) * m[1](INPUTS))(
        Sine.apply(m[0](INPUTS))
    ),
}


def losses(use):
    return lambda m: F.cross_entropy(m[2](torch.tanh(use(m))), LABELS, reduction="none")


@pytest.mark.parametrize("law", [Normal(), LowRank()], ids=str)
@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_derivative_of_a_function(use, law, caplog):
    net = model()
    tangents = law.sample(dict(net.named_parameters()), [0, 1, 2])
    values, found = directional_derivatives(net, losses(use), tangents)
    gradient, dense = Backprop()(net, losses(use)).grads, all_dense(tangents)
    expected = sum((g * dense[name]).flatten(1).sum(1) for name, g in gradient.items())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(values, losses(use)(net), rtol=1e-12, atol=1e-12)
    assert "slower reference engine" not in caplog.text


def test_the_loss_may_be_the_result_of_a_function():
    net = model()[0]
    loss = lambda m: Sine.apply(m(INPUTS)).sum(1)
    torch.testing.assert_close(ForwardExact()(net, loss).grads, Backprop()(net, loss).grads)


@pytest.mark.parametrize(
    "use", [lambda function, z: function(z), lambda function, z: function(z) + z.relu()], ids=["alone", "beside a ReLU"]
)
@pytest.mark.parametrize("estimator", [ActivityPerturbation, FDFA], ids=["activity", "fdfa"])
def test_layers_before_a_function_are_perturbed(estimator, use):
    """The derivatives along noise are those of a model that computes the same without a Function."""

    def estimate(function):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3))
        loss = lambda m: F.cross_entropy(m[1](use(function, m[0](INPUTS))), LABELS, reduction="none")
        return estimator(3)(net, loss, generator=torch.Generator().manual_seed(1)).grads

    torch.testing.assert_close(estimate(Tripled.apply), estimate(lambda z: 3 * z))


def test_the_error_of_the_output_is_exact_behind_a_function():
    """The directions of the exact head go through the loss together with others that are nan."""
    net, loss = model()[0], lambda m: Sine.apply(m(INPUTS)).sum(1)
    torch.testing.assert_close(FDFA()(net, loss).grads, Backprop()(net, loss).grads)


class Once(Function):
    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        return grads[0] * ctx.saved_tensors[0].cos()


class Numpy(Function):
    @staticmethod
    def backward(ctx, *grads):
        return torch.from_numpy(grads[0].detach().numpy()) * ctx.saved_tensors[0].cos()


class PartlyNumpy(Function):
    @staticmethod
    def backward(ctx, *grads):
        cosine = ctx.saved_tensors[0].cos()
        return grads[0] * cosine / 2 + torch.from_numpy(grads[0].detach().numpy()) * cosine / 2


class InPlace(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx, *grads):
        return 2 * grads[0]


@pytest.mark.parametrize(
    "use",
    [
        lambda m: Once.apply(m[0](INPUTS)),
        lambda m: Numpy.apply(m[0](INPUTS)),
        lambda m: PartlyNumpy.apply(m[0](INPUTS)),
        lambda m: (Complex.apply(m[0](INPUTS)) * m[1](INPUTS)).real,
        lambda m: InPlace.apply(m[0](INPUTS) * 1),
    ],
    ids=["differentiable once", "numpy", "partly numpy", "complex", "in place"],
)
def test_a_function_without_a_second_derivative_is_refused(use):
    net = model()
    tangents = Normal().sample(dict(net.named_parameters()), [0])
    with pytest.raises(UnsupportedOperation, match=r"a custom autograd\.Function without jvp"):
        directional_derivatives(net, losses(use), tangents)


class Kept(nn.Module):
    """Computes a tensor in its first pass and uses it again in later ones."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.kept = None

    def forward(self, x):
        if self.kept is None:
            self.kept = Sine.apply(self.layer.weight)
        return x @ self.kept + self.layer.bias


def test_a_kept_result_of_a_function_is_refused_in_the_next_pass():
    net = Kept()
    tangents = Normal().sample(dict(net.named_parameters()), [0])
    directional_derivatives(net, lambda m: m(INPUTS).square().sum(1), tangents)
    with pytest.raises(UnsupportedOperation, match="was computed from the model's parameters before this pass"):
        directional_derivatives(net, lambda m: m(INPUTS).square().sum(1), tangents)


def without_graph(change):
    def use(m):
        x = m[0](INPUTS)
        with torch.no_grad():
            return change(x)

    return use


@pytest.mark.parametrize("engine", [stacked.jvp, native.jvp], ids=["stacked", "native"])
@pytest.mark.parametrize(
    "use",
    [
        without_graph(lambda x: x.clamp_(min=0)),
        without_graph(lambda x: F.relu(x, inplace=True)),
        without_graph(lambda x: x.contiguous()),
        without_graph(lambda x: x.double()),
        without_graph(lambda x: x * 2),
        without_graph(lambda x: x[:]),
    ],
    ids=["in place", "in place by name", "contiguous", "same dtype", "constant", "view"],
)
def test_what_a_call_under_no_grad_returns(use, engine):
    """The argument itself keeps its derivative, a new tensor is a constant."""
    net = model()
    tangents = Normal().sample(dict(net.named_parameters()), [0])
    with torch.no_grad():
        _, found = engine(net, losses(use), tangents)
    gradient = Backprop()(net, losses(use)).grads
    dense = all_dense(tangents)
    expected = sum((g * dense[name]).flatten(1).sum(1) for name, g in gradient.items())
    torch.testing.assert_close(found.mean(1), expected, rtol=1e-10, atol=1e-12)
