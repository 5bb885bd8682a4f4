"""Sophia, a light second-order optimizer, for Ultralytics YOLO: `yolo train ... optimizer=SophiaG`.

Importing this package imports neither torch nor ultralytics: the `.pth` line of the wheel does it at every interpreter
start. Public names are loaded when they are first used.
"""

__version__ = "0.1.0"

_PUBLIC = {
    "DecoupledSophia": "yolo_sophia.optim",
    "Sophia": "yolo_sophia.optim",
    "SophiaG": "yolo_sophia.optim",
    "SophiaH": "yolo_sophia.optim",
    "install": "yolo_sophia.autoload",
    "uninstall": "yolo_sophia.autoload",
    "installed": "yolo_sophia.autoload",
    "tune_space": "yolo_sophia.tune.model_tune",
}
__all__ = ["DecoupledSophia", "Sophia", "SophiaG", "SophiaH", "install", "installed", "tune_space", "uninstall"]

TYPE_CHECKING = False  # as type checkers read it; typing and __future__ would cost half of the start-up budget
if TYPE_CHECKING:
    from yolo_sophia.autoload import install, installed, uninstall
    from yolo_sophia.optim import DecoupledSophia, Sophia, SophiaG, SophiaH
    from yolo_sophia.tune.model_tune import tune_space


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PUBLIC[name]), name)
