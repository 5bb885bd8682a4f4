"""What `yolo-sophia status` reports about Ultralytics: every symbol that this package depends on, and its state."""

from __future__ import annotations

from importlib import import_module

from yolo_sophia import autoload
from yolo_sophia.integration import contract
from yolo_sophia.integration.patch_set import SUPPORTED, place_of
from yolo_sophia.integration.patches import PATCHES


def patch_report() -> tuple[list[str], list[str]]:
    """Import the modules that are patched, and describe the state of each symbol of contract.py.

    Without the hooks, the patches are applied for the report and removed again.

    Returns:
        Lines to print, and problems; no problems means that optimizer=SophiaG can be used.
    """
    by_hand = not autoload.hooked()
    for name in autoload.TARGETS:
        import_module(name)
        PATCHES.patch(name)
    replaced = {f"{place_of(entry.owner)}.{entry.name}" for entry in PATCHES.replaced}
    differences = contract.differences()
    lines = [f"supported: {SUPPORTED}", f"patches{' (as install() would apply them)' if by_hand else ''}:"]
    lines.append(f"  arguments added: {', '.join(sorted(PATCHES.added_keys()))}")
    for symbol in contract.CONTRACT:
        if symbol.place in differences:
            state = differences[symbol.place]
        elif symbol.use == "patched":
            state = "patched" if symbol.place in replaced else "not patched"
        else:
            state = symbol.use if contract.find(symbol.place) is not None else "not in this version"
        lines.append(f"  {symbol.place}{f' ({symbol.attribute})' if symbol.attribute else ''}: {state}")
    problems = [*PATCHES.problems, *(text for text in differences.values() if text not in PATCHES.problems)]
    if by_hand:
        PATCHES.restore()
    return lines, problems
