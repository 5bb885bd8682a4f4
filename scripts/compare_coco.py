"""The COCO study: compare optimizers and score the final weights with COCO's metrics, in one report.

Usage:
    python scripts/compare_coco.py [key=value ...]
    python scripts/compare_coco.py devices=0,1 model=yolov8s.yaml dry_run=True
    python scripts/compare_coco.py small=True data=path/to/data.yaml model=path/to/weights.pt

The keys are those of `yolo-sophia compare` (`--key value` is accepted too). They override configs/compare/coco.yaml,
the full study, whose comments explain each default. This script adds:

    small=True        start from configs/compare/coco-small.yaml: 160 px, 3 epochs, 2 seeds, for any small data set
    plan=FILE         start from another plan
    arms=A,B          only these arms of the plan (`optimizers=` adds arms)
    subset=N          train on the first N training images by file name (Ultralytics' `fraction=`), the same images in
                      every arm and seed; the validation set stays complete
    annotations=FILE  COCO annotations of the validation images; by default COCO's own if they exist, else they are
                      written from the YOLO labels

Rerun the same command to resume. COCO metrics are those of full-length runs (horizon 1.0).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from yolo_sophia.compare import command
from yolo_sophia.compare.estimate import COCO_IMAGES
from yolo_sophia.compare.plan import Plan, parse
from yolo_sophia.compare.score import FULL
from yolo_sophia.runs.coco import evaluator
from yolo_sophia.runs.coco_metrics import coco_metrics
from yolo_sophia.runs.results import load

CONFIGS = Path(__file__).resolve().parent.parent / "configs" / "compare"
OWN = ("small", "plan", "arms", "subset", "annotations")


def read(words: Sequence[str]) -> tuple[Plan, Path | None]:
    """The plan, and the annotations file if one was named.

    Raises:
        ValueError: What is wrong with which key, and what was expected.
    """
    own, others = split(joined(words))
    if (small := own.get("small", "False").lower()) not in {"true", "false"}:
        raise ValueError(f"small={own['small']}: expected True or False.")
    base = own.get("plan") or CONFIGS / ("coco-small.yaml" if small == "true" else "coco.yaml")
    plan = parse([f"plan={base}", *others])
    if "subset" in own:
        plan = parse([f"plan={base}", *others, f"fraction={fraction(plan, own['subset'])!r}"])
    if "arms" in own:
        plan = replace(plan, arms=chosen(plan, own["arms"].split(",")))
    annotations = Path(own["annotations"]) if "annotations" in own else None
    if annotations and not annotations.is_file():
        raise ValueError(f"annotations={annotations}: no such file.")
    if annotations and len(plan.data) > 1:
        raise ValueError(f"annotations={annotations} belongs to one data set, found {len(plan.data)}.")
    return plan, annotations


def joined(words: Sequence[str]) -> list[str]:
    """Turn `--key value` into `key=value`."""
    made: list[str] = []
    for word in words:
        if made and made[-1].startswith("--") and "=" not in made[-1]:
            made[-1] = f"{made[-1]}={word}"
        else:
            made.append(word)
    return [word.lstrip("-") for word in made]


def split(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """This script's own keys, and the other words."""
    pairs = [word.partition("=") for word in words]
    own = {key: value for key, _, value in pairs if key in OWN}
    return own, [word for word, (key, _, _) in zip(words, pairs) if key not in OWN]


def fraction(plan: Plan, subset: str) -> float:
    """Ultralytics' `fraction` for N training images.

    Raises:
        ValueError: N is no number of images, or they cannot be counted.
    """
    from yolo_sophia.integration.measure import count_images

    if len(plan.data) > 1 or "fraction" in plan.common:
        raise ValueError(f"subset={subset} needs one data set and no `fraction` beside it.")
    (data,) = plan.data
    total = count_images(data) or (COCO_IMAGES if Path(data).name == "coco.yaml" else 0)
    if not total:
        raise ValueError(f"subset={subset}: the training images of {data} are not there yet to be counted.")
    if not subset.isdigit() or not 1 <= int(subset) <= total:
        raise ValueError(f"subset={subset}: expected a number of images, 1 to {total}.")
    return int(subset) / total


def chosen(plan: Plan, names: Sequence[str]) -> tuple[Any, ...]:
    """The arms of these names.

    Raises:
        ValueError: There is no such arm, or the reference arm is not among them.
    """
    known = [arm.name for arm in plan.arms]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"arms: {', '.join(unknown)} not in the plan, expected some of {', '.join(known)}.")
    if plan.reference not in names:
        raise ValueError(f"arms={','.join(names)} lacks the reference {plan.reference}; name another with reference=.")
    return tuple(arm for arm in plan.arms if arm.name in names)


def main(words: Sequence[str]) -> int:
    """Compare, measure, report; 0 when all went well, 1 where a run or the COCO metrics failed."""
    if any(word in {"help", "-h", "--help"} for word in words):
        print(__doc__)
        return 0
    plan, annotations = read(words)
    if plan.dry_run:
        return command.dry_run(plan)
    evaluator()  # a missing package is said now, not after days of training
    ordered, board, searches = command.train(plan)
    full = [result for result in load(plan.out, ordered) if result.run.horizon == FULL]
    coco, problem = None, None
    try:
        coco = coco_metrics(plan.out, full, annotations=annotations, tell=lambda line: print(line, file=sys.stderr))
    except (ValueError, OSError, RuntimeError) as error:  # the report of the trainings is written all the same
        problem = f"no COCO metrics: {error}"
    code = command.finish(plan, ordered, board, searches, coco)
    if problem:
        print(problem, file=sys.stderr)
    return 1 if problem else code


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        print(f"compare_coco: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("compare_coco: interrupted; rerun the command to resume", file=sys.stderr)
        sys.exit(130)
