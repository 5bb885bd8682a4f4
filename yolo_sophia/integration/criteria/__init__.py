"""From an Ultralytics criterion to loss terms: which outputs it scores, with which coefficients.

`recorder_for` selects a recorder by the callables of a criterion. `CriterionRecorder` verifies its terms in the first
pass, and estimates from signed gradients where they do not fit.
"""

from __future__ import annotations

from yolo_sophia.integration.criteria.recorder import Recorder
from yolo_sophia.integration.criteria.selection import recorder_for
from yolo_sophia.integration.criteria.verification import CriterionRecorder, measured_images_exponent

__all__ = ["CriterionRecorder", "Recorder", "measured_images_exponent", "recorder_for"]
