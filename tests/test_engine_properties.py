"""Models, shapes, dtypes, laws, K and ranks drawn by hypothesis agree with backpropagation in float64."""

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from fgtrain import Coordinate, LowRank, Normal, Rademacher, Sphere, directional_derivatives
from fgtrain.network.parameters import trainable_params
from fgtrain.tangents.directions import dense

ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.ELU]
LAWS = st.one_of(
    st.sampled_from([Normal(), Rademacher(), Sphere(), Coordinate()]),
    st.builds(LowRank, st.integers(1, 3), st.sampled_from(["rademacher", "normal"])),
)
LOSSES = {
    "cross-entropy": lambda out, y: F.cross_entropy(out, y, reduction="none"),
    "smoothed": lambda out, y: F.cross_entropy(out, y, reduction="none", label_smoothing=0.1),
    "squares of each": lambda out, y: (out - 1).square().mean(1),
    "one number": lambda out, y: F.nll_loss(out.log_softmax(1), y),
}


@st.composite
def models(draw):
    """(module, shape of one input): layers that fit each other, in random order."""
    layers, wide = [], draw(st.booleans())
    if wide:
        channels, size = draw(st.integers(1, 3)), draw(st.integers(4, 6))
        shape = (channels, size, size)
        for _ in range(draw(st.integers(1, 2))):
            out = draw(st.integers(1, 4))
            layers.append(
                nn.Conv2d(channels, out, 3, padding=1, stride=draw(st.integers(1, 2)), bias=draw(st.booleans()))
            )
            layers += [nn.BatchNorm2d(out)] if draw(st.booleans()) else []
            layers.append(draw(st.sampled_from(ACTIVATIONS))())
            channels = out
        layers += [draw(st.sampled_from([nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d]))(1), nn.Flatten()]
        width = channels
    else:
        width = draw(st.integers(1, 5))
        shape = (width,)
    for _ in range(draw(st.integers(0, 3))):
        out = draw(st.integers(1, 6))
        layers.append(nn.Linear(width, out, bias=draw(st.booleans())))
        layers += [nn.LayerNorm(out)] if draw(st.booleans()) else []
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        layers += [nn.Dropout(0.4)] if draw(st.booleans()) else []
        width = out
    return nn.Sequential(*layers, nn.Linear(width, 3)), shape


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=models(),
    law=LAWS,
    num_tangents=st.integers(1, 4),
    batch=st.integers(2, 5),
    loss=st.sampled_from(sorted(LOSSES)),
    frozen=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_derivative_is_that_of_backpropagation(drawn, law, num_tangents, batch, loss, frozen, seed):
    model, shape = drawn
    torch.manual_seed(seed)
    for p in model.parameters():
        nn.init.normal_(p, std=0.7)
    model = model.double()
    if frozen and len(list(model.parameters())) > 1:
        next(model.parameters()).requires_grad_(False)
    x = torch.randn(batch, *shape, dtype=torch.float64)
    y = torch.randint(3, (batch,))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    params = trainable_params(model)

    def loss_fn(net):
        return LOSSES[loss](net(x), y)

    torch.manual_seed(1)
    plain = loss_fn(model)
    grads = torch.autograd.grad(plain.mean(), list(params.values()), allow_unused=True)
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    model.load_state_dict(state)
    tangents = law.sample(params, [seed + k for k in range(num_tangents)])
    torch.manual_seed(1)
    losses, derivatives = directional_derivatives(model, loss_fn, tangents)
    expected = torch.zeros(num_tangents, dtype=torch.float64)
    scale = torch.ones(num_tangents, dtype=torch.float64)
    for name, g in zip(params, grads, strict=True):
        if g is not None:
            products = dense(tangents[name]).flatten(1) * g.flatten()
            expected += products.sum(1)
            scale += products.abs().sum(1)  # rounding is relative to what is added
    torch.testing.assert_close(losses, plain.detach(), rtol=1e-9, atol=1e-12)
    assert ((derivatives - expected).abs() <= 1e-9 * scale).all()
    for name, value in model.named_buffers():
        torch.testing.assert_close(value, buffers[name], msg=name)
