"""What fgtrain borrows of PyTorch beyond its documentation: a release that changes one of these fails here by name."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fgtrain import _torch
from fgtrain.lightning._lightning import configure_optimizers

PACKAGE = Path(_torch.__file__).parent


class Override(Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return "asked"


def override():
    return torch.ones(2).as_subclass(Override)


def test_plain_tensors_asks_nobody():
    x = override()
    assert torch.sin(x) == "asked"
    with _torch.plain_tensors():
        assert isinstance(torch.sin(x), Tensor)
        with _torch.overrides_of_tensors():
            assert torch.sin(x) == "asked"


def test_no_torch_function():
    quiet = type("Quiet", (Tensor,), {"__torch_function__": _torch.no_torch_function})
    assert isinstance(torch.sin(torch.ones(2).as_subclass(quiet)), Tensor)


def test_set_grad_enabled():
    _torch.set_grad_enabled(False)
    try:
        assert not torch.is_grad_enabled()
    finally:
        _torch.set_grad_enabled(True)


def test_is_inside_transform():
    found = []
    torch.func.vmap(lambda x: found.append(_torch.is_inside_transform(x)) or x)(torch.ones(2))
    assert found == [True]
    assert not _torch.is_inside_transform(torch.ones(2))


def test_owners_have_the_functions_written_in_cpp():
    assert any(hasattr(owner, "gelu") for owner in _torch.FUNCTION_OWNERS)


def test_requires_grad_is_what_an_override_is_given():
    class Noting(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            return func == _torch.REQUIRES_GRAD

    assert torch.ones(2).as_subclass(Noting).requires_grad is True


def test_safe_softmax_of_masked_rows():
    assert torch.equal(_torch.safe_softmax(torch.full((1, 2), -torch.inf), -1), torch.zeros(1, 2))


def test_gamma():
    concentration = torch.tensor([2.0])
    sample = _torch.standard_gamma(concentration, torch.Generator().manual_seed(0))
    assert _torch.standard_gamma_grad(concentration, sample).item() > 0


def test_packing_is_undone():
    numbers, lengths = torch.arange(6.0).view(3, 2, 1), torch.tensor([3, 2])
    rows, sizes = _torch.pack_padded_sequence(numbers, lengths, False)
    again, found = _torch.pad_packed_sequence(rows, sizes, False, -1.0, 3)
    assert torch.equal(found, lengths)
    assert torch.equal(again[:2], numbers[:2])


def test_many_at_once():
    (norm,), copies = _torch.foreach_norm([torch.tensor([3.0, 4.0])], 2), [torch.zeros(1)]
    _torch.foreach_copy(copies, [torch.ones(1)])
    assert norm.item() == 5
    assert copies[0].item() == 1


def test_trees():
    leaves, spec = _torch.tree_flatten({"a": [1, 2]})
    assert _torch.tree_leaves({"a": [1, 2]}) == leaves == [1, 2]
    assert _torch.tree_unflatten(leaves, spec) == _torch.tree_map(lambda x: x, {"a": [1, 2]})
    assert _torch.tree_map_only(int, str, ("a", 1)) == ("a", "1")


def test_dispatch_mode_sees_operations():
    seen = []

    class Mode(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).sin()
    assert torch.ops.aten.sin.default in seen


def test_is_compiled():
    model = nn.Linear(1, 1)
    assert not _torch.is_compiled(model)
    wrapped: Any = torch.compile(nn.Linear(1, 1))
    assert _torch.is_compiled(wrapped)
    model.compile()
    assert _torch.is_compiled(model)


def test_graphs_are_compiled_as_they_are():
    graph = torch.fx.symbolic_trace(lambda x: x.sin() + 1)
    x = torch.ones(3)
    with _torch.no_fake_tensor_cache():
        compiled = _torch.compile_graph(graph, [x], {"fallback_random": True})
    torch.testing.assert_close(compiled(x), [x.sin() + 1] if isinstance(compiled(x), (list, tuple)) else x.sin() + 1)


def test_optimizers_of_lightning():
    optimizer = torch.optim.SGD([torch.ones(1, requires_grad=True)])
    assert configure_optimizers(optimizer)[0] == [optimizer]


def test_a_ban_on_hooks_is_undone():
    with _torch.saved_tensor_hooks_as_they_were():
        torch._C._autograd._saved_tensors_hooks_disable("banned here")
    x = torch.ones(1, requires_grad=True)
    checkpoint(torch.sin, x, use_reentrant=False).sum().backward()  # needs the hooks
    assert x.grad is not None


PRIVATE = re.compile(
    r"torch\.(?:\w+\.)*_[a-zA-Z]\w*|from torch\S*\._\w+ import"
    r"|(?<!fgtrain\.)lightning\.(?:\w+\.)*_\w+|import _[a-zA-Z]\w+"
)


@pytest.mark.parametrize(
    "file", [p for p in PACKAGE.rglob("*.py") if p.name not in ("_torch.py", "_lightning.py")], ids=lambda p: p.stem
)
def test_private_names_stand_in_two_files(file):
    code = re.sub(r"#.*", "", re.sub(r'""".*?"""', "", file.read_text(), flags=re.DOTALL))
    found = [name for name in PRIVATE.findall(code) if "_make_wrapper_subclass" not in name]  # PyTorch's notes name it
    assert not found
