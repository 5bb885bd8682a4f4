"""sophia.png: what Sophia did over the epochs, drawn from results.csv beside results.png."""

from __future__ import annotations

import csv
import io
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
        rows = [{k.strip(): v for k, v in row.items() if k} for row in csv.DictReader(file, skipinitialspace=True)]
    rows = [row for row in rows if _is_complete(row)]  # a training that shares the folder may have written others
    if not rows:
        raise ValueError(f"{results} has no sophia/ columns: it is not the results.csv of a SophiaG run.")
    epochs = [float(row["epoch"]) for row in rows]
    figure = Figure(figsize=(13, 6.5), layout="constrained")
    for ax, (title, names, log) in zip(figure.subplots(2, 3).ravel(), PANELS):
        for name in names:
            values = [float(row[f"sophia/{name}"]) for row in rows]
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
    last = rows[-1]
    figure.suptitle(
        f"SophiaG: {float(last['sophia/refreshes']):.0f} Hessian updates, {float(last['sophia/dropped']):.0f} dropped"
    )
    target = results.with_name("sophia.png")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(target, buffer.getvalue())
    return target


def _is_complete(row: dict[str, str | None]) -> bool:
    """Whether a row of results.csv has a number in every column that is drawn."""
    names = ["epoch", *(f"sophia/{name}" for _, drawn, _ in PANELS for name in drawn), "sophia/refreshes"]
    try:
        for name in (*names, "sophia/dropped"):
            float(row[name])
    except (KeyError, TypeError, ValueError):
        return False
    return True
