"""What some versions of Ultralytics cannot do by themselves: tests that need it are not collected there."""

from __future__ import annotations

import inspect

import pytest
import ultralytics.engine.tuner
from ultralytics.cfg import check_dict_alignment
from ultralytics.engine.trainer import BaseTrainer


def _tune_gives_its_children_what_they_refuse() -> bool:
    """8.3.253 and 8.4.0: save_dir=..., which their own command line does not know."""
    try:
        check_dict_alignment({}, {"save_dir": ""})
    except SyntaxError:
        return 'train_args["save_dir"]' in inspect.getsource(ultralytics.engine.tuner)
    return False


def _recovers_from_nan() -> bool:
    """Not up to 8.3.200; in 8.3.240 to 8.4.50 only where the validation collapses as well."""
    recovery = getattr(BaseTrainer, "_handle_nan_recovery", None)
    return recovery is not None and "fitness_collapse" not in inspect.getsource(recovery)


needs_tune = pytest.mark.requires(
    not _tune_gives_its_children_what_they_refuse(),
    reason="the children of this Ultralytics' tune refuse its arguments",
)
needs_recovery = pytest.mark.requires(
    _recovers_from_nan(), reason="this Ultralytics does not recover from a loss that is NaN"
)
