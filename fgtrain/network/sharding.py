"""Parameters whose rows are distributed over ranks (FSDP2).

A sharded parameter is a DTensor with the shape of the whole parameter. Every rank draws whole low-rank directions, m +
n numbers each, so a rank knows its own rows of the update without communication.
"""

from typing import Any

from torch import Tensor, nn

from fgtrain.errors import ConfigError


def is_sharded(p: Tensor) -> bool:
    """Whether p is a DTensor, tested without importing it."""
    return hasattr(p, "to_local")


def own_rows(p: Any) -> slice:
    """This rank's rows of a sharded parameter: dimension 0 in equal chunks, the last ones shorter or empty."""
    mesh = p.device_mesh
    chunk = -(-p.shape[0] // mesh.size())
    start = min(mesh.get_local_rank() * chunk, p.shape[0])
    return slice(start, min(start + chunk, p.shape[0]))


def from_own_rows(rows: Tensor, p: Any) -> Tensor:
    """A tensor sharded like p, with `rows` as this rank's rows."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows.reshape(p.to_local().shape).to(p.dtype),
        p.device_mesh,
        p.placements,
        run_check=False,
        shape=p.shape,
        stride=p.stride(),
    )


def whole(tensor: Any) -> Tensor:
    """The tensor with the rows of all ranks, which must call this together; an unsharded tensor is unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def like_parameter(tensor: Tensor, p: Any) -> Tensor:
    """A whole tensor, moved to the device of p and sharded like p."""
    tensor = tensor.to(p.device)
    return from_own_rows(tensor[own_rows(p)], p) if is_sharded(p) else tensor


def shard(model: nn.Module, mesh: Any) -> None:
    """Distribute the rows of every parameter over the ranks of `mesh`, which must start from equal parameters.

    A module that owns parameters is gathered for its forward pass and freed after it.

    Raises:
        ConfigError: two modules share a parameter.
    """
    from torch.distributed.fsdp import fully_shard

    units = _units(model)
    owners: dict[int, str] = {}
    for name, unit in units:
        for p in unit.parameters():
            if owners.setdefault(id(p), name) != name:
                raise ConfigError(
                    f"FSDP2 cannot shard a parameter that '{owners[id(p)]}' and '{name}' share; use Replicas"
                )
    for _, unit in units:
        fully_shard(unit, mesh=mesh, reshard_after_forward=True)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def _units(module: nn.Module, name: str = "") -> list[tuple[str, nn.Module]]:
    """The outermost modules, below the model itself, that own parameters."""
    if name and module._parameters:
        return [(name, module)]
    children = module.named_children()
    return [unit for child, part in children for unit in _units(part, f"{name}.{child}" if name else child)]
