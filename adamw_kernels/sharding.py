"""Which part of a whole tensor this process holds, and with which processes it shares the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

# Elements by which the random bits of shards lie apart whose elements are not one run of the whole tensor.
_FAR_APART = 1 << 40


def shard_groups(tensor: torch.Tensor, process_group: Any) -> tuple[Any, ...]:
    """The process groups over which a tensor's sum of squares must be reduced, one after another."""
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return () if process_group is None else (process_group,)
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    # Not is_shard(): the strided shards of tensor parallelism under FSDP2 say no to it.
    return tuple(mesh.get_group(i) for i, placement in enumerate(placements) if not placement.is_replicate())


def is_flat_shard(p: torch.Tensor) -> bool:
    """Whether it is a shard of FullyShardedDataParallel (FSDP1), a plain tensor to look at."""
    return getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter"


_PLACE = "_adamw_kernels_place"  # of a numbered parameter, its attribute


def number_parameters(params: Iterable[torch.Tensor], first: int = 0) -> int:
    """Number parameters, so that each is rounded by the same random bits in whatever optimizer it is.

    Otherwise its position in its optimizer counts, and where processes have different parts of a model
    (`ZeroRedundancyOptimizer`, stages of a pipeline) the weights depend on how many there are. Numbers that are the
    positions in one optimizer for all (`number_parameters(model.parameters())`) give that one's bits. They are
    attributes of the tensors, neither copied nor saved with them: number after a model is copied or wrapped in FSDP2,
    before its first step, and again when a run resumes.

    Args:
        params: in an order that is the same wherever the model is.
        first: number of the first, for the second and further parts of a model.

    Returns:
        The first number that is still free.

    Raises:
        TypeError: not a tensor.
    """
    for p in params:
        if not isinstance(p, torch.Tensor):
            raise TypeError(f"number_parameters: parameter {first} is {type(p).__name__}; expected a torch.Tensor")
        setattr(p, _PLACE, first)
        first += 1
    return first


def random_place(p: torch.Tensor, position: int) -> int:
    """By which a parameter's random bits are told from others': its number or, without one, its position."""
    return int(getattr(p, _PLACE, position))


def first_element(tensor: torch.Tensor, process_group: Any) -> int:
    """Where a shard's random bits begin: the index, in the whole tensor, of its first element.

    So a tensor sharded over its first dimension, evenly or not and over any number of mesh dimensions, is rounded as
    the whole one would be. Shards along another dimension, strided ones and plain tensors over a `process_group` draw
    from ranges of their own: as random, but not the same for another number of shards. Replicas draw the same.
    """
    placements = getattr(tensor, "placements", None)
    if placements is None:
        return 0 if process_group is None else process_group.rank() * _FAR_APART
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    sharding = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    if not sharding:
        return 0
    if all(placements[i].is_shard(0) and type(placements[i]).__name__ == "Shard" for i in sharding):
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        _, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
        return int(offsets[0]) * (tensor.numel() // tensor.shape[0] if tensor.shape[0] else 0)
    coordinate, index = mesh.get_coordinate(), 0
    for i in sharding:
        index = index * int(mesh.size(i)) + int(coordinate[i])
    return index * _FAR_APART


def mesh_groups(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The process groups of a DTensor's mesh, a dimension each; of any other tensor, none."""
    mesh: Any = getattr(tensor, "device_mesh", None)
    return () if mesh is None else tuple(mesh.get_group(i) for i in range(mesh.ndim))


def on_one_mesh(a: Any, b: Any) -> bool:
    """Whether two tensors are cut over the same processes in the same order, or both not: names do not matter."""
    mesh, other = getattr(a, "device_mesh", None), getattr(b, "device_mesh", None)
    if mesh is other:
        return True
    if mesh is None or other is None:
        return False
    return bool(mesh == other or (mesh.device_type == other.device_type and torch.equal(mesh.mesh, other.mesh)))


def description(tensor: torch.Tensor) -> str:
    """What all processes that hold a part of a tensor say of it alike."""
    text = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
    placements: Any = getattr(tensor, "placements", None)
    if placements is None:
        return text
    mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
    return f"{text} {', '.join(map(repr, placements))} on a mesh of {tuple(mesh.shape)}"
