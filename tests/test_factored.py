"""A factored gradient behaves like the tensor that it represents."""

import copy

import pytest
import torch
from torch import nn

import fgtrain
from fgtrain.tangents.directions import LowRankTangent
from fgtrain.tangents.factored import FactoredGrad


def pair(rank=2, shape=(4, 3, 2)):
    torch.manual_seed(0)
    left, right = torch.randn(rank, shape[0]), torch.randn(rank, 6)
    return FactoredGrad(left, right, torch.Size(shape)), (left.T @ right).view(shape)


@pytest.mark.parametrize("rank", [1, 3])
def test_added_to_a_parameter(rank):
    factored, dense = pair(rank)
    param = torch.randn(4, 3, 2)
    expected = param - 0.5 * dense
    param.add_(factored, alpha=-0.5)
    assert factored.written is None
    torch.testing.assert_close(param, expected)


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize(
    "param",
    [torch.ones(2, 3, 4).permute(2, 1, 0), torch.ones(4, 3, 2, dtype=torch.float64)],
    ids=["strided", "float64"],
)
def test_added_to_a_parameter_of_another_layout_or_dtype(rank, param):
    factored, dense = pair(rank)
    torch.testing.assert_close(param.clone().add_(factored, alpha=-0.5), param - 0.5 * dense)


@pytest.mark.parametrize("options", [{}, {"momentum": 0.9}, {"weight_decay": 0.1}], ids=str)
@pytest.mark.parametrize("law", [torch.optim.SGD, torch.optim.Adam])
def test_every_optimizer_steps_as_with_the_plain_gradient(law, options):
    if law is torch.optim.Adam and "momentum" in options:
        options = {"betas": (0.5, 0.9)}
    params = [nn.Parameter(torch.ones(4, 3, 2)) for _ in range(2)]
    optimizers = [law([p], lr=0.1, **options) for p in params]
    for _ in range(3):
        for p, grad in zip(params, pair(), strict=True):
            p.grad = grad
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(params[0], params[1])


def test_an_optimizer_for_many_tensors_at_once_keeps_it_factored():
    """As on a GPU, where it is PyTorch's default."""
    together, apart = ([nn.Parameter(torch.ones(4, 3, 2)) for _ in range(3)] for _ in range(2))
    factored = [pair()[0], torch.full((4, 3, 2), 0.5), pair(3)[0]]
    for params, foreach in ((together, True), (apart, False)):
        for p, grad in zip(params, factored, strict=True):
            p.grad = grad
        torch.optim.SGD(params, lr=0.1, foreach=foreach).step()
    assert all(grad.written is None for grad in factored if isinstance(grad, FactoredGrad))
    torch.testing.assert_close(together, apart)


@pytest.mark.parametrize("rank", [1, 3])
def test_norms_need_no_numbers(rank):
    factored, dense = pair(rank)
    norms = [factored.norm(), torch.linalg.vector_norm(factored), *torch._foreach_norm([factored, dense])]
    assert factored.written is None
    for norm in norms:
        torch.testing.assert_close(norm, dense.norm())
    torch.testing.assert_close(factored.norm(1), dense.norm(1))


def test_clipping_and_accumulation():
    factored, dense = pair()
    for grad in (factored, dense):
        p = nn.Parameter(torch.zeros(4, 3, 2))
        p.grad = grad
        norm = nn.utils.clip_grad_norm_([p], 1.0)
        assert float(norm) == pytest.approx(float(pair()[1].norm()))
        assert float(p.grad.norm()) == pytest.approx(1, rel=1e-4)
    model = nn.Linear(2, 2, bias=False)
    first, second = (FactoredGrad(torch.ones(1, 2), torch.ones(1, 2), torch.Size((2, 2))) for _ in range(2))
    fgtrain.write_grads(model, {"weight": first})
    fgtrain.write_grads(model, {"weight": second}, accumulate=True)
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad + 0, torch.full((2, 2), 2.0))


def test_reads_like_a_tensor(tmp_path):
    factored, dense = pair()
    assert factored.shape == dense.shape
    assert torch.equal(factored.flatten(), dense.flatten())
    assert torch.equal(factored * 2, dense * 2)
    assert torch.equal(torch.cat([factored, dense]), torch.cat([dense, dense]))
    assert torch.equal(factored[1], dense[1])
    assert (factored.numpy() == dense.numpy()).all()
    assert factored.tolist() == dense.tolist()
    assert repr(factored) == repr(dense)
    assert torch.equal(copy.deepcopy(factored), dense)
    assert factored.sum().item() == dense.sum().item()
    torch.save(factored, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt", weights_only=True), dense)


def test_an_update_in_place_stays():
    factored, dense = pair()
    assert factored.mul_(2) is factored
    assert torch.equal(factored + 0, 2 * dense)
    param = torch.zeros(4, 3, 2).add_(factored)
    assert torch.equal(param, 2 * dense)


def test_large_low_rank_estimates_stay_factored_until_the_step():
    model = nn.Linear(300, 250)
    estimate = fgtrain.ForwardGradient(fgtrain.LowRank())(model, lambda m: m(torch.ones(1, 300)).sum(1))
    grad = estimate.grads["weight"]
    assert isinstance(grad, FactoredGrad)
    before, change = model.weight.detach().clone(), (grad.left.T @ grad.right).clone()
    fgtrain.write_grads(model, estimate.grads)
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert grad.written is None
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * change)


@pytest.mark.parametrize("num_tangents", [1, 3])
def test_small_low_rank_estimates_are_plain_tensors(num_tangents):
    model = nn.Linear(3, 2)
    estimator = fgtrain.ForwardGradient(fgtrain.LowRank(), num_tangents=num_tangents)
    estimate = estimator(model, lambda m: m(torch.ones(1, 3)).sum(1), generator=torch.Generator().manual_seed(0))
    assert type(estimate.grads["weight"]) is torch.Tensor
    params = dict(model.named_parameters())
    tangents = fgtrain.LowRank().sample(params, fgtrain.draw_seeds(torch.Generator().manual_seed(0), num_tangents))
    assert isinstance(tangents["weight"], LowRankTangent)
    expected = torch.einsum("k,kmn->mn", estimate.directional_derivatives / num_tangents, tangents["weight"].dense())
    torch.testing.assert_close(estimate.grads["weight"], expected)
