"""sophia.png: what Sophia did over the epochs, drawn from results.csv beside results.png."""

from __future__ import annotations

import csv
import io
from contextlib import suppress
from pathlib import Path

from yolo_sophia.atomic import atomic_write

PANELS = (
    ("clip fraction", ("clip_fraction",), False),
    ("rho", ("rho",), False),
    ("gradient and momentum norm", ("grad_norm", "momentum_norm"), True),
    ("curvature norm", ("hessian_norm",), True),
    ("update norm", ("update_norm",), True),
    ("seconds of Hessian updates per epoch", ("refresh_seconds",), False),
)
"""Title, columns and whether the axis is logarithmic."""

COLUMNS = (*(name for _, names, _ in PANELS for name in names), "refreshes", "dropped")


def plot_sophia(results: str | Path) -> Path:
    """Draw the `sophia/*` columns of a results.csv.

    Args:
        results: The file; the picture goes beside it.

    Returns:
        The path of sophia.png.

    Raises:
        ValueError: The file has no rows with such columns.
    """
    from matplotlib.figure import Figure

    results = Path(results)
    with results.open(newline="", encoding="utf-8") as file:
        lines = [{k.strip(): v for k, v in line.items() if k} for line in csv.DictReader(file, skipinitialspace=True)]
    rows = []
    for line in lines:
        with suppress(KeyError, TypeError, ValueError):  # of another training that writes into the folder
            rows.append({name: float(line[f"sophia/{name}"]) for name in COLUMNS} | {"epoch": float(line["epoch"])})
    if not rows:
        raise ValueError(f"{results} has no sophia/ columns: it is not the results.csv of a SophiaG run.")
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for ax, (title, names, log) in zip(figure.subplots(2, 3).ravel(), PANELS):
        for name in names:
            values = [row[name] for row in rows]
            ax.plot(epochs, values, marker="o", markersize=4, linewidth=1.8, label=name.replace("_", " "))
        ax.set_title(title, fontsize=11)
        ax.set_xlabel("epoch")
        ax.grid(alpha=0.3)
        if log and any(v > 0 for line in ax.lines for v in line.get_ydata()):
            ax.set_yscale("log", nonpositive="mask")  # no update yet where a warm-up begins with lr = 0
        if title == "clip fraction":
            ax.set_ylim(-0.02, 1.02)
        elif not log:
            ax.set_ylim(bottom=0)
        if len(names) > 1:
            ax.legend(fontsize=9)
    refreshes, dropped = (rows[-1][name] for name in ("refreshes", "dropped"))
    figure.suptitle(f"SophiaG: {refreshes:.0f} Hessian updates, {dropped:.0f} dropped")
    target = results.with_name("sophia.png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(target, buffer.getvalue())
    return target
