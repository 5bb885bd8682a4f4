"""What this package expects of Ultralytics: every symbol that is patched, wrapped or recorded, with its form.

patches.py, `yolo-sophia status`, its check and the table of docs/VERSIONS.md follow from it.
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


BOX_ARGUMENTS = "pred_dist pred_bboxes anchor_points target_bboxes target_scores target_scores_sum fg_mask"
"""What DetectionRecorder reads from a call of BboxLoss."""


def _extended(place: str, why: str) -> Symbol:
    return Symbol(f"ultralytics.{place}", "extended", None, why)


def _method(place: str, use: str, parameters: str, why: str) -> Symbol:
    return Symbol(f"ultralytics.{place}", use, tuple(parameters.split()), why)


def _trainer(name: str, use: str, parameters: str, why: str) -> Symbol:
    return _method(f"engine.trainer.BaseTrainer.{name}", use, f"self {parameters}", why)


def _loss(name: str, attribute: str, why: str, parameters: str = "", versions: str = ALL_VERSIONS) -> Symbol:
    place = f"ultralytics.utils.loss.{name}"
    return Symbol(place, "recorded", tuple(parameters.split()) or None, why, versions, attribute)


CONTRACT = (
    _extended("utils.DEFAULT_CFG_DICT", "our arguments, in place: the children of `tune` share it"),
    _extended("utils.DEFAULT_CFG", "our arguments, in place"),
    *(_extended(f"cfg.CFG_{kind}_KEYS", "the kinds of our arguments") for kind in ("FRACTION", "INT", "BOOL")),
    _method("cfg.entrypoint", "patched", "debug", "which arguments stand on the command line"),
    _method("engine.model.Model.train", "patched", "self trainer", "which arguments are keywords"),
    _method("engine.model.Model.tune", "patched", "self use_ray", "workers of Ray know our arguments"),
    _method("nn.tasks.BaseModel.load", "patched", "self weights", "which rows come from weights"),
    _method("nn.tasks.parse_model", "patched", "d ch", "which modules are built, not loaded"),
    _trainer("__init__", "patched", "cfg overrides _callbacks", "which arguments `cfg=` holds"),
    _trainer("train", "patched", "", "workers of a multi-GPU run know our arguments"),
    _trainer("check_resume", "patched", "overrides", "arguments are validated before a folder is made"),
    _trainer(
        "build_optimizer",
        "patched",
        "model name lr momentum decay iterations",
        "the list of optimizers in it is closed",
    ),
    _method(
        "engine.trainer.convert_optimizer_state_dict_to_fp16", "patched", "state_dict", "float16 turns most of h into 0"
    ),
    _method("engine.trainer.strip_optimizer", "patched", "f s", "writes last.pt and best.pt in place"),
    _method("engine.tuner.Tuner.__init__", "patched", "self args", "children get every key explicitly"),
    _method("engine.tuner.Tuner.__call__", "patched", "self", "children know our arguments"),
    _trainer("preprocess_batch", "wrapped", "batch", "a micro-batch begins"),
    _trainer("run_callbacks", "wrapped", "event", "callbacks may replace what is wrapped"),
    _trainer("optimizer_step", "wrapped", "", "no gradient-norm clip before a step of Sophia"),
    _trainer("save_metrics", "wrapped", "metrics", "columns of results.csv"),
    _trainer("plot_metrics", "wrapped", "", "sophia.png"),
    _trainer("save_model", "wrapped", "", "atomic checkpoints"),
    _trainer("final_eval", "wrapped", "", "atomic checkpoints"),
    _method("nn.tasks.BaseModel.init_criterion", "called", "self", "the criterion that is recorded"),
    Symbol("ultralytics.nn.tasks.BaseModel.loss", "recorded", ("self", "batch"), "all other losses", attribute="loss"),
    _loss("v8DetectionLoss", "bce", "class scores"),
    _loss("BboxLoss.forward", "bbox_loss", "boxes", f"self {BOX_ARGUMENTS}"),
    _loss("DFLoss.__call__", "bbox_loss.dfl_loss", "box bins", "self pred_dist target"),
    _loss("v8SegmentationLoss.single_mask_loss", "single_mask_loss", "masks", "gt_mask pred proto xyxy area"),
    _loss("BCEDiceLoss.forward", "bcedice_loss", "semantic masks", "self pred target", LATER),
    _loss("KeypointLoss.forward", "keypoint_loss", "keypoints", "self pred_kpts gt_kpts kpt_mask area"),
    _loss("v8PoseLoss", "bce_pose", "visibility of keypoints"),
    _loss("RLELoss.forward", "rle_loss", "keypoints of YOLO26", "self sigma log_phi error target_weight", LATER),
    _loss(
        "v8OBBLoss.calculate_angle_loss",
        "calculate_angle_loss",
        "angles of boxes",
        "self pred_bboxes target_bboxes fg_mask",
        LATER,
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
    found = [(symbol, find(symbol.place)) for symbol in CONTRACT]
    texts = {s.place: difference(s.place, o) for s, o in found if o is not None or s.versions == ALL_VERSIONS}
    return {place: text for place, text in texts.items() if text}
