"""Print how far SophiaG is from the official release (`sophia-opt`) over 100 steps; needs the `test` extra."""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from reference import official_parity  # the tests assert what is printed here


def main() -> None:
    """Print one line per dtype: the largest relative difference of any parameter, momentum or curvature."""
    for dtype in (torch.float32, torch.float64):
        errors = [official_parity(dtype, foreach=f, maximize=m) for f, m in product((None, False, True), (False, True))]
        print(f"{str(dtype).removeprefix('torch.')}: {max(errors):.2e}")


if __name__ == "__main__":
    main()
