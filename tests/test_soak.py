"""scripts/soak.py tells growth from noise."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from soak import ALLOWED, report


@pytest.mark.parametrize("grows", [None, *ALLOWED])
def test_growth_is_told_from_noise(grows, tmp_path, capsys):
    draw, rows = random.Random(0), []
    for epoch in range(1, 65):
        row = {"steps": 50 * epoch, "refreshes": 5 * epoch, "dropped": 0}
        row |= {name: 1000 + draw.gauss(0, allowed / 4) for name, allowed in ALLOWED.items()}
        if grows:
            row[grows] += epoch / 64 * 4 * ALLOWED[grows]
        rows.append(json.dumps(row) + "\n")
    record = tmp_path / "soak.jsonl"
    record.write_text("".join(rows))
    assert report(record) == (grows is not None)
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "GROWS" in line] == [grows] * bool(
        grows
    )
