"""What this package expects of Ultralytics: every symbol that is patched, wrapped or recorded, with its form.

patches.py takes the expected parameters from this table. `yolo-sophia status`, its check and the table of
docs/VERSIONS.md are made from it.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from importlib import import_module
from typing import Any

MODULES = {
    "ultralytics.utils": "DEFAULT_CFG_DICT",
    "ultralytics.cfg": "get_cfg",
    "ultralytics.nn.tasks": "BaseModel",
    "ultralytics.engine.model": "Model",
    "ultralytics.engine.trainer": "BaseTrainer",
    "ultralytics.engine.tuner": "Tuner",
}
"""The modules that are patched, each with an object that its code creates: a new one says it was executed again."""

ALL_VERSIONS = "8.3.0 to 8.4.190"
LATER = "8.4.0 to 8.4.190"


@dataclass(frozen=True)
class Symbol:
    """A symbol of Ultralytics that this package depends on.

    Attributes:
        place: Its dotted name; of a method, with the class.
        use: "extended" (keys are added), "patched" (replaced in its module or class), "wrapped" (replaced on one
            trainer), "called", or "recorded" (calls are recorded during a Hessian update).
        parameters: How its parameters begin; None where it is not a callable of a class or module.
        why: What it is for.
        versions: The versions in which it was found.
        attribute: Where a criterion or model holds it, if it is recorded.
    """

    place: str
    use: str
    parameters: tuple[str, ...] | None
    why: str
    versions: str = ALL_VERSIONS
    attribute: str = ""


_UTILS, _CFG, _TRAINER = "ultralytics.utils.", "ultralytics.cfg.", "ultralytics.engine.trainer."
_LOSS = "ultralytics.utils.loss."
_BASE = f"{_TRAINER}BaseTrainer."
_BOX = (
    "self",
    "pred_dist",
    "pred_bboxes",
    "anchor_points",
    "target_bboxes",
    "target_scores",
    "target_scores_sum",
    "fg_mask",
)
_BUILD = ("self", "model", "name", "lr", "momentum", "decay", "iterations")

CONTRACT = (
    Symbol(f"{_UTILS}DEFAULT_CFG_DICT", "extended", None, "our arguments, in place: the children of `tune` share it"),
    Symbol(f"{_UTILS}DEFAULT_CFG", "extended", None, "our arguments, in place"),
    Symbol(f"{_CFG}CFG_FRACTION_KEYS", "extended", None, "the kinds of our arguments"),
    Symbol(f"{_CFG}CFG_INT_KEYS", "extended", None, "the kinds of our arguments"),
    Symbol(f"{_CFG}CFG_BOOL_KEYS", "extended", None, "the kinds of our arguments"),
    Symbol(f"{_CFG}entrypoint", "patched", ("debug",), "which arguments stand on the command line"),
    Symbol("ultralytics.engine.model.Model.train", "patched", ("self", "trainer"), "which arguments are keywords"),
    Symbol("ultralytics.engine.model.Model.tune", "patched", ("self", "use_ray"), "workers of Ray know our arguments"),
    Symbol("ultralytics.nn.tasks.BaseModel.load", "patched", ("self", "weights"), "the class names of the weights"),
    Symbol(f"{_BASE}__init__", "patched", ("self", "cfg", "overrides", "_callbacks"), "which arguments `cfg=` holds"),
    Symbol(f"{_BASE}train", "patched", ("self",), "workers of a multi-GPU run know our arguments"),
    Symbol(f"{_BASE}check_resume", "patched", ("self", "overrides"), "arguments are validated before a folder is made"),
    Symbol(f"{_BASE}build_optimizer", "patched", _BUILD, "the list of optimizers in it is closed"),
    Symbol(
        f"{_TRAINER}convert_optimizer_state_dict_to_fp16", "patched", ("state_dict",), "float16 turns most of h into 0"
    ),
    Symbol(f"{_TRAINER}strip_optimizer", "patched", ("f", "s"), "writes last.pt and best.pt in place"),
    Symbol("ultralytics.engine.tuner.Tuner.__init__", "patched", ("self", "args"), "children get every key explicitly"),
    Symbol("ultralytics.engine.tuner.Tuner.__call__", "patched", ("self",), "children know our arguments"),
    Symbol(f"{_BASE}preprocess_batch", "wrapped", ("self", "batch"), "a micro-batch begins"),
    Symbol(f"{_BASE}run_callbacks", "wrapped", ("self", "event"), "callbacks may replace what is wrapped"),
    Symbol(f"{_BASE}optimizer_step", "wrapped", ("self",), "no gradient-norm clip before a step of Sophia"),
    Symbol(f"{_BASE}save_metrics", "wrapped", ("self", "metrics"), "columns of results.csv"),
    Symbol(f"{_BASE}plot_metrics", "wrapped", ("self",), "sophia.png"),
    Symbol(f"{_BASE}save_model", "wrapped", ("self",), "atomic checkpoints"),
    Symbol(f"{_BASE}final_eval", "wrapped", ("self",), "atomic checkpoints"),
    Symbol("ultralytics.nn.tasks.BaseModel.init_criterion", "called", ("self",), "the criterion that is recorded"),
    Symbol("ultralytics.nn.tasks.BaseModel.loss", "recorded", ("self", "batch"), "all other losses", attribute="loss"),
    Symbol(f"{_LOSS}v8DetectionLoss", "recorded", None, "class scores", attribute="bce"),
    Symbol(f"{_LOSS}BboxLoss.forward", "recorded", _BOX, "boxes", attribute="bbox_loss"),
    Symbol(
        f"{_LOSS}DFLoss.__call__",
        "recorded",
        ("self", "pred_dist", "target"),
        "box bins",
        attribute="bbox_loss.dfl_loss",
    ),
    Symbol(
        f"{_LOSS}v8SegmentationLoss.single_mask_loss",
        "recorded",
        ("gt_mask", "pred", "proto", "xyxy", "area"),
        "masks",
        attribute="single_mask_loss",
    ),
    Symbol(
        f"{_LOSS}BCEDiceLoss.forward", "recorded", ("self", "pred", "target"), "semantic masks", LATER, "bcedice_loss"
    ),
    Symbol(
        f"{_LOSS}KeypointLoss.forward",
        "recorded",
        ("self", "pred_kpts", "gt_kpts", "kpt_mask", "area"),
        "keypoints",
        attribute="keypoint_loss",
    ),
    Symbol(f"{_LOSS}v8PoseLoss", "recorded", None, "visibility of keypoints", attribute="bce_pose"),
    Symbol(
        f"{_LOSS}RLELoss.forward",
        "recorded",
        ("self", "sigma", "log_phi", "error", "target_weight"),
        "keypoints of YOLO26",
        LATER,
        "rle_loss",
    ),
    Symbol(
        f"{_LOSS}v8OBBLoss.calculate_angle_loss",
        "recorded",
        ("self", "pred_bboxes", "target_bboxes", "fg_mask"),
        "angles of boxes",
        LATER,
        "calculate_angle_loss",
    ),
    Symbol(
        "ultralytics.nn.distill_model.DistillationModel.loss_sl2",
        "recorded",
        None,
        "distillation",
        "8.4.100 to 8.4.190",
        "loss_sl2",
    ),
)


def find(place: str) -> Any:
    """The object of a dotted name, or None where it is not there."""
    parts = place.split(".")
    for end in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:end])
        try:
            found = sys.modules.get(name) or import_module(name)
        except ImportError:
            continue
        for part in parts[end:]:
            found = getattr(found, part, None)
        return found
    return None


def difference(place: str, found: Any) -> str | None:
    """How a symbol differs from what is expected, in words, or None.

    Args:
        place: Its dotted name.
        found: The object, or None where it is gone.
    """
    symbol = next(symbol for symbol in CONTRACT if symbol.place == place)
    expected = f", expected {symbol.parameters}" if symbol.parameters else ""
    if found is None:
        return f"{place} is gone{expected}"
    if symbol.parameters is None:
        return None
    takes = tuple(inspect.signature(found).parameters) if callable(found) else ()
    return None if takes[: len(symbol.parameters)] == symbol.parameters else f"{place} takes {takes}{expected}"


def differences() -> dict[str, str]:
    """How the installed Ultralytics differs, by symbol; those that older versions lack may be missing."""
    found = {symbol.place: find(symbol.place) for symbol in CONTRACT}
    optional = {symbol.place for symbol in CONTRACT if symbol.versions != ALL_VERSIONS}
    texts = {
        place: difference(place, value) for place, value in found.items() if value is not None or place not in optional
    }
    return {place: text for place, text in texts.items() if text}


def markdown() -> str:
    """The table of docs/VERSIONS.md."""
    rows = ["| Symbol of Ultralytics | Use | Parameters | For | Versions |", "|---|---|---|---|---|"]
    for symbol in CONTRACT:
        place = symbol.place.removeprefix("ultralytics.") + (f" (`.{symbol.attribute}`)" if symbol.attribute else "")
        name, _, rest = place.partition(" ")
        parameters = ", ".join(symbol.parameters) if symbol.parameters else "-"
        rows.append(
            f"| `{name}`{' ' + rest if rest else ''} | {symbol.use} | {parameters} | {symbol.why} | {symbol.versions} |"
        )
    return "\n".join(rows) + "\n"
