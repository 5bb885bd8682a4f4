"""How plain `yolo` reaches this package: post-import hooks, set by one `.pth` line at interpreter start.

The rule: nothing but the hooks happens until Ultralytics is imported by somebody else; torch and ultralytics are not
imported from here. `YOLO_SOPHIA_AUTOLOAD=0` keeps even the hooks away. `install` and `uninstall` do the same by hand,
also in a live process (a notebook after `!pip install`) where the `.pth` line has not run.
"""

import os
import sys

TARGETS = (
    "ultralytics.utils",
    "ultralytics.cfg",
    "ultralytics.nn.tasks",
    "ultralytics.engine.model",
    "ultralytics.engine.trainer",
    "ultralytics.engine.tuner",
)
"""Modules with seams; each is patched right after its own code has run."""


class _PostImportFinder:
    """Finds the target modules as the other finders do, and patches each once it is loaded."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in TARGETS:
            return None
        for finder in sys.meta_path:
            if finder is _PostImportFinder or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                break
        else:
            return None
        original = spec.loader.exec_module

        def exec_module(module):
            original(module)
            if _PostImportFinder in sys.meta_path:  # uninstalled meanwhile: leave the module alone
                patch_module(module.__name__)

        spec.loader.exec_module = exec_module
        return spec


def patch_module(name: str) -> None:
    """Set the seams of one loaded module of Ultralytics; a second call changes nothing.

    Args:
        name: One of `TARGETS`.
    """
    from yolo_sophia.integration.patches import LEDGER

    LEDGER.patch(name)


def start() -> None:
    """Set the post-import hooks, unless `YOLO_SOPHIA_AUTOLOAD` is 0; the `.pth` line calls this."""
    if os.environ.get("YOLO_SOPHIA_AUTOLOAD", "1") != "0" and _PostImportFinder not in sys.meta_path:
        sys.meta_path.insert(0, _PostImportFinder)


def install() -> None:
    """Make Ultralytics know SophiaG, now and for modules that are imported later; idempotent.

    Raises:
        RuntimeError: The installed Ultralytics is not supported, or moved what this package depends on.
    """
    import importlib

    if _PostImportFinder not in sys.meta_path:
        sys.meta_path.insert(0, _PostImportFinder)
    for name in TARGETS:
        if name in sys.modules:
            importlib.import_module(name)  # waits for another thread that is importing it
            patch_module(name)
    if seams := sys.modules.get("yolo_sophia.integration.patches"):
        seams.LEDGER.require_sound()


def uninstall() -> None:
    """Give Ultralytics every attribute back that was replaced, and remove the hooks; idempotent."""
    if _PostImportFinder in sys.meta_path:
        sys.meta_path.remove(_PostImportFinder)
    if seams := sys.modules.get("yolo_sophia.integration.patches"):
        seams.LEDGER.restore()


def installed() -> bool:
    """Whether the hooks are set, by the autoload or by `install`."""
    return _PostImportFinder in sys.meta_path
