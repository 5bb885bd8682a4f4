"""Child processes of a training (of `tune`, several data sets, several GPUs) set the hooks of this package.

Where no `.pth` line is active at their start, their PYTHONPATH begins with a folder that has a `sitecustomize.py`.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from yolo_sophia import switch
from yolo_sophia.integration.explicit import CHILD

BOOTSTRAP = str(Path(switch.__file__).parent / "bootstrap")

_LOCK = threading.Lock()
_active = 0
_before: dict[str, str | None] = {}


def needed() -> bool:
    """Whether children of this process start without the hooks."""
    return not switch.started_at_start or os.environ.get(switch.SWITCH, "1") == "0"


@contextmanager
def children_know_us() -> Iterator[None]:
    """While it runs, Python processes that are started set the hooks; other threads may be in it as well."""
    global _active
    with _LOCK:
        if not _active:
            _before.update({name: os.environ.get(name) for name in ("PYTHONPATH", switch.SWITCH, CHILD)})
            os.environ[CHILD] = "1"
            if needed():
                path = os.environ.get("PYTHONPATH")
                os.environ["PYTHONPATH"] = BOOTSTRAP + (os.pathsep + path if path else "")
                os.environ[switch.SWITCH] = "1"
        _active += 1
    try:
        yield
    finally:
        with _LOCK:
            _active -= 1
            if not _active:
                for name, value in _before.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value


def _has_hooks() -> bool:
    import yolo_sophia  # on a worker

    return yolo_sophia.installed()


def require_ray_workers() -> None:
    """Refuse `model.tune(use_ray=True)` where its workers would not know the arguments of this package.

    A cluster that is started by the call inherits this process's environment. One that is running does not.

    Raises:
        RuntimeError: A worker of the running cluster has no hooks.
    """
    ray = sys.modules.get("ray")
    if ray is None or not needed() or not ray.is_initialized():
        return
    try:
        has_hooks = ray.get(ray.remote(_has_hooks).remote())
    except Exception:  # the package is not there, for example
        has_hooks = False
    if not has_hooks:
        raise RuntimeError(
            "optimizer=SophiaG with use_ray=True: Ray is running already, and its workers start without yolo-sophia. "
            f"Install yolo-sophia with pip in their environment, without {switch.SWITCH}=0, or call ray.shutdown() "
            "before model.tune()."
        )
