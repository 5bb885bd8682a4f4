"""The figure of this study from results.csv: final mAP50-95 over the share of the schedule, a point for each run.

Usage: python docs/studies/2026-11-28-head/plot.py     (writes head.png beside it)
"""

import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ARMS = {  # arm: label, colour and place
    "AdamW": ("AdamW, lr tuned, one for all", "#1f77b4", -0.14),
    "AdamW with parts": ("AdamW with the preset's parts, the head's rate too", "#17a2b8", 0.0),
    "SophiaG": ("SophiaG, the preset", "#d62728", 0.14),
}


def main() -> None:
    """Draw a panel for each data set."""
    with (HERE / "results.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "confirm"]
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(11, 3.6), layout="constrained")
    for axis, name in zip(axes, names):
        here = [row for row in rows if row["data"] == name]
        shares = sorted({row["share"] for row in here}, key=float)
        for arm, (label, colour, offset) in ARMS.items():
            for x, share in enumerate(shares):
                found = [float(row["mAP50-95"]) for row in here if (row["arm"], row["share"]) == (arm, share)]
                if found:
                    place = x + offset
                    axis.plot([place] * len(found), found, "o", color=colour, ms=4, alpha=0.6, label=label)
                    axis.plot([place - 0.06, place + 0.06], [statistics.median(found)] * 2, color=colour, lw=2.5)
        goal = [float(row["mAP50-95"]) for row in here if (row["arm"], row["share"]) == ("AdamW", "1.0")]
        axis.axhline(statistics.median(goal), color="#1f77b4", lw=0.8, ls=":")
        labels = [f"{float(s):g} T".replace("0.", ".").replace("1 T", "T") for s in shares]
        axis.set(title=name, xticks=range(len(shares)), xticklabels=labels, xlim=(-0.5, len(shares) - 0.5))
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("final mAP50-95")
    handles = {h.get_label(): h for axis in axes for h in axis.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(HERE / "head.png", dpi=110)


if __name__ == "__main__":
    main()
