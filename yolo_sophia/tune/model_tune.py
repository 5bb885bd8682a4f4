"""Our search spaces in the two forms that Ultralytics' own `model.tune(space=...)` takes.

No value leaves the space on its way through Ultralytics. Its genetic tuner rounds to five decimals, so a bound that
would become 0 is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from yolo_sophia.search_space import Choice, Dimension, argument_of, merged, read_dimension

DECIMALS = 5
"""Ultralytics' engine.tuner.Tuner rounds to so many."""


def tune_space(
    optimizer: str = "SophiaG", *, space: Mapping[str, Any] | None = None, ray: bool = False
) -> dict[str, Any]:
    """The search space of an optimizer for `model.tune(optimizer=..., space=...)`.

    Args:
        optimizer: Name or dotted path of the optimizer. Under a preset with rho=auto, Sophia's space has clip_fraction
            in the place of rho, unless `space` has rho.
        space: More arguments, or other values for some, as `yolo-sophia tune space=` takes them.
        ray: Whether it is for `model.tune(use_ray=True)`.

    Returns:
        Bounds (low, high) by argument, or Ray's search-space objects.

    Raises:
        ValueError: There is no such optimizer; an entry is malformed; the genetic tuner cannot search it; or Ray is not
            installed.
    """
    from yolo_sophia.integration.resolution import validate_arguments

    given = {key: read_dimension(key, entry) for key, entry in (space or {}).items()}
    if by_part := [key for key in given if argument_of(key)[1]]:
        raise ValueError(f"space: {by_part[0]}: Ultralytics' tuner knows whole arguments only. Use yolo-sophia tune.")
    dimensions = merged(validate_arguments({"optimizer": optimizer}), given)
    return {key: _for_ray(dimension) if ray else _for_tuner(key, dimension) for key, dimension in dimensions.items()}


def _for_tuner(key: str, dimension: Dimension) -> tuple[float, float]:
    if isinstance(dimension, Choice):
        raise ValueError(
            f"space: {key}: Ultralytics' genetic tuner knows bounds only, found the choices {dimension}. Use ray=True, "
            "or yolo-sophia tune."
        )
    if dimension.low > 0 and round(dimension.low, DECIMALS) == 0:
        raise ValueError(
            f"space: {key}: Ultralytics' genetic tuner rounds to {DECIMALS} decimals and {dimension.low:g} becomes 0; "
            f"expected a lower bound from {10**-DECIMALS:g} on. Use ray=True, or yolo-sophia tune."
        )
    return dimension.low, dimension.high


def _for_ray(dimension: Dimension) -> Any:
    try:
        from ray import tune
    except ImportError:
        raise ValueError('tune_space(ray=True): Ray Tune is not installed: pip install "yolo-sophia[ray]".') from None
    if isinstance(dimension, Choice):
        return tune.choice(list(dimension.values))
    if dimension.is_int:  # Ray leaves the upper bound out
        return (tune.lograndint if dimension.log else tune.randint)(dimension.low, dimension.high + 1)
    return (tune.loguniform if dimension.log else tune.uniform)(dimension.low, dimension.high)
