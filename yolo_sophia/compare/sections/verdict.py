"""The verdict on each arm in one sentence, a table by data set, the A/A controls, and what to know beforehand.

A difference is stated only if its interval, as printed, excludes equality. Everything else is in a fold, in words.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from yolo_sophia.compare.aggregate import Aggregate, Interval
from yolo_sophia.compare.figures import AXIS_NOUNS, style_of
from yolo_sophia.compare.pairwise import Control, Difference, HorizonScore, Ratio
from yolo_sophia.compare.sections.results import ratio_text
from yolo_sophia.compare.sections.runs import listed
from yolo_sophia.compare.statistics import ArmResult, ComparisonResult
from yolo_sophia.report.document import Block, Cell, Fold, Gallery, Picture, Section, Split, Table, Text, Verdict
from yolo_sophia.report.figure_style import INK, MUTED, picture, row_panel, short
from yolo_sophia.report.formatting import DASH, TIMES, count, ratio_number

ENOUGH = 5  # paired seeds
WORDS = {  # axis -> what is saved, less of it, more of it
    "steps": ("steps", "fewer steps", "more steps"),
    "seconds": ("training time", "less training time", "more training time"),
}
BATCH_NORM = {
    True: "BatchNorm: running statistics were recalibrated on training images before each validation, in every arm.",
    False: "BatchNorm: running statistics as Ultralytics keeps them, in every arm (bn_recalibrate=False). Validation "
    "early in a run measures how far they lag behind as much as the optimizer.",
}
TOO_FEW = "Fewer than two data sets have full runs of every arm and a reference that detects something."
NO_RUN = "No run has finished yet: there is nothing to compare."
UNTUNED = "Untuned: every arm ran with its preset or defaults, so this compares settings as much as optimizers."


def sections(result: ComparisonResult) -> list[Section]:
    """Warnings, verdicts, the table by data set, and the ratios of steps and time to the target."""
    blocks: list[Block] = []
    if missing := result.not_ended:
        text = f"Incomplete. {len(missing)} of {count(result.planned, 'run')} not ended: {listed(missing[:6])}"
        text += f" and {len(missing) - 6} more (see Runs)" if len(missing) > 6 else ""
        blocks.append(Text(f"{text}. All results below are based on the other runs and may change.", "warning"))
    if not any(record.state == "finished" for record in result.records):
        return [Section("verdict", "Verdict", [*blocks, Text(NO_RUN, "warning")])]
    if len(result.arms) == 1:
        blocks.append(Text(f"{result.arms[0]} is the only arm: there is nothing to compare it with."))
    several = len(result.data) > 1
    arms = [arm for data in result.data for arm in data.arms[1:] if arm.name not in result.repeated]
    if (fewest := _fewest_pairs(arms)) < ENOUGH:
        text = f"Indicative only: {count(fewest, 'pair')} of seeds in the smallest comparison, fewer than {ENOUGH}."
        blocks.append(Text(text, "note"))
    details = [_verdict(result, arm) for arm in arms]
    if several:
        verdicts: list[Block] = [_overall(result, number) for number in _others(result)]
    else:
        verdicts = [replace(one, sentences=one.sentences[:1]) for one in details]
        details = [replace(one, sentences=one.sentences[1:]) for one in details if one.sentences[1:]]
    verdicts += [_control_verdict(found) for found in result.controls]
    if not result.plan.tune_trials and len(result.arms) > 1:
        verdicts.append(Text(UNTUNED, "note"))
    verdicts.append(Text(BATCH_NORM[result.plan.bn_recalibrate], "note"))
    pictures = [drawn for axis in ("steps", "seconds") if (drawn := _forest(result, axis))]
    caption = "Marks: median over seeds. Lines: 95 % interval, with an arrow where it continues."
    galleries: list[Block] = [Gallery(pictures, caption)] if pictures else []
    if several:
        details += galleries
    elif galleries:
        verdicts = [Split(verdicts, galleries)]
    verdicts += [_table(result)] if arms else []
    verdicts += [Fold("In words, by data set" if several else "In words", details, not several)] if details else []
    return [Section("verdict", "Verdict", [*blocks, *verdicts])]


def _others(result: ComparisonResult) -> list[int]:
    """Positions of the arms that are compared with the reference."""
    return [n for n, arm in enumerate(result.arms) if n and arm not in result.repeated]


def _fewest_pairs(arms: Sequence[ArmResult]) -> int:
    """Smallest number of pairs of finished runs of an arm on a data set; `ENOUGH` where there is none."""
    return min(filter(None, (arm.difference.mean.count for arm in arms if arm.difference)), default=ENOUGH)


def _overall(result: ComparisonResult, number: int) -> Verdict:
    """What is concluded about an arm over all data sets."""
    name = result.arms[number]
    if not result.aggregates:
        return Verdict(name, "no verdict", "open", [TOO_FEW])
    found = result.aggregates[number]
    badge, tone = {1: ("higher", "better"), 0: ("no difference shown", "open"), -1: ("lower", "worse")}[found.direction]
    comparable = [data for data in result.data if data.name not in result.not_comparable]
    outcomes = Counter(data.arms[number].difference.outcome for data in comparable)
    return Verdict(name, badge, tone, [overall_sentence(found, result.plan.reference, outcomes)])


def overall_sentence(found: Aggregate, reference: str, outcomes: Counter[str]) -> str:
    """The scores of an arm over all data sets, and how it does on each."""
    end = {1: "higher", 0: "no difference shown", -1: "lower"}[found.direction]
    return (
        f"Over {outcomes.total()} data sets, the final mAP50-95 of {found.arm} is {interval_text(found.iqm)} of "
        f"{reference}'s median (interquartile mean), and a run ends above one of {reference} with probability "
        f"{interval_text(found.improvement, 2)}: {end}; by data set {_tally(outcomes)}."
    )


def interval_text(found: Interval, digits: int = 3) -> str:
    """A value with its interval."""
    if found.low is None:
        return f"{found.value:.{digits}f}"
    return f"{found.value:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def _tally(outcomes: Counter[str]) -> str:
    parts = [("win", "wins"), ("tie", "ties"), ("loss", "losses")]
    words = [f"{outcomes[one]} {one if outcomes[one] == 1 else many}" for one, many in parts]
    return ", ".join(words) + (f", {outcomes['open']} open" if outcomes["open"] else "")


def _table(result: ComparisonResult) -> Table:
    """Win, tie or loss of each arm on each data set."""
    rows: list[list[Cell]] = [[data.name, *(_outcome(data.arms[n]) for n in _others(result))] for data in result.data]
    if len(result.data) > 1:
        totals: list[Cell] = []
        for n in _others(result):
            gaps = [data.arms[n].difference for data in result.data if data.arms[n].difference]
            known = [gap.mean.value for gap in gaps if gap.mean.value is not None]
            higher = f"mean at or above on {sum(value >= 0 for value in known)} of {len(known)}"
            totals.append((_tally(Counter(gap.outcome for gap in gaps)), higher))
        rows.append(["all", *totals])
    caption = (
        f"Final mAP50-95 minus {result.plan.reference}'s, paired by seed; a tie: the 95 % interval of the mean "
        "(Student's t over seeds) contains 0; open: fewer than three seeds"
    )
    return Table(caption, ["data set", *(result.arms[n] for n in _others(result))], rows)


def _outcome(arm: ArmResult) -> Cell:
    gap = arm.difference
    if gap is None or gap.mean.value is None:
        return DASH
    return gap.outcome, f"{_gap(gap.mean.value)} ({_spread(gap)}, {count(gap.mean.count, 'seed')})"


def _spread(gap: Difference) -> str:
    return "no interval" if gap.mean.low is None else f"{_gap(gap.mean.low)} to {_gap(gap.mean.high)}"


def _verdict(result: ComparisonResult, arm: ArmResult) -> Verdict:
    """Steps to the target, horizons, final mAP and training time of an arm on a data set."""
    data = next(found for found in result.data if found.name == arm.data)
    reference = data.arms[0]
    name = arm.name if len(result.data) == 1 else f"{arm.name} on {data.name}"
    if not arm.ratios:
        lacking = " and ".join(one.name for one in (arm, reference) if not one.records)
        return Verdict(name, "no verdict", "open", [f"No full run of {lacking} has ended on {data.name} yet."])
    ratio = arm.ratios["steps"]
    _, less, more = WORDS["steps"]
    badge, tone = {-1: (less, "better"), 0: ("no difference shown", "open"), 1: (more, "worse")}[ratio.direction]
    if not ratio.informative:
        badge = "no verdict"
    elif ratio.informative < ENOUGH and ratio.direction:
        tone = f"{tone} hint"
    sentences = [cost_sentence(ratio), *([cost_sentence(arm.near)] if arm.near else [])]
    if len(result.plan.horizons) > 1:
        sentences.append(horizon_sentence(arm.horizons, reference.horizons))
    sentences += [difference_sentence(arm.difference), cost_sentence(arm.ratios["seconds"])]
    return Verdict(name, badge, tone, list(dict.fromkeys(sentences)))  # equal sentences without a target


def _control_verdict(found: Control) -> Verdict:
    badge, tone = ("passed", "better") if found.largest == 0 else ("differs", "worse")
    return Verdict(f"A/A control: {found.first} and {found.second}", badge, tone, [control_sentence(found)])


def cost_sentence(ratio: Ratio) -> str:
    """Which arm reached the target at less cost, if the interval shows it."""
    arm, base, (noun, less, more) = ratio.arm, ratio.reference, WORDS[ratio.axis]
    paired, known = len(ratio.seeds), ratio.informative
    aim = _target(ratio, ratio.share)
    if not paired:
        return f"{arm} and {base} have no seed in common on {ratio.data}: no verdict."
    if ratio.target is None:
        return f"{base} has no final mAP50-95 above 0 on {ratio.data}, so there is nothing to reach: no verdict."
    misses = f"{arm} missed {{}} in {_of(ratio.missed[0], paired)}, {base} in {_of(ratio.missed[1], paired)}"
    end = {-1: less, 0: "no difference shown", 1: more}[ratio.direction]
    if ratio.value is not None and 0 < ratio.value < math.inf:
        spread = "no interval" if ratio.low is None else f"{ratio_number(ratio.low)}-{ratio_number(ratio.high)}"
        whose = "its" if ratio.default else f"{base}'s"
        share = f"{ratio_number(ratio.value)}x {whose} {noun}"
        text = f"{arm} reached {aim} in {share} ({spread}, {count(known, 'seed')}): {end}."
        text += f" {misses.format('it')}." if any(ratio.missed) else ""
    else:
        text = f"{misses.format(aim)}: {end if known else 'no verdict'}."
    if 0 < known < paired:
        text += f" Where both missed it ({count(paired - known, 'seed')}), nothing is said about the ratio."
    if any(ratio.failed):
        text += f" Crashed runs count as misses: {arm} {ratio.failed[0]}, {base} {ratio.failed[1]}."
    return text + _left_out(ratio.unpaired, "run in one arm only")


def horizon_sentence(score: HorizonScore, reference: HorizonScore) -> str:
    """Which planned schedule reached the target; `reference` is the reference arm's score."""
    arm, base, aim = score.arm, score.reference, _target(score)
    if score.target is None:
        return f"{base} has no final mAP50-95 above 0 on {score.data}, so there is no horizon to find."
    planned, theirs = ([horizon for horizon, *_ in one.medians] for one in (score, reference))
    if max(len(planned), len(theirs)) < 2:
        return f"{arm} and {base} were not run over shorter schedules on {score.data}."
    listed = ", ".join(f"{horizon:g}" for horizon in planned)
    if score.shortest is None:
        text = f"{arm} has no planned schedule that ends at or above {aim} (planned: {listed} of T)"
    else:
        text = (
            f"{arm}'s shortest planned schedule that ends at or above {aim} is {score.shortest:g} T ({listed} planned)"
        )
    if score.missed_longer:
        text += f", although {', '.join(f'{horizon:g} T' for horizon in score.missed_longer)} missed it"
    text += f"; {base} has none" if reference.shortest is None else f"; {base}'s own is {reference.shortest:g} T"
    text += "" if planned == theirs else ", but the two ran different ones"
    fewest = min(seeds for one in (score, reference) for *_, seeds in one.medians)
    return f"{text} (medians, {count(fewest, 'seed')} at least)."


