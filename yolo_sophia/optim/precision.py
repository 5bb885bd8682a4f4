"""The memory-lean choice: m and h stored in another dtype than the parameter, by default in none.

The arithmetic stays in float32 (`reference.working_dtype`); only what is kept is rounded. bfloat16 keeps 8 bits: an
average that moves by less than 1/512 of itself stands still under rounding to nearest. The momentum moves by more
than that in nearly every step (1 - b1 is .035 or more); h does not (1 - b2 is .01), so h is rounded at random: up
with the probability of the part cut off, which keeps its expectation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SETTINGS = {"exp_avg": "momentum_dtype", "hessian": "hessian_dtype"}
"""State tensors and the keys of a parameter group that name their dtypes (None: the parameter's)."""

STORABLE = (torch.float32, torch.bfloat16)
"""No float16: h is tiny, and half of it would become 0, which means: always clipped."""


def stored_dtype(group: dict[str, Any], p: Tensor, key: str) -> torch.dtype:
    """The dtype in which a parameter's state `key` is kept; other states' is the parameter's."""
    return group.get(SETTINGS.get(key, ""), None) or p.dtype


def round_at_random(value: Tensor, seed: int) -> Tensor:
    """Round float32 to bfloat16, up or down so that the expectation is the value.

    Args:
        value: A float32 tensor.
        seed: Decides the rounding, together with the shape and the device; the global random state is not touched.
    """
    generator = torch.Generator(value.device).manual_seed(seed)
    bits = value.contiguous().view(torch.int32)
    cut = torch.randint(0, 1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=value.device)
    return (bits + cut).bitwise_and_(-1 << 16).view(torch.float32).to(torch.bfloat16)
