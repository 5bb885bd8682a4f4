"""The figure and the effects of this study from results.csv and full-schedules.csv.

Usage: python docs/studies/2026-12-01-curvature/plot.py     (writes curvature.png beside it, prints the effects)
"""

import csv
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
CONTROL = "dial-0"
LABELS = {
    "dial-3": "s = .3",
    "dial-6": "s = .6",
    "permuted-6": "s = .6,\nh permuted",
    "mean-6": "s = .6,\nmean of h",
    "dial-9": "s = .9",
    "SophiaG": "SophiaG",
    "blocks-0": "s = 0,\nrates by block",
    "blocks-0-shuffled": "s = 0,\nrates shuffled",
}
COLOURS = {"coco_open": "#1f77b4", "shapes": "#d62728", "cards": "#2ca02c", "bccd": "#9467bd", "veg_plants": "#e08214"}
T975 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36}
"""Quantiles of Student's t for intervals of 95 %, by degrees of freedom."""

Rows = list[dict[str, str]]


def read(name: str) -> Rows:
    """The rows of a file of this folder."""
    with (HERE / name).open(newline="") as file:
        return list(csv.DictReader(file))


def pairs(rows: Rows, column: str, against: str) -> dict[str, dict[str, list[float]]]:
    """Differences to an arm in per cent of its value, by arm and data set; rate and seed are equal."""
    base = {(r["set"], r["seed"], r["grid"]): float(r[column]) for r in rows if r["arm"] == against}
    found: dict[str, dict[str, list[float]]] = {arm: {} for arm in LABELS}
    for row in rows:
        key = (row["set"], row["seed"], row["grid"])
        if row["arm"] in found and key in base:
            change = 100 * (float(row[column]) / base[key] - 1)
            found[row["arm"]].setdefault(row["set"], []).append(change)
    return {arm: sets for arm, sets in found.items() if sets and arm != against}


def best(rows: Rows) -> dict[str, list[float]]:
    """SophiaG against AdamW with the same parts, each at its best rate, in per cent, by data set."""
    found = {}
    for name in dict.fromkeys(row["set"] for row in rows):
        own, other = (
            max(float(r["map"]) for r in rows if (r["set"], r["arm"]) == (name, arm))
            for arm in ("SophiaG", "AdamW-parts")
        )
        found[name] = [100 * (own / other - 1)]
    return found


def interval(sets: dict[str, list[float]]) -> tuple[float, float]:
    """Mean over the data sets, each with its mean, and half of the interval of 95 %; infinite for one set."""
    means = [statistics.mean(values) for values in sets.values()]
    if len(means) < 2:
        return means[0], float("inf")
    return statistics.mean(means), T975[len(means) - 1] * statistics.stdev(means) / len(means) ** 0.5


def draw_sets(axis: plt.Axes, sets: dict[str, list[float]]) -> None:
    """A point for each data set, and the mean with its interval."""
    axis.plot(range(len(sets)), [values[0] for values in sets.values()], "o", color="#444444", ms=5)
    mean, half = interval(sets)
    axis.axhspan(mean - half, mean + half, color="#1f77b4", alpha=0.15, lw=0)
    axis.axhline(mean, color="#1f77b4", lw=1.5)
    axis.set_xticks(range(len(sets)), sets, fontsize=8, rotation=35, ha="right")
    axis.set(title="mAP50-95, full schedule", ylabel="SophiaG against AdamW with the parts, %", ylim=(-8, 8))


def draw_arms(axis: plt.Axes, found: dict[str, dict[str, list[float]]], title: str) -> None:
    """A point for each run, by arm, coloured by data set."""
    for place, sets in enumerate(found.values()):
        for name, values in sets.items():
            axis.plot([place] * len(values), values, "o", color=COLOURS[name], ms=6, alpha=0.8, label=name)
    axis.set(title=title, ylabel="change against s = 0, %", xlim=(-0.5, len(found) - 0.5))
    axis.set_xticks(range(len(found)), [LABELS[arm] for arm in found], fontsize=8)


def main() -> None:
    """Draw the three panels, and print means over data sets."""
    rows, full = read("results.csv"), best(read("full-schedules.csv"))
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    draw_sets(axes[0], full)
    draw_arms(axes[1], pairs(rows, "map", CONTROL), "mAP50-95, first look")
    draw_arms(axes[2], pairs(rows, "moved", CONTROL), "root mean square of the update")
    lines = {"SophiaG against AdamW-parts, mAP": full}
    for column in ("map", "moved"):
        lines |= {f"{arm} against {CONTROL}, {column}": sets for arm, sets in pairs(rows, column, CONTROL).items()}
    lines |= {f"{arm} against dial-6, map": sets for arm, sets in pairs(rows, "map", "dial-6").items()}
    for label, sets in lines.items():
        shown = ", ".join(f"{name} {statistics.mean(values):+.1f}" for name, values in sets.items())
        print("{}: {:+.1f} +- {:.1f} % ({})".format(label, *interval(sets), shown))  # noqa: T201
    for axis in axes:
        axis.axhline(0, color="grey", lw=0.8, ls=":")
        axis.spines[["top", "right"]].set_visible(False)
    handles = {h.get_label(): h for a in axes[1:] for h in a.get_lines() if not h.get_label().startswith("_")}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    figure.savefig(HERE / "curvature.png", dpi=100)


if __name__ == "__main__":
    main()
