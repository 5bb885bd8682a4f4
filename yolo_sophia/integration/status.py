"""What `yolo-sophia status` tells about Ultralytics: every seam, and what does not fit."""

from __future__ import annotations

from types import ModuleType

from yolo_sophia import autoload
from yolo_sophia.integration import arguments
from yolo_sophia.integration.patches import LEDGER, SUPPORTED


def seam_report() -> tuple[list[str], list[str]]:
    """Import the modules with seams and say what happened to each.

    Without the hooks, the seams are set for the report and taken back.

    Returns:
        Lines to print, and problems; no problems means that optimizer=SophiaG can be used.
    """
    import ultralytics.engine.trainer
    import ultralytics.engine.tuner  # noqa: F401 - importing is what lets the hooks patch

    by_hand = not autoload.installed()
    if by_hand:
        for name in autoload.TARGETS:
            LEDGER.patch(name)
    lines = [f"supported: {SUPPORTED}", f"seams{' (as install() would set them)' if by_hand else ''}:"]
    lines.append(f"  ultralytics.utils.DEFAULT_CFG_DICT: {', '.join(arguments.OUR_KEYS)} added")
    for entry in LEDGER.replaced:
        place = entry.owner.__name__
        if not isinstance(entry.owner, ModuleType):
            place = f"{entry.owner.__module__}.{place}"
        lines.append(f"  {place}.{entry.name}: replaced")
    problems = list(LEDGER.problems)
    if by_hand:
        LEDGER.restore()
    return lines, problems