def difference_sentence(gap: Difference) -> str:
    """Which arm has the higher final mAP, if the interval shows it."""
    value = gap.mean.value
    if value is None:
        return f"{gap.arm} and {gap.reference} have no finished seed in common on {gap.data}: no verdict."
    end = {-1: "lower", 0: "no difference shown", 1: "higher"}[gap.direction]
    paired = f"{gap.arm}'s final mAP50-95 minus {gap.reference}'s is {_gap(value)}"
    text = f"{paired} ({_spread(gap)}, {count(gap.mean.count, 'seed')}): {end}."
    return text + _left_out(gap.left_out, "not finished in both arms")


def control_sentence(result: Control) -> str:
    """Whether two arms with the same settings gave equal curves."""
    names = f"{result.first} and {result.second}, the same settings twice,"
    if result.largest == 0:
        text = f"{names} gave equal curves in {count(result.pairs, 'run')}: the comparison itself adds no difference."
    else:
        size = f"by up to {result.largest:.3g} mAP" if math.isfinite(result.largest) else "in length, steps or outcome"
        data, seed, horizon = result.where
        text = (
            f"{names} differ {size} ({data}, seed {seed}, {horizon:g} T): smaller differences are not meaningful here."
        )
    return text + (f" Left out, as in one arm only: {count(len(result.unpaired), 'run')}." if result.unpaired else "")


