"""PyTorch's databases of modules and operations: derivatives equal those of backpropagation or are refused by name."""

import importlib
import warnings

import pytest
import torch

from fgtrain import LowRank, Normal, directional_derivatives
from fgtrain.errors import UserError
from fgtrain.tangents.directions import dense

PARTS = 12
DIRECTIONS = [(Normal(), 1), (Normal(), 3), (LowRank(1), 1), (LowRank(1), 3)]

REFUSED = {
    "_segment_reduce.lengths": "with an initial value, or lengths of its own for every row",
    "_segment_reduce.offsets": "with an initial value, or offsets of its own for every row",
    "sparse.mm.reduce": "the sparse matrix itself moves; a constant one times a dense one is followed",
    "sparse.sampled_addmm": "the result is a sparse tensor that moves",
    "to_sparse": "the result is a sparse tensor that moves",
    "to_sparse method": "the result is a sparse tensor that moves",
    "torch.ops.aten._scaled_dot_product_flash_attention_for_cpu": "F.scaled_dot_product_attention is followed",
}
"""{operation or module: why}. All of its samples or some."""

BACKWARD_IS_WRONG = {
    "as_strided_scatter": "places that src covers keep their gradient",
    "as_strided_scatter method": "places that src covers keep their gradient",
    "nn.functional.max_unpool1d": "where an index is repeated, each of its numbers counts",
    "nn.functional.max_unpool2d": "where an index is repeated, each of its numbers counts",
    "nn.functional.max_unpool3d": "where an index is repeated, each of its numbers counts",
}
"""{operation: what PyTorch's backward pass does}: here central differences are the oracle."""

PRECISION = {"bfloat16": 2e-2, "half": 2e-3, "chalf": 2e-3, "float": 1e-6, "cfloat": 1e-6}
"""Operations that round to another dtype, and how well their derivatives can be known; others are in float64."""


def backpropagated(problem):
    """Loss, gradients and whether all are finite; None if there is nothing to differentiate."""
    model = problem.build()
    params = dict(model.named_parameters())
    torch.default_generator.manual_seed(3)
    try:
        loss = problem.loss(model) if params else None
        if not isinstance(loss, torch.Tensor) or not loss.requires_grad:
            return None
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    except RuntimeError:  # no function, or not differentiable in one of its inputs
        return None
    if not all(x.isfinite().all() for x in (loss, *grads)):
        return None
    return loss.detach(), dict(zip(params, grads, strict=True))


def by_differences(problem, directions, step=1e-6):
    def loss_at(scale, k):
        model = problem.build()
        torch.default_generator.manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.add_(dense(directions[name])[k], alpha=scale)
            return problem.loss(model)

    num = len(dense(next(iter(directions.values()))))
    return torch.stack([(loss_at(step, k) - loss_at(-step, k)) / (2 * step) for k in range(num)])


def outcome(name, problem, loss, grads, law, num_tangents):
    """ "exact", "refused", or what is wrong."""
    model = problem.build()
    directions = law.sample(dict(model.named_parameters()), range(num_tangents))
    torch.default_generator.manual_seed(3)
    try:
        losses, found = directional_derivatives(model, problem.loss, directions)
    except UserError as refusal:
        return "refused" if "\n" not in str(refusal) else f"refused in several lines: {refusal}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    products = [(dense(directions[n]) * g).reshape(num_tangents, g.numel()) for n, g in grads.items()]
    expected, size = torch.cat(products, 1).sum(1), torch.cat(products, 1).norm(dim=1)
    tolerance = PRECISION.get(name.split()[0], 1e-9)
    if name in BACKWARD_IS_WRONG:
        expected, tolerance = by_differences(problem, directions), 1e-6
    exact = ((found - expected).abs() <= tolerance * (size + expected.abs()) + 1e-12).all()
    if not exact or not torch.allclose(losses, loss, rtol=tolerance, atol=tolerance * 1e-2):
        return f"{found.tolist()} instead of {expected.tolist()}, loss {losses} of {loss}"
    return "exact"


def assert_right_or_refused(name, problems):
    wrong, refused = [], 0
    for problem in problems:
        known = backpropagated(problem)
        for law, num_tangents in DIRECTIONS if known else []:
            found = outcome(name, problem, *known, law, num_tangents)
            refused += found == "refused"
            if found not in ("exact", "refused"):
                wrong.append(f"{name}, {law}, K = {num_tangents}: {found}; {problem.name}")
    assert not wrong
    assert (refused > 0) == (name in REFUSED), f"{name}: refused {refused} times, see REFUSED"


@pytest.fixture(scope="module")
def databases():
    """Imported here alone: that takes ten seconds, and freezes PyTorch's backend flags."""
    frozen = torch.backends.__allow_nonbracketed_mutation_flag
    module = importlib.import_module("tests.databases")
    torch.backends.__allow_nonbracketed_mutation_flag = frozen
    return module


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("kind", ["modules", "operations"])
def test_right_or_refused(kind, part, databases):
    table = list(getattr(databases, kind)())
    failures = []
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # of what is in beta or deprecated
        for name, problems in table[part::PARTS]:
            try:
                assert_right_or_refused(name, problems())
            except AssertionError as failure:
                failures.append(str(failure))
    assert not failures, "\n".join(failures)


@pytest.mark.slow
def test_the_tables_name_what_exists(databases):
    names = {name for name, _ in (*databases.operations(), *databases.modules())}
    assert names >= {*REFUSED, *BACKWARD_IS_WRONG}
