"""Which backward passes an estimate takes."""

from unittest.mock import patch

import torch


def backward_passes(model, estimate):
    """(whether autograd ran backwards, names of the parameters in the graph of each call of torch.autograd.grad)."""
    names = {id(p): name for name, p in model.named_parameters()}
    unpacked, reached, grad = [], [], torch.autograd.grad

    def unpack(saved):
        unpacked.append(saved)
        return saved

    def spy(outputs, *args, **kwargs):
        reached.append({names[id(p)] for p in _leaves(outputs.grad_fn) if id(p) in names})
        return grad(outputs, *args, **kwargs)

    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, unpack), patch("torch.autograd.grad", spy):
        estimate()
    return bool(unpacked), reached


def _leaves(node):
    seen, stack = set(), [node]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        stack += [following for following, _ in node.next_functions]
