"""PyTorch's own forward mode, one direction at a time, for functions without a rule."""

from typing import Any

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor

from fgtrain._torch import tree_flatten, tree_leaves, tree_unflatten
from fgtrain.forward_ad.dual import Dual, dual, duals_in, primal_of, tangent_of
from fgtrain.forward_ad.lost_derivatives import is_differentiable
from fgtrain.forward_ad.passes import UnsupportedByEngine
from fgtrain.forward_ad.registry import Rule
from fgtrain.forward_ad.running import is_traced, num_traced_draws
from fgtrain.forward_ad.steep import STEEP, call_steep
from fgtrain.forward_ad.transposed import laid_out, run_transposed
from fgtrain.network.snapshot import TorchRandomState


def per_direction(func: Any) -> Rule:
    """A rule for `func` by PyTorch's forward mode, once per direction, each time with the same random numbers.

    Where that gives no derivative, the rule runs the function once and transposes its derivative in reverse mode.
    """

    def rule(*args: Any, **kwargs: Any) -> Any:
        before = TorchRandomState({x.device for x in duals_in((args, kwargs))})
        try:
            found = forward(args, kwargs, before)
            if is_traced() or not any(map(_is_constant, tree_leaves(found))):
                return found
            refusal = NotImplementedError(
                f"forward AD with {getattr(func, '__name__', func)} that loses its derivative"
            )
        except NotImplementedError as error:
            if is_traced():
                raise
            refusal = error
        before.restore()
        moving = {id(x): x for x in duals_in((args, kwargs))}
        parts = {key: (primal_of(x), tangent_of(x)) for key, x in moving.items()}
        try:
            return run_transposed(func, args, kwargs, parts, lambda x, t: dual(x, t, *moving.values()))
        except UnsupportedByEngine:
            raise refusal from None

    def forward(args: tuple[Any, ...], kwargs: dict[str, Any], before: TorchRandomState) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        sources = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Dual)}
        pairs = [(i, laid_out(primal_of(source)), tangent_of(source)) for i, source in sources.items()]
        num_tangents = pairs[0][2].shape[0]
        plain = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and not isinstance(leaf, Dual)]
        # The missing tangent of a layer's input is a tensor of zeros without memory, which cannot be traced.
        still = [i for i in plain if is_traced() and 0 not in sources and is_differentiable(leaves[i])]
        untouched = [leaves[i].clone() for i in plain] if num_tangents > 1 else []
        columns, out_spec, drawn = [], None, num_traced_draws()
        for k in range(num_tangents):
            if k:  # earlier directions have drawn random numbers and may have changed running statistics
                if num_traced_draws() != drawn:
                    raise UnsupportedByEngine("random numbers that must be the same for every direction")
                before.restore()
                for i, leaf in zip(plain, untouched, strict=True):
                    leaves[i] = leaf.clone()
            with fwAD.dual_level():
                for i, primal, tangent in pairs:
                    leaves[i] = fwAD.make_dual(primal, tangent[k])
                for i in still:
                    leaves[i] = fwAD.make_dual(leaves[i], torch.zeros_like(leaves[i]))
                positional, keywords = tree_unflatten(leaves, spec)
                found = call_steep(func, positional, keywords) if func in STEEP else func(*positional, **keywords)
                outputs, out_spec = tree_flatten(found)
                columns.append([fwAD.unpack_dual(o) if is_differentiable(o) else (o, None) for o in outputs])
        assert out_spec is not None
        results = []
        for parts in zip(*columns, strict=True):
            primal, tangent = parts[0]
            if tangent is not None:
                tangent = torch.stack([part[1] for part in parts]) if num_tangents > 1 else tangent.unsqueeze(0)
            results.append(dual(primal, tangent, *sources.values()))
        return tree_unflatten(results, out_spec)

    return rule


def _is_constant(x: Any) -> bool:
    return is_differentiable(x) and not isinstance(x, Dual)