def _target(score: Ratio | HorizonScore, share: float = 1.0) -> str:
    part = "" if share == 1 else f"{100 * share:g} % of "
    return f"{part}{score.reference}'s final mAP50-95" if score.default else f"mAP50-95 {score.target:.3f}"


def _of(part: int, seeds: int) -> str:
    return f"{part} of {count(seeds, 'seed')}"


def _gap(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}"  # + 0.0: no "-0.000"


def _left_out(seeds: Sequence[int], why: str) -> str:
    return f" Left out, as {why}: seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}." if seeds else ""


def _forest(result: ComparisonResult, axis: str) -> Picture | None:
    """Ratios to the reference arm with their intervals, on all data sets; None if no ratio is known."""
    several = len(result.data) > 1
    arms = [arm for data in result.data for arm in data.arms if axis in arm.ratios]
    if not any(arm.ratios[axis].informative for arm in arms):
        return None
    names = [arm.data if several and len(result.arms) == 2 else f"{short(arm.name, 14)}, {arm.data}" for arm in arms]
    title = f"{AXIS_NOUNS[axis]} to the target over {short(result.plan.reference, 20)}'s"
    found = (f"{arm.name}{f' on {arm.data}' if several else ''} {ratio_text(arm.ratios[axis])}" for arm in arms)
    alt = f"{title}: {', '.join(found)}."
    figure = _forest_figure(title[0].upper() + title[1:], names if several else [arm.name for arm in arms], arms, axis)
    return picture(f"{AXIS_NOUNS[axis]}-ratio", figure, alt)


