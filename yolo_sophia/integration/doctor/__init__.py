"""What is known of a training before it begins: `yolo-sophia doctor`. Reads and counts; trains and downloads nothing.

`examine` collects the inputs in a `Case` (case.py); each function of `FACTS` turns it into `Fact`s.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from yolo_sophia import autoload
from yolo_sophia.integration.doctor.case import make_case
from yolo_sophia.integration.doctor.data_facts import data_facts
from yolo_sophia.integration.doctor.fact import Fact, as_dicts, table
from yolo_sophia.integration.doctor.length_facts import length_facts
from yolo_sophia.integration.doctor.setting_facts import setting_facts
from yolo_sophia.integration.doctor.start import quiet
from yolo_sophia.integration.doctor.start_facts import start_facts

__all__ = ["Fact", "as_dicts", "examine", "table"]

FACTS = (data_facts, start_facts, length_facts, setting_facts)


def examine(given: Mapping[str, Any]) -> list[Fact]:
    """The facts about a training with these arguments, in the order in which they are printed.

    Args:
        given: Arguments of the training, with `data` (one data set) and `model`.

    Raises:
        TypeError: As `validate_arguments`.
        ValueError: As `validate_arguments`; `data` or `model` is missing; `data` is no data YAML; or the training
            resumes another one.
    """
    with contextlib.suppress(RuntimeError):  # raised again by a training that needs what does not fit
        autoload.install()  # loads of weights are seen by the patches
    with quiet():
        case = make_case(given)
        return [fact for facts in FACTS for fact in facts(case)]
