"""The sections of a comparison's report, one module each; `SECTIONS` is their order.

A module's `sections` renders a `ComparisonResult` as one section, or one per data set.
"""

from yolo_sophia.compare.sections import (
    coco,
    doctor,
    guide,
    horizons,
    plan,
    profiles,
    results,
    runs,
    settings,
    setup,
    sophia,
    tuning,
    verdict,
)

SECTIONS = (verdict, profiles, results, horizons, coco, sophia, runs, settings, doctor, tuning, setup, plan, guide)
