"""Complete short examples of one's own loop: any module, any loss, as a user writes them."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fgtrain
from fgtrain.errors import DivergenceError, LossError, ModelError
from tests.properties import flat


class TwoInputs(nn.Module):
    """Takes two inputs and returns a dictionary of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(3, 4), nn.Linear(2, 4)
        self.value, self.kind = nn.Linear(4, 1), nn.Linear(4, 3)

    def forward(self, x, *, z):
        hidden = torch.tanh(self.left(x) + self.right(z))
        return {"value": self.value(hidden).squeeze(-1), "kind": self.kind(hidden), "hidden": hidden}


def batch_of(size=6):
    g = torch.Generator().manual_seed(0)
    batch = {"x": torch.randn(size, 3, generator=g), "z": torch.randn(size, 2, generator=g)}
    return batch | {"y": batch["x"].sum(1), "label": torch.randint(3, (size,), generator=g)}


def regression(net, batch):
    return F.huber_loss(net(batch["x"], z=batch["z"])["value"], batch["y"], reduction="none")


def several(net, batch):
    """Two losses per example, and one of the parameters alone."""
    out = net(batch["x"], z=batch["z"])
    decay = sum(p.square().sum() for p in net.parameters())
    return (
        F.mse_loss(out["value"], batch["y"], reduction="none")
        + 0.3 * F.cross_entropy(out["kind"], batch["label"], reduction="none")
        + 1e-2 * decay
    )


def part_of_the_model(net, batch):
    return net.value(torch.tanh(net.left(batch["x"]))).squeeze(-1).square().mean()


def make():
    torch.manual_seed(0)
    return TwoInputs()


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("loss", [regression, several, part_of_the_model])
def test_exact_along_every_coordinate(loss):
    model, batch = make(), batch_of()
    exact = fgtrain.Backprop()(model, lambda net: loss(net, batch)).grads
    reached = {name: p for name, p in model.named_parameters() if name in exact}
    numel = sum(p.numel() for p in reached.values())
    pieces = torch.eye(numel).split([p.numel() for p in reached.values()], dim=1)
    basis = {n: piece.reshape(-1, *p.shape) for (n, p), piece in zip(reached.items(), pieces, strict=True)}
    _, derivatives = fgtrain.directional_derivatives(model, lambda net: loss(net, batch), basis)
    torch.testing.assert_close(derivatives, torch.cat([exact[name].flatten() for name in reached]))


@pytest.mark.slow
@pytest.mark.parametrize("loss", [regression, several])
def test_a_loop_of_ones_own_learns(loss):
    model, batch = make(), batch_of(64)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    estimator = fgtrain.ForwardGradient(tangents=fgtrain.LowRank(rank=1), num_tangents=16)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(150):
        estimate = estimator(model, lambda net: loss(net, batch), generator=generator)
        fgtrain.write_grads(model, estimate.grads)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(estimate.loss.item())
    assert losses[-1] < 0.25 * losses[0]


def test_auxiliary_outputs_leave_the_loss():
    """What a loss notes down by detach() is a plain tensor, with the value of a plain forward pass."""
    model, batch, seen = make(), batch_of(), {}

    def loss(net):
        out = net(batch["x"], z=batch["z"])
        seen["hidden"], seen["mean"] = out["hidden"].detach(), out["value"].mean().item()
        return F.mse_loss(out["value"], batch["y"])

    for estimator in (fgtrain.Backprop(), fgtrain.ForwardGradient(num_tangents=3)):
        estimator(model, loss)
        assert type(seen["hidden"]) is torch.Tensor
        torch.testing.assert_close(seen["hidden"], model(batch["x"], z=batch["z"])["hidden"].detach())


def test_frozen_parameters_get_neither_direction_nor_gradient():
    model, batch = make(), batch_of()
    model.left.requires_grad_(False)
    model.right.requires_grad_(False)
    estimator = fgtrain.ForwardGradient()
    grads = estimator(model, lambda net: several(net, batch), generator=torch.Generator().manual_seed(0)).grads
    assert set(grads) == {"value.weight", "value.bias", "kind.weight", "kind.bias"}
    head = nn.ModuleDict({"value": model.value, "kind": model.kind})
    hidden = model(batch["x"], z=batch["z"])["hidden"].detach()

    def head_loss(net):
        losses = F.mse_loss(net["value"](hidden).squeeze(-1), batch["y"], reduction="none")
        losses = losses + 0.3 * F.cross_entropy(net["kind"](hidden), batch["label"], reduction="none")
        return losses + 1e-2 * sum(p.square().sum() for p in net.parameters())

    alone = estimator(head, head_loss, generator=torch.Generator().manual_seed(0)).grads
    torch.testing.assert_close(flat(grads), flat(alone))


INPUTS = {name: batch_of()[name] for name in ("x", "z")}
BAD_LOSSES = [
    (lambda net: net(**INPUTS), r"loss_fn must return .* got a dict"),
    (lambda net: net(**INPUTS)["kind"], r"loss_fn must return .* got shape \(6, 3\); reduce it"),
    (lambda net: torch.zeros(6), r"the loss (depends on no trainable parameter|carries no tangent)"),
    (lambda net: 3.0, r"loss_fn must return .* got a float"),
    (lambda net: net(**INPUTS)["kind"].argmax(1), r"loss_fn must return .* of a floating dtype, got torch.int64"),
]
ESTIMATORS = [fgtrain.Backprop(), fgtrain.ForwardGradient()]


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
@pytest.mark.parametrize(("loss", "message"), BAD_LOSSES)
def test_losses_that_cannot_be_differentiated(loss, message, estimator):
    with pytest.raises(LossError, match=message) as caught:
        estimator(make(), loss)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_a_model_without_parameters(estimator):
    with pytest.raises(ModelError, match="ReLU has no parameter with requires_grad=True: nothing to train"):
        estimator(nn.ReLU(), lambda net: torch.zeros(3))


@pytest.mark.parametrize(
    "estimator", [*ESTIMATORS, fgtrain.ForwardGradient(fgtrain.LowRank(), 4), fgtrain.SPSA()], ids=str
)
def test_nan_in_the_loss_is_refused_before_it_is_written(estimator):
    model, batch = make(), batch_of()
    fgtrain.write_grads(model, estimator(model, lambda net: several(net, batch)).grads)
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    batch["x"][2, 1] = torch.nan
    grads = estimator(model, lambda net: several(net, batch)).grads
    for accumulate in (False, True):
        with pytest.raises(
            DivergenceError, match=r"^the gradient of '\w+\.\w+' is not finite .* skip this batch"
        ) as caught:
            fgtrain.write_grads(model, grads, accumulate=accumulate)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if p.grad is not None)
    fgtrain.write_grads(model, grads, check_finite=False)
    assert not all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("estimator", [*ESTIMATORS, fgtrain.SPSA(), fgtrain.MeZO()], ids=str)
def test_a_model_whose_parameters_are_not_there(estimator, monkeypatch):
    def refused(model, match):
        with pytest.raises(ModelError, match=match) as caught:
            estimator(model, lambda net: net(torch.zeros(1, 2)).mean(1))
        assert "\n" not in str(caught.value)

    refused(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), "'1.weight' has no shape yet; call it on a batch first$")
    frozen = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta").requires_grad_(False))
    refused(frozen, r"'1.weight' of Sequential is on the meta device; give it values with .to_empty\(\)$")
    monkeypatch.setattr("fgtrain.network.parameters._require_numbers", lambda *_: None)  # the second device a CPU has
    refused(frozen, r"^the parameters must be on one device, got cpu and meta; move the model with .to\(\)$")
