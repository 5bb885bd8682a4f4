"""Train the runs of a study, several side by side, each on one thread and with a bfloat16 forward pass.

`yolo-sophia compare` answers for one's own data; this script is for searches with many short trainings on a CPU, where
a forward pass in bfloat16 takes half of the time. Runs that have a result are not trained again.

Usage: python scripts/study_runs.py PLAN.yaml DATA_FOLDER OUT_FOLDER [WORKERS]

The plan has `common` (arguments of every run), `sets` (arguments by data set, with `data` relative to DATA_FOLDER),
`arms` (arguments by arm) and `jobs`: a list of {arm, sets, seeds} with an optional `grid`, which maps one argument to a
list of values. Jobs run in their order. `lab: module.Class` in an arm replaces the class of SophiaG by one in scripts/,
with `lab_settings` as its `settings`. Its attribute `figures` enters the run's JSON file, and of these `moved` and
`curbed` results.csv.
OUT_FOLDER gets a JSON file per run, results.csv with all of them, and the images at the size of the study.
"""

from __future__ import annotations

import csv
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

COLUMNS = ("arm", "set", "seed", "grid", "map", "map50", "seconds", "steps", "lr0", "moved", "curbed")


def runs_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every run of a plan: its name, arm, set, seed, value of the grid, and arguments."""
    for job in plan["jobs"]:
        key, values = next(iter(job["grid"].items())) if "grid" in job else (None, [None])
        for seed in job["seeds"]:
            for name in job["sets"]:
                for value in values:
                    arguments = {**plan["common"], **plan["sets"][name], **plan["arms"][job["arm"]], "seed": seed}
                    if key is not None:
                        arguments[key] = value
                    label = "-".join(str(x) for x in (job["arm"], name, seed, value) if x is not None)
                    shown = "" if key is None else f"{key}={value}"
                    yield {
                        "name": label,
                        "arm": job["arm"],
                        "set": name,
                        "seed": seed,
                        "grid": shown,
                        "args": arguments,
                    }


def resized(data: Path, out: Path, size: int) -> Path:
    """A copy of a data set whose images have a longer side of `size` pixels; made once.

    Args:
        data: Its data.yaml, in its folder.
        out: Folder for the copy.
        size: In pixels.
    """
    import cv2

    if not (out / "data.yaml").is_file():
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(data.parent, partial, ignore=shutil.ignore_patterns("*.cache"))
        for path in [p for p in partial.rglob("*") if p.suffix.lower() in {".jpg", ".jpeg", ".png"}]:
            image = cv2.imread(str(path))
            ratio = size / max(image.shape[:2])
            shape = [max(1, round(x * ratio)) for x in image.shape[1::-1]]
            cv2.imwrite(str(path), cv2.resize(image, shape, interpolation=cv2.INTER_AREA))
        partial.rename(out)
    return out / "data.yaml"


def begin(optimizer: Any, model: Any) -> None:
    """Show the model to an optimizer of scripts/ that has a method `begin`."""
    getattr(optimizer, "begin", lambda _: None)(model)


def train(run: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Train one run in this process, and return its row."""
    import torch
    import ultralytics.engine.trainer as engine
    from ultralytics import YOLO

    from yolo_sophia import install

    install()
    torch.set_num_threads(1)
    args = dict(run["args"])
    if lab := args.pop("lab", None):
        from yolo_sophia.integration import build

        module, name = lab.rsplit(".", 1)
        build.SophiaG = getattr(importlib.import_module(module), name)
        build.SophiaG.settings = args.pop("lab_settings", {})
    if args.pop("bfloat16", True):
        engine.autocast = lambda *_, **__: torch.autocast("cpu", dtype=torch.bfloat16)
    model = YOLO(args.pop("model"))
    model.add_callback("on_train_start", lambda trainer: begin(trainer.optimizer, trainer.model))
    start = time.perf_counter()
    model.train(**args, project=str(folder), name=run["name"], exist_ok=True)
    trainer = model.trainer
    with open(trainer.csv) as file:
        last = list(csv.DictReader(file))[-1]
    row = {key: run[key] for key in ("arm", "set", "seed", "grid")}
    row |= {"map": float(last["metrics/mAP50-95(B)"]), "map50": float(last["metrics/mAP50(B)"])}
    states = [s["step"] for s in trainer.optimizer.state.values() if "step" in s]
    row |= {"seconds": round(time.perf_counter() - start, 1), "steps": int(max(states)) if states else None}
    row |= {
        "lr0": trainer.args.lr0,
        "figures": {k.strip(): v for k, v in last.items() if k.strip().startswith("sophia")},
    }
    row["lab"] = getattr(trainer.optimizer, "figures", None)
    row["lr_measurement"] = trainer.optimizer.param_groups[0].get("lr_measurement")
    for name in ("last.pt", "best.pt"):
        (Path(trainer.save_dir) / "weights" / name).unlink(missing_ok=True)
    return row


def main(plan_path: Path, data: Path, out: Path, workers: int = 2) -> None:
    """Train every run of a plan that has no result yet."""
    plan = yaml.safe_load(plan_path.read_text())
    runs = {run["name"]: run for run in runs_of(plan)}
    results = out / "results"
    results.mkdir(parents=True, exist_ok=True)
    for name, own in plan["sets"].items():
        if own["data"].endswith("data.yaml"):
            copy = resized(data / own["data"], out / "data" / name, {**plan["common"], **own}["imgsz"])
            for run in runs.values():
                if run["set"] == name:
                    run["args"]["data"] = str(copy)
    for run in runs.values():
        if run["args"]["model"].endswith(".pt"):
            run["args"]["model"] = str(data / run["args"]["model"])
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    environment |= {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false"}

    def child(run: dict[str, Any]) -> None:
        target = results / f"{run['name']}.json"
        if target.is_file():
            return
        folder = out / "runs" / run["name"]
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(json.dumps(run))
        with open(folder / "log.txt", "w") as log:
            code = subprocess.call(
                [sys.executable, __file__, "--one", str(folder)], stdout=log, stderr=log, env=environment
            )
        if code:
            print(f"{run['name']}: failed with code {code}, see {folder / 'log.txt'}", flush=True)
            return
        (folder / "row.json").replace(target)
        row = json.loads(target.read_text())
        print(f"{run['name']}: mAP50-95 {row['map']:.4f}, {row['seconds']:.0f} s", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(child, runs.values()))
    rows = [json.loads(p.read_text()) for name in runs if (p := results / f"{name}.json").is_file()]
    with open(out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows({**row, **(row.get("lab") or {})} for row in rows)
    print(f"{len(rows)} of {len(runs)} runs have a result: {out / 'results.csv'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        place = Path(sys.argv[2])
        row = train(json.loads((place / "run.json").read_text()), place / "train")
        (place / "row.json").write_text(json.dumps(row))
        with suppress(OSError):
            shutil.rmtree(place / "train")
    elif len(sys.argv) in {4, 5}:
        main(*map(Path, sys.argv[1:4]), *map(int, sys.argv[4:]))
    else:
        raise SystemExit(__doc__)
