"""The figure of this study from results.csv: final mAP50-95 over the share of the schedule, a point for each run.

Usage: python docs/studies/2026-11-28-horizons/plot.py     (writes horizons.png beside it)
"""

import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ARMS = {  # (arm, phase): label and colour
    ("AdamW", "confirm"): ("AdamW, lr tuned", "#1f77b4"),
    ("AdamW with the parts", "confirm"): ("AdamW with the preset's parts, lr tuned", "#17a2b8"),
    ("SophiaG", "preset"): ("SophiaG, the preset", "#d62728"),
    ("SophiaG", "confirm"): ("SophiaG, lr tuned", "#ff9d7a"),
    ("MuSGD", "confirm"): ("MuSGD, lr tuned", "#7f7f7f"),
    ("SGD", "confirm"): ("SGD, lr tuned", "#b5b5b5"),
}


def main() -> None:
    """Draw a panel for each data set."""
    with (HERE / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(axes, names):
        for place, ((arm, phase), (label, colour)) in enumerate(ARMS.items()):
            for share in ("0.8", "1.0"):
                found = [
                    float(row["mAP50-95"])
                    for row in rows
                    if (row["data"], row["arm"], row["phase"], row["share"]) == (name, arm, phase, share)
                ]
                if found:
                    x = {"0.8": 0, "1.0": 1}[share] + (place - 2.5) * 0.12
                    axis.plot([x] * len(found), found, "o", color=colour, ms=4, alpha=0.6, label=label)
                    axis.plot([x - 0.05, x + 0.05], [statistics.median(found)] * 2, color=colour, lw=2.5)
        goal = statistics.median(
            float(row["mAP50-95"])
            for row in rows
            if (row["data"], row["arm"], row["phase"], row["share"]) == (name, "AdamW", "confirm", "1.0")
        )
        axis.axhline(goal, color="#1f77b4", lw=0.8, ls=":")
        axis.set(title=name, xticks=[0, 1], xticklabels=[".8 T", "T"], xlim=(-0.5, 1.5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final mAP50-95")
    handles = {h.get_label(): h for axis in axes for h in axis.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(HERE / "horizons.png", dpi=110)


if __name__ == "__main__":
    main()