def _forest_figure(title: str, names: Sequence[str], arms: Sequence[ArmResult], axis: str) -> Figure:
    figure, axes = row_panel(title, names)
    ratios = [arm.ratios[axis] for arm in arms]
    ends = [v for ratio in ratios for v in (ratio.value, ratio.low, ratio.high) if v and math.isfinite(v)]
    reach = min(max([1.25, *(max(v, 1 / v) for v in ends)]) * 1.15, 12.0)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, linewidth=1)
    for y, (style, ratio) in enumerate(zip(map(style_of, arms), ratios)):
        if ratio.low is not None and ratio.high is not None:
            low, high = (min(max(v, 1 / reach), reach) for v in (ratio.low, ratio.high))
            axes.plot([low, high], [y, y], color=style.color, linewidth=2.2, solid_capstyle="butt")
            for mark, edge, beyond in (("<", 1 / reach, ratio.low < 1 / reach), (">", reach, ratio.high > reach)):
                if beyond:
                    axes.plot(edge, y, mark, color=style.color, markersize=6, clip_on=False)
        if ratio.value and 1 / reach <= ratio.value <= reach:
            axes.plot(ratio.value, y, style.line["marker"], color=style.color, markersize=7)
        elif ratio.value is None:
            axes.text(1.02, y + 0.18, "no ratio", va="center", color=MUTED, fontsize=8)
    axes.set_xlim(1 / reach, reach)
    steps = [0.1, 0.2, 0.5, 0.7, 0.85, 1, 1.2, 1.5, 2, 5, 10]
    shown = [v for v in steps if 1 / reach <= v <= reach and (reach < 3 or v not in {0.7, 0.85, 1.2, 1.5})]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}{TIMES}"))
    gap = 2 * "\N{EM SPACE}"  # a page would join ordinary spaces
    axes.set_xlabel(f"\N{LEFTWARDS ARROW} less{gap}than the reference{gap}more \N{RIGHTWARDS ARROW}")
    return figure
