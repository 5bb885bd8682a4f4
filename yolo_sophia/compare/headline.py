"""What a report says in words: title, facts under it, and verdicts.

The rule: sentences come from `verdict.py`, which claims no more than was shown; a badge never says more than they do.
"""

from __future__ import annotations

from yolo_sophia.compare.tables import count
from yolo_sophia.compare.verdict import (
    ENOUGH,
    WORDS,
    control,
    control_verdict,
    difference_verdict,
    final_difference,
    horizon_score,
    horizon_verdict,
    verdict,
)
from yolo_sophia.compare.view import View
from yolo_sophia.report.document import Verdict


def title(view: View) -> str:
    """The report's title: who against whom, where, and whether anything was tuned."""
    again = {two for _, two in view.controls}
    first, *others = (arm for arm in view.arms if arm not in again)
    if not others:
        text = f"{first} alone"
    else:
        listed = f"{', '.join(others[:-1])} and {others[-1]}" if len(others) > 1 else others[0]
        text = f"{listed if len(others) < 5 else f'{len(others)} arms'} against {first}"
    text += f" on {view.data[0]}" if len(view.data) == 1 else f" on {len(view.data)} data sets"
    trials = view.plan.tune_trials
    return text + (f" (tuned, {count(trials, 'trial')} per arm)" if trials else " (untuned)")


def badges(view: View) -> list[str]:
    """Short facts that a reader should know before the verdict."""
    plan, finished = view.plan, sum(result.receipt is not None for result in view.results)
    total, failed = view.planned, sum(result.failure is not None for result in view.results)
    facts = [count(len(plan.seeds), "seed") + (": indicative only" if len(plan.seeds) < ENOUGH else "")]
    facts += [f"{plan.epochs} epochs", f"{finished} of {count(total, 'run')} finished"]
    facts += [f"{failed} failed"] if failed else []
    facts += [] if plan.tune_trials else ["untuned: presets and defaults"]
    short = "recalibrated before each validation" if plan.bn_recalibrate else "as Ultralytics keeps it"
    return [*facts, f"BatchNorm {short}"]


def verdicts(view: View, data: str) -> list[Verdict]:
    """One per arm: steps to the target, then horizons, then final mAP, then training time; A/A pairs in a word."""
    reference, made = view.plan.reference, []
    again = {two for _, two in view.controls}
    for arm in view.arms[1:]:
        if arm in again:
            continue
        name = arm if len(view.data) == 1 else f"{arm} on {data}"
        ratio = view.ratio(arm, data, "steps")
        if ratio is None:
            lacking = " and ".join(one for one in (arm, reference) if not view.has(one, data))
            made.append(Verdict(name, "no verdict", "open", [f"No full run of {lacking} has ended on {data} yet."]))
            continue
        _, less, more = WORDS["steps"]
        badge = {-1: less, 0: "no difference shown", 1: more}[ratio.direction]
        badge = badge if ratio.informative else "no verdict"
        tone = {-1: "better", 0: "open", 1: "worse"}[ratio.direction]
        if 0 < ratio.informative < ENOUGH and ratio.direction:
            badge, tone = f"{badge}, indicative only", f"{tone} hint"
        sentences = [verdict(ratio)]
        if len(view.plan.horizons) > 1:
            scores = [horizon_score(view.curves, a, reference, data, view.plan.target) for a in (arm, reference)]
            sentences.append(horizon_verdict(*scores))
        sentences.append(difference_verdict(final_difference(view.curves, arm, reference, data)))
        sentences.append(verdict(view.ratio(arm, data, "seconds")))
        made.append(Verdict(name, badge, tone, list(dict.fromkeys(sentences))))  # without a target they repeat
    return made


def control_verdicts(view: View) -> list[Verdict]:
    """What the A/A controls showed, over all data sets."""
    made = []
    for one, two in view.controls:
        found = control(view.curves, one, two)
        badge, tone = ("passed", "better") if found.largest == 0 else ("differs", "worse")
        made.append(Verdict(f"A/A control: {one} and {two}", badge, tone, [control_verdict(found)]))
    return made
