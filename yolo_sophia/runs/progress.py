"""The state of trainings while they run: a live table on a terminal, a line per change elsewhere."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from yolo_sophia.runs.scheduler import Progress

STATES = ("finished", "running", "elsewhere", "waiting", "pruned", "failed")
ENDED = {"finished", "pruned", "failed"}


def eta_seconds(progress: list[Progress], workers: int) -> float | None:
    """Seconds until all runs are done, from the pace of those that ran here; None before the first epoch."""
    epochs = sum(max(0, item.epochs - item.before) for item in progress if item.seconds)
    seconds = sum(item.seconds for item in progress if item.seconds)
    if not epochs:
        return None
    left = sum(int(item.run.arguments["epochs"]) - item.epochs for item in progress if item.state not in ENDED)
    return max(0.0, left * seconds / epochs / workers)


def duration(seconds: float | None) -> str:
    """1:02:03, or a dash."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


@contextmanager
def showing(title: str, workers: int) -> Iterator[Callable[[list[Progress]], None]]:
    """Yield the function that shows the progress: a rich table on a terminal, plain lines otherwise."""
    if sys.stderr.isatty():
        try:
            from rich.live import Live
        except ImportError:
            print("pip install rich for a live table", file=sys.stderr)
        else:
            with Live(refresh_per_second=2) as live:
                yield lambda progress: live.update(_table(title, progress, workers))
            return
    yield _Lines(title, workers)


class _Lines:
    def __init__(self, title: str, workers: int):
        self.title, self.workers, self.printed = title, workers, {}
        self.last = 0.0

    def __call__(self, progress: list[Progress]) -> None:
        for item in progress:
            state = (item.state, item.note)
            if self.printed.get(item.run.key, ("waiting", "")) != state:
                note = f": {item.note.splitlines()[-1]}" if item.note else ""
                print(f"{self.title}: {item.run.key} {item.state}{note}", file=sys.stderr, flush=True)
            self.printed[item.run.key] = state
        if time.monotonic() - self.last > 60:
            print(f"{self.title}: {_summary(progress, self.workers)}", file=sys.stderr, flush=True)
            self.last = time.monotonic()


def _summary(progress: list[Progress], workers: int) -> str:
    counts = Counter(item.state for item in progress)
    shown = ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])
    return f"{shown}; {duration(eta_seconds(progress, workers))} left"


def _table(title: str, progress: list[Progress], workers: int):
    from rich.table import Table

    table = Table(title=title, caption=_summary(progress, workers), min_width=72)
    for column in ("run", "state", "epochs", "time"):
        table.add_column(column, justify="left" if column in {"run", "state"} else "right")
    style = {"failed": "red", "running": "bold", "finished": "green", "elsewhere": "yellow", "pruned": "dim"}
    order = sorted(progress, key=lambda item: STATES.index("running") != STATES.index(item.state))
    for item in order[:30]:
        total = int(item.run.arguments["epochs"])
        row = (item.run.key, item.state, f"{item.epochs}/{total}", duration(item.seconds or None))
        table.add_row(*row, style=style.get(item.state))
    if len(order) > 30:
        table.add_row(f"... and {len(order) - 30} more", "", "", "")
    return table
