"""Optimizers of the Sophia family; PyTorch only, usable with any model."""

from yolo_sophia.optim.sophia import DecoupledSophia, Sophia
from yolo_sophia.optim.sophia_g import SophiaG
from yolo_sophia.optim.sophia_h import SophiaH

__all__ = ["DecoupledSophia", "Sophia", "SophiaG", "SophiaH"]
