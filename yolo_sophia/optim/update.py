"""Chooses the implementation of the update rule; all give the reference's numbers within rounding."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from yolo_sophia.optim.chunked import chunked_update
from yolo_sophia.optim.foreach import foreach_update
from yolo_sophia.optim.fused import fused_update
from yolo_sophia.optim.reference import Update, single_tensor_update


def choose_update(group: dict[str, Any], params: list[Tensor]) -> Update:
    """The implementation for a parameter group: what its flags ask for, else what is fast on its device.

    Args:
        group: `fused` and `foreach`, not both true.
        params: The parameters to update, at least one.
    """
    if group["fused"]:
        return fused_update
    if group["foreach"] is not None:
        return foreach_update if group["foreach"] else single_tensor_update
    devices = {p.device.type for p in params}
    if devices == {"cpu"}:
        return chunked_update
    return foreach_update if devices == {"cuda"} else single_tensor_update
