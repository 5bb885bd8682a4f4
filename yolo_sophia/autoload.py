"""How plain `yolo` reaches this package: post-import hooks, set by one `.pth` line at interpreter start.

Neither torch nor ultralytics is imported from here. `YOLO_SOPHIA_AUTOLOAD=0` disables the `.pth` line; `install` and
`uninstall` set and remove the hooks by hand, also in a running process.
"""

import os
import sys

from yolo_sophia import switch

TARGETS = (
    "ultralytics.utils",
    "ultralytics.cfg",
    "ultralytics.nn.tasks",
    "ultralytics.engine.model",
    "ultralytics.engine.trainer",
    "ultralytics.engine.tuner",
)
"""Modules that are patched, each right after its own code has run."""


class _PostImportFinder:
    """Finds the target modules as the other finders do, and patches each once its code has run."""

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
            # Not if it was uninstalled meanwhile; the loader of an archive is shared by all of its modules.
            if hooked() and module.__name__ == name:
                patch_module(name)

        spec.loader.exec_module = exec_module
        return spec


def hooked() -> bool:
    """Whether modules of Ultralytics that are imported from now on will be patched."""
    return _PostImportFinder in sys.meta_path


def _hook() -> None:
    if not hooked():
        sys.meta_path.insert(0, _PostImportFinder)


def patch_module(name: str) -> None:
    """Patch one loaded module of Ultralytics, unless it is patched; source patches (patches/) call this.

    Args:
        name: One of `TARGETS`.
    """
    from yolo_sophia.integration.patches import PATCHES

    if name == TARGETS[0]:
        _hook()  # a tree with a source patch of an older version lacks the calls for later targets
    PATCHES.patch(name)


def start() -> None:
    """Set the post-import hooks, unless `YOLO_SOPHIA_AUTOLOAD` is 0; the `.pth` line calls this."""
    if os.environ.get(switch.SWITCH, "1") != "0":
        switch.started_at_start = True
        _hook()


def install() -> None:
    """Make SophiaG known to Ultralytics, now and for modules that are imported later; idempotent.

    Modules that were reloaded or imported again since are patched again.

    Raises:
        RuntimeError: The installed Ultralytics is not supported, or changed what this package depends on.
    """
    import importlib

    _hook()
    for name in TARGETS:
        if name in sys.modules:
            importlib.import_module(name)  # waits for another thread that is importing it
            patch_module(name)
    if patches := sys.modules.get("yolo_sophia.integration.patches"):
        patches.PATCHES.require_supported()


def uninstall() -> None:
    """Restore every attribute of Ultralytics that was replaced, and remove the hooks; idempotent."""
    if hooked():
        sys.meta_path.remove(_PostImportFinder)
    if patches := sys.modules.get("yolo_sophia.integration.patches"):
        patches.PATCHES.restore()


def installed() -> bool:
    """Whether the loaded modules of Ultralytics are patched, and those that are imported later will be."""
    loaded = [name for name in TARGETS if name in sys.modules]
    patches = sys.modules.get("yolo_sophia.integration.patches")
    return hooked() and all(patches is not None and patches.PATCHES.is_patched(name) for name in loaded)
