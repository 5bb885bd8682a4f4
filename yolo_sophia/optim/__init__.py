"""Optimizers of the Sophia family; PyTorch only, usable with any model."""

from yolo_sophia.optim.agora import Sophia
from yolo_sophia.optim.decoupled import DecoupledSophia
from yolo_sophia.optim.hutchinson import SophiaH
from yolo_sophia.optim.sophia import SophiaG

__all__ = ["DecoupledSophia", "Sophia", "SophiaG", "SophiaH"]
