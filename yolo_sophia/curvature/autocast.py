"""Switching automatic mixed precision off, on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def no_autocast(device: torch.device) -> AbstractContextManager:
    """Context without autocast on a device, whether or not this PyTorch knows autocast there (2.4: not on MPS)."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()
