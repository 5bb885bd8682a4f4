"""Agreement of several processes that train one model: the mean of their estimates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """Number of processes of the default group; 1 where none is initialized."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process' number in the default group."""
    return dist.get_rank() if ranks() > 1 else 0


def is_sharded(p: Tensor) -> bool:
    """Whether each rank holds another part of a parameter: a DTensor, or one of FullyShardedDataParallel."""
    return hasattr(p, "to_local") or hasattr(p, "_is_flat_param") or hasattr(p, "_fsdp_flattened")


def mean_over_ranks(params: Sequence[Tensor], values: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The mean of each value over the ranks: the same on all of them, NaN included.

    Args:
        params: Parameters; values of sharded ones are returned as they are.
        values: One tensor of the parameter's shape each, or None, which counts as 0 if another rank has a value.
    """
    result, world = list(values), ranks()
    shared = [i for i, p in enumerate(params) if not is_sharded(p)] if world > 1 else []
    if not shared:
        return result
    device = params[shared[0]].device
    present = torch.tensor([values[i] is not None for i in shared], dtype=torch.int32, device=device)
    dist.all_reduce(present, dist.ReduceOp.MAX)
    used = [i for i, n in zip(shared, present.tolist()) if n]
    kinds = {i: (params[i].device, torch.promote_types(params[i].dtype, torch.float32)) for i in used}
    for kind in dict.fromkeys(kinds.values()):
        members = [i for i in used if kinds[i] == kind]
        parts = [torch.zeros_like(params[i]) if values[i] is None else values[i] for i in members]
        parts = [part.to(*kind) for part in parts]
        flat = torch.cat([part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        flat /= world
        for i, part in zip(members, flat.split([part.numel() for part in parts])):
            result[i] = part.view(params[i].shape)
    return result


def all_agree(condition: bool, device: torch.device) -> bool:
    """Whether a condition holds on all ranks."""
    if ranks() == 1:
        return condition
    agreed = torch.tensor(int(condition), device=device)
    dist.all_reduce(agreed, dist.ReduceOp.MIN)
    return bool(agreed)
