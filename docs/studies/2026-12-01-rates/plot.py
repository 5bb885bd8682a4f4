"""The figure of this study from results.csv: final mAP50-95 over the learning rate, a panel for each data set.

Usage: python docs/studies/2026-12-01-rates/plot.py     (writes rates.png beside it)
"""

import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
GRIDS = {"SophiaG": ("SophiaG, lr0 of the axis", "#d62728"), "AdamW-parts": ("AdamW with the same parts", "#17a2b8")}


def draw(axis: plt.Axes, rows: list[dict[str, str]]) -> None:
    """Draw the runs of one data set."""
    for arm, (label, colour) in GRIDS.items():
        grid = sorted((float(r["lr0"]), float(r["mAP50-95"])) for r in rows if r["arm"] == arm and r["seed"] == "11")
        axis.plot(*zip(*grid), "o-", color=colour, ms=3.5, lw=1.2, label=label)
    plain = [float(r["mAP50-95"]) for r in rows if r["arm"] == "auto"]
    axis.axhline(statistics.median(plain), color="#555555", lw=1, ls="--", label="optimizer=auto, median")
    found = [(float(r["lr0"]), float(r["mAP50-95"])) for r in rows if r["arm"] == "SophiaG-measured"]
    axis.plot(*zip(*found), "k*", ms=9, mec="white", mew=0.6, label="optimizer=SophiaG, each seed", ls="none")
    axis.set_xscale("log")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Draw a panel for each data set."""
    with (HERE / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = list(dict.fromkeys(row["data"] for row in rows))
    figure, axes = plt.subplots(2, 4, figsize=(12, 5.4), layout="constrained")
    for axis, name in zip(axes.flat, names):
        draw(axis, [row for row in rows if row["data"] == name])
        axis.set_title(name, fontsize=10)
    figure.supxlabel("learning rate of what came from the weights", fontsize=10)
    figure.supylabel("final mAP50-95", fontsize=10)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(HERE / "rates.png", dpi=110)


if __name__ == "__main__":
    main()
