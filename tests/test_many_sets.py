"""Comparisons over several data sets: their plan, the statistics over all of them, and what the report says of them."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import product
from pathlib import Path
from statistics import NormalDist, stdev

import numpy as np
import pytest

from yolo_sophia.compare.aggregate import RESAMPLES, aggregate, iqm, seeds_needed
from yolo_sophia.compare.estimate import seeds
from yolo_sophia.compare.pairwise import cost_ratio, final_difference
from yolo_sophia.compare.plan import parse, plan_yaml, runs
from yolo_sophia.compare.score import Curve
from yolo_sophia.compare.sections import profiles, verdict
from yolo_sophia.compare.statistics import compute
from yolo_sophia.compare.tuning import tune_plans
from yolo_sophia.report.document import Fold, Gallery, Table, Text, Verdict
from yolo_sophia.runs import estimate
from yolo_sophia.runs.results import MAP50, MAP50_95, RunResult
from yolo_sophia.runs.scheduler import folder_of
from yolo_sophia.runs.worker import CURVE, FAILURE, RECEIPT, write_order

OWN = "data:\n  a.yaml: {epochs: 20, imgsz: 96}\n  b.yaml:\n"
REST = "model: m.pt\noptimizers: [SophiaG, AdamW]\nepochs: 10\nimgsz: 64\nseeds: 1\n"


def from_file(folder: Path, text: str, *words: str):
    (folder / "p.yaml").write_text(text)
    return parse([f"plan={folder / 'p.yaml'}", *words])


# Plan -----------------------------------------------------------------------------------------------------------------


def test_a_data_set_may_have_its_own_length_and_image_size(tmp_path):
    made = from_file(tmp_path, OWN + REST + "horizons: [1.0, 0.5]\ntune_trials: 2\n")
    found = {(run.data, run.horizon): (run.arguments["epochs"], run.arguments["imgsz"]) for run in runs(made)}
    assert found == {
        ("a.yaml", 1): (20, 96),
        ("a.yaml", 0.5): (10, 96),
        ("b.yaml", 1): (10, 64),
        ("b.yaml", 0.5): (5, 64),
    }
    trials = {data: (study.epochs, study.common["imgsz"]) for (_, data), study in tune_plans(made).items()}
    assert trials == {"a.yaml": (6, 96), "b.yaml": (3, 64)}
    again = from_file(tmp_path, plan_yaml(made))
    assert again == made and runs(again) == runs(made)


def test_a_data_set_has_the_same_runs_alone_and_among_others(tmp_path):
    """What one data set's comparison has finished is found again when others are added to the plan."""
    alone = runs(parse({"data": "a.yaml", "model": "m.pt", "optimizers": "SophiaG,AdamW", "epochs": 20, "imgsz": 96}))
    both = runs(from_file(tmp_path, OWN + REST.replace("seeds: 1", "seeds: 3")))
    assert {run.key for run in alone} == {run.key for run in both if run.data == "a.yaml"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data: {a.yaml: {lr0: 0.1}}", "data: a.yaml: found {'lr0': 0.1}, expected a mapping with epochs and imgsz"),
        ("data: {a.yaml: 20}", "data: a.yaml: found 20, expected a mapping with epochs and imgsz"),
        ("data: {a.yaml: {epochs: 0}}", "data: a.yaml: epochs=0: expected a whole number >= 1"),
        ("data: {a.yaml: {imgsz: big}}", "imgsz='big'"),
        ("data: {a.yaml: {imgsz: 64}}\narms: {SGD: {imgsz: 96}}", "imgsz is set for arm SGD and for data=a.yaml"),
        ("data: {}", "the plan lacks data"),
    ],
)
def test_refuses(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        from_file(tmp_path, f"{text}\n{REST}")
    assert message in str(error.value)


def test_a_step_is_measured_at_every_image_size(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "yolo_sophia.integration.measure.count_images", lambda data: {"a.yaml": 32, "b.yaml": 320}[data]
    )
    monkeypatch.setattr(
        "yolo_sophia.integration.measure.measure_step", lambda _, batch, size, __: (size / 64, 1e6, 1.0)
    )
    made = from_file(tmp_path, OWN + REST)
    lines = estimate.costs(made, runs(made), 1)
    assert [line[:50] for line in lines[:2]] == [
        "measured: 1.00 s for one batch of 16 at 64 px (1.0", "measured: 1.50 s for one batch of 16 at 96 px (1.0"
    ]  # fmt: skip
    # Two arms: a 2 x 20 epochs of 2 batches of 1.5 s, b 2 x 10 epochs of 20 batches of 1 s.
    assert f"time: about {estimate.duration(120 + 400)} " in lines[-1]


# Statistics -----------------------------------------------------------------------------------------------------------

SCORES = {
    "A": {"x": [0.98, 1.0, 1.03], "y": [0.9, 1.0, 1.2], "z": [1.0, 1.0, 1.01]},
    "S": {"x": [1.1, 1.0, 1.2], "y": [1.3, 0.7, 0.0], "z": [1.0, 1.2, 0.99]},
}


def of(arm: str, scores=SCORES):
    (found,) = (one for one in aggregate(scores, "A") if one.arm == arm)
    return found


@pytest.mark.parametrize("size", [*range(1, 13), 30])
def test_interquartile_mean_is_the_trimmed_mean_of_scipy(size):
    trim_mean = pytest.importorskip("scipy.stats").trim_mean
    rng = np.random.default_rng(size)
    values = rng.normal(size=size).round(1)  # with ties
    counts = rng.multinomial(size, np.full(size, 1 / size), size=50)
    wanted = [trim_mean(np.repeat(values, row), 0.25) for row in (np.ones(size, int), *counts)]
    assert iqm(values, np.vstack([np.ones(size, int), counts])) == pytest.approx(wanted)


def test_values_over_all_data_sets_by_hand():
    # S sorted: 0 .7 | .99 1 1 1.1 1.2 | 1.2 1.3; a quarter of 9 is 2 whole runs.
    assert of("S").iqm.value == pytest.approx((0.99 + 1 + 1 + 1.1 + 1.2) / 5)
    # Pairs of runs above, equal ends half: x 3 + 1.5 + 3, y 3 + 0 + 0, z 1 + 3 + 0, of 9 each.
    wins = []
    for data in "xyz":
        pairs = list(product(SCORES["S"][data], SCORES["A"][data]))
        wins.append(sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs))
    assert wins == pytest.approx([7.5 / 9, 3 / 9, 4 / 9]) and of("A").improvement is None
    assert of("S").improvement.value == pytest.approx(sum(wins) / 3)
    shares = dict(zip(of("S").taus, of("S").shares))
    for tau, share in shares.items():
        assert share == pytest.approx(np.mean([np.mean(np.array(own) > tau) for own in SCORES["S"].values()]))
    assert of("S").taus[0] == pytest.approx(0.5 - 0.05 * 0.8) and of("S").taus == of("A").taus  # not from 0
    assert of("S").shares[0] == pytest.approx(8 / 9) and of("A").shares[0] == 1 and of("S").shares[-1] == 0


def test_intervals_are_those_of_a_bootstrap_that_resamples_every_data_set_and_arm():
    """Against a plain loop over resamples."""
    rng = np.random.default_rng(5)
    means, better, above = [], [], []
    tau = of("S").taus[60]
    for _ in range(RESAMPLES):
        own, base = ([rng.choice(one, len(one)) for one in SCORES[arm].values()] for arm in "SA")
        means.append(np.sort(np.concatenate(own))[2:-2].mean())
        pairs = [np.sign(a[:, None] - b).mean() / 2 + 0.5 for a, b in zip(own, base)]
        better.append(np.mean(pairs))
        above.append(np.mean([np.mean(one > tau) for one in own]))
    got = of("S")
    for drawn, interval in ((means, got.iqm), (better, got.improvement)):
        assert (interval.low, interval.high) == pytest.approx(
            np.quantile(drawn, [0.025, 0.975]), abs=0.019
        )  # steps of 1/54
    assert (got.lows[60], got.highs[60]) == pytest.approx(np.quantile(above, [0.025, 0.975]), abs=1e-6)
    assert of("S") == got  # no chance in the result


def test_data_sets_count_alike_whatever_their_number_of_runs():
    scores = {"A": {"x": [1.0, 1.0], "y": [1.0, 1.0]}, "S": {"x": [2.0] * 8, "y": [0.5] * 2}}
    assert of("S", scores).improvement.value == 0.5 and of("S", scores).direction == 0
    assert set(of("S", scores).shares) == {0, 0.5, 1}


def test_direction_and_single_runs():
    for sign in (1, -1):
        apart = {"A": {"x": [1.0, 1.1], "y": [1.0, 1.1]}, "S": {"x": [1 + sign] * 2, "y": [1 + sign] * 2}}
        assert of("S", apart).direction == sign and of("A", apart).direction == 0
    single = of("S", {"A": {"x": [1.0], "y": [1.0, 1.1]}, "S": {"x": [2.0], "y": [2.0, 2.0]}})
    assert single.improvement.low is None and single.iqm.high is None and not single.lows and single.direction == 0
    same = of("S", {"A": {"x": [1.0, 1.0]}, "S": {"x": [1.0, 1.0]}})
    assert same.improvement.value == 0.5 and same.direction == 0


@pytest.mark.parametrize(
    ("scatter", "difference"), [(0.01, 0.01), (0.02, 0.01), (0.05, 0.01), (0.004, 0.01), (0.03, 0.02)]
)
def test_number_of_seeds_has_the_power_of_a_paired_t_test(scatter, difference):
    stats = pytest.importorskip("scipy.stats")

    def power(seeds: int) -> float:
        limit, shift = stats.t.ppf(0.975, seeds - 1), difference / scatter * math.sqrt(seeds)
        return stats.nct.sf(limit, seeds - 1, shift) + stats.nct.cdf(-limit, seeds - 1, shift)

    seeds = seeds_needed(scatter, difference)
    assert power(seeds) > 0.79 and (seeds < 5 or power(seeds - 1) < 0.805)


def test_number_of_seeds_of_a_simulated_study():
    """Power by brute force: share of studies whose interval of Student's t excludes 0."""
    seeds, rng = seeds_needed(0.015, 0.01), np.random.default_rng(0)
    assert seeds == 20  # (1.960 + .842)^2 * 2.25 + 1.921 = 19.6
    gaps = rng.normal(0.01, 0.015, size=(4000, seeds))
    shown = np.abs(gaps.mean(axis=1)) > 2.0930 * gaps.std(axis=1, ddof=1) / math.sqrt(seeds)  # t(19)
    assert shown.mean() == pytest.approx(0.8, abs=0.02)
    assert seeds_needed(0.0, 0.01) == 2 and NormalDist().inv_cdf(0.8) == pytest.approx(0.8416, abs=1e-4)


@pytest.mark.parametrize(
    ("gaps", "outcome"),
    [
        ((0.01, 0.02, 0.03), "tie"),  # .02 +- 4.3027 * .01 / sqrt(3) = .0248
        ((0.015, 0.02, 0.025), "win"),  # half of that
        ((-0.015, -0.02, -0.025), "loss"),
        ((0.0, 0.0, 0.0), "tie"),
        ((0.2, 0.2), "open"),  # two seeds say little about their scatter
        ((0.2,), "open"),
    ],
)
def test_win_tie_and_loss(gaps, outcome):
    def run(arm: str, seed: int, final: float) -> Curve:
        return Curve(arm, "d", seed, 1.0, (1,), (1,), (1.0,), (final,), (final,))

    curves = [run(arm, s, 0.5 + (arm == "S") * gap) for arm in "SA" for s, gap in enumerate(gaps)]
    assert final_difference(curves, "S", "A", "d").outcome == outcome


def results_of(plan, finals: dict[tuple[str, str], list[float | None]]) -> list[RunResult]:
    """Runs of 10 epochs that rise in equal steps to these finals, by arm and data set; None: failed after an epoch."""
    made = []
    for run in runs(plan):
        final = finals[run.arm, run.data][run.seed]
        rows = tuple(
            {"epoch": e, "steps": 10 * e, "images": 160 * e, "seconds": 10.0 * e, MAP50_95: v, MAP50: min(1.5 * v, 1)}
            for e in range(1, 11)
            for v in [(final or 0.1) * e / 10]
        )
        receipt = {"args": dict(run.arguments), "wall_seconds": 1.0}
        made.append(RunResult(run, rows, receipt, None) if final is not None else RunResult(run, rows[:1], None, "no"))
    return made


FINALS = {
    ("A", "x.yaml"): [0.50, 0.52, 0.49], ("S", "x.yaml"): [0.55, 0.571, 0.541],
    ("A", "y.yaml"): [0.10, 0.11, 0.12], ("S", "y.yaml"): [0.11, 0.11, 0.11],
    ("A", "z.yaml"): [0.80, 0.80, 0.81], ("S", "z.yaml"): [0.70, 0.70, None],
}  # fmt: skip


def make_plan(tmp_path, data: str = "x.yaml,y.yaml,z.yaml", **changes):
    arms = {"S": {"optimizer": "SophiaG"}, "A": {"optimizer": "AdamW"}}
    given = {"data": data, "model": "m.pt", "arms": arms, "reference": "A", "epochs": 10, "out": str(tmp_path)}
    return parse({**given, **changes})


def test_scores_of_a_comparison(tmp_path):
    plan = make_plan(tmp_path)
    result = compute(plan, results_of(plan, FINALS))
    own = {one.arm: one for one in result.aggregates}
    assert list(own) == ["A", "S"] and result.not_comparable == ()
    scores = {
        arm: {d: [(v or 0) / m for v in FINALS[arm, f"{d}.yaml"]] for d, m in zip("xyz", (0.5, 0.11, 0.8))}
        for arm in "AS"
    }
    assert own["S"] == of("S", scores)  # a failed run scores 0
    outcomes = [data.arms[1].difference.outcome for data in result.data]
    assert outcomes == ["win", "tie", "open"]
    gaps = [0.05, 0.051, 0.051]
    assert result.data[0].arms[1].difference.scatter == pytest.approx(stdev(gaps))
    one = compute(make_plan(tmp_path, "x.yaml"), results_of(make_plan(tmp_path, "x.yaml"), FINALS))
    assert one.aggregates == () and one.profiles == {}
    alone = [r for r in results_of(plan, FINALS) if r.run.seed == 0]
    assert {data.arms[1].difference.outcome for data in compute(plan, alone).data} == {"open"}


def test_data_sets_without_every_arm_are_left_out(tmp_path):
    plan = make_plan(tmp_path)
    results = [r for r in results_of(plan, FINALS) if (r.run.arm, r.run.data) != ("S", "z.yaml")]
    found = compute(plan, results)
    assert found.not_comparable == ("z",) and len(found.aggregates) == 2
    results = [r for r in results if (r.run.arm, r.run.data) != ("A", "y.yaml")]
    assert compute(plan, results).aggregates == ()


def test_second_target(tmp_path):
    """Of runs of ten epochs, one that rises to .50 reaches .485 = .97 x .5 in the tenth, one to .571 in the ninth."""
    plan = make_plan(tmp_path, "x.yaml")
    (data,) = compute(plan, results_of(plan, FINALS)).data
    assert (data.target, data.near) == (0.5, pytest.approx(0.485))
    reference, arm = data.arms
    assert reference.summary.missed == 1 and reference.near_steps == 100 and reference.near is None
    assert arm.near_steps == 90 and arm.near.missed == (0, 0) and arm.near.value == pytest.approx(0.9)
    curves = [Curve.of(result) for result in results_of(plan, FINALS)]
    assert arm.near == cost_ratio(curves, "S", "A", "x", share=0.97) and arm.near.share == 0.97
    assert arm.difference == final_difference(curves, "S", "A", "x")
    plan = make_plan(tmp_path, "x.yaml", target=0.5)
    (data,) = compute(plan, results_of(plan, FINALS)).data
    assert data.near is None and data.arms[1].near is None and data.arms[1].near_steps is None


# Report ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def _no_png(monkeypatch):
    monkeypatch.setattr("yolo_sophia.report.figure_style.to_png", lambda _: b"PNG")


def parts(section, kind: type) -> list:
    return [block for block in section.blocks if isinstance(block, kind)]


@pytest.mark.usefixtures("_no_png")
def test_verdict_is_one_sentence_per_arm_and_a_table(tmp_path):
    plan = make_plan(tmp_path)
    result = compute(plan, results_of(plan, FINALS))
    (section,) = verdict.sections(result)
    (arm,) = parts(section, Verdict)
    own = result.aggregates[1]
    ends = [f"{v:.3f}" for v in (own.iqm.value, own.iqm.low, own.iqm.high)]
    odds = [f"{v:.2f}" for v in (own.improvement.value, own.improvement.low, own.improvement.high)]
    assert (arm.arm, arm.badge) == ("S", "no difference shown")
    assert arm.sentences == [
        f"Over 3 data sets, the final mAP50-95 of S is {ends[0]} ({ends[1]} to {ends[2]}) of A's median (interquartile "
        f"mean), and a run ends above one of A with probability {odds[0]} ({odds[1]} to {odds[2]}): no difference "
        "shown; by data set 1 win, 1 tie, 0 losses, 1 open."
    ]
    (table,) = parts(section, Table)
    assert [row[0] for row in table.rows] == ["x", "y", "z", "all"]
    assert [row[1][0] for row in table.rows] == ["win", "tie", "open", "1 win, 1 tie, 0 losses, 1 open"]
    assert table.rows[0][1][1] == "+0.051 (+0.049 to +0.052, 3 seeds)"
    assert table.rows[-1][1][1] == "mean at or above on 2 of 3"
    texts = [block.text for block in parts(section, Text)]
    assert sum("ndicative only" in text for text in texts) == 1
    (fold,) = parts(section, Fold)
    assert [block.arm for block in fold.blocks if isinstance(block, Verdict)] == ["S on x", "S on y", "S on z"]
    assert not fold.opened and "ndicative" not in str([block.sentences for block in fold.blocks[:3]])


@pytest.mark.parametrize(("gap", "badge", "tone"), [(0.05, "higher", "better"), (-0.05, "lower", "worse")])
def test_direction_of_the_verdict(tmp_path, gap, badge, tone):
    plan = make_plan(tmp_path, "x.yaml,y.yaml", seeds=5)
    finals = {
        (a, d): [0.5 + (a == "S") * gap + 0.001 * s for s in range(5)] for a in "AS" for d in ("x.yaml", "y.yaml")
    }
    result = compute(plan, results_of(plan, finals))
    found = verdict.overall_sentence(result.aggregates[1], "A", Counter(win=1, tie=2))
    assert f": {badge}; by data set 1 win, 2 ties, 0 losses." in found
    assert (verdict._overall(result, 1).badge, verdict._overall(result, 1).tone) == (badge, tone)
    assert verdict._fewest_pairs([data.arms[1] for data in result.data]) == 5  # enough: no note


@pytest.mark.usefixtures("_no_png")
def test_no_verdict_over_data_sets_that_are_not_comparable(tmp_path):
    plan = make_plan(tmp_path)
    result = compute(plan, [r for r in results_of(plan, FINALS) if r.run.arm == "A" or r.run.data == "x.yaml"])
    (section,) = verdict.sections(result)
    (arm,) = parts(section, Verdict)
    assert arm.sentences == [verdict.TOO_FEW] and arm.badge == "no verdict"
    (table,) = parts(section, Table)
    assert [row[1] for row in table.rows[1:3]] == ["\N{EN DASH}"] * 2 and table.rows[0][1][0] == "win"


@pytest.mark.usefixtures("_no_png")
def test_section_over_all_data_sets(tmp_path):
    plan = make_plan(tmp_path)
    result = compute(plan, results_of(plan, FINALS))
    (section,) = profiles.sections(result)
    table = parts(section, Table)[0]
    assert [row[0] for row in table.rows] == ["A", "S"] and table.rows[0][2] == "\N{EN DASH}"
    assert table.rows[1][1] == verdict.interval_text(result.aggregates[1].iqm)
    score = parts(section, Gallery)[0].pictures[0]
    assert score.name == "score-profile" and f"S {result.aggregates[1].iqm.value:.3f}" in score.alt


# Dry run --------------------------------------------------------------------------------------------------------------


def on_disk(plan, results) -> None:
    for result in results:
        folder = folder_of(plan.out, result.run)
        folder.mkdir(parents=True)
        write_order(folder, result.run, 1)
        (folder / CURVE).write_text("".join(json.dumps(row) + "\n" for row in result.rows))
        if result.receipt:
            (folder / RECEIPT).write_text(json.dumps(result.receipt))
        else:
            (folder / FAILURE).write_text("no")


def test_dry_run_names_the_number_of_seeds(tmp_path):
    plan = make_plan(tmp_path, tune_trials=0)
    assert seeds(plan) == [
        "seeds: no two seeds of an arm and of the reference have finished here, so their scatter is not known"
    ]
    on_disk(plan, results_of(plan, FINALS))
    scatter = {"x": stdev([0.05, 0.051, 0.051]), "y": stdev([0.01, 0.0, -0.01]), "z": stdev([-0.1, -0.1])}
    mean = math.sqrt(sum(s**2 for s in scatter.values())) / 3
    assert seeds(plan) == [
        *(
            f"seeds: {seeds_needed(scatter[d], 0.01)} would show a difference of 0.01 mAP50-95 with 80 % power on {d} "
            f"(scatter {scatter[d]:.4f} of {pairs} pairs)"
            for d, pairs in (("x", 3), ("y", 3), ("z", 2))
        ),
        f"seeds: {seeds_needed(mean, 0.01)} would show a difference of 0.01 mAP50-95 with 80 % power in the mean over "
        "these 3 data sets",
    ]
    assert seeds_needed(scatter["y"], 0.01) == 10
    # Runs of other settings in the folder are not the plan's, unless tuning found them.
    assert "not known" in seeds(make_plan(tmp_path, lr0=0.5))[0]
    assert "on y (scatter 0.0100 of 3 pairs)" in seeds(make_plan(tmp_path, lr0=0.5, tune_trials=2))[1]


def test_scatter_is_pooled_over_the_arms(tmp_path):
    arms = {"S": {"optimizer": "SophiaG"}, "A": {"optimizer": "AdamW"}, "B": {"optimizer": "SGD"}}
    arms["A2"] = arms["A"]  # an A/A control has no scatter
    plan = make_plan(tmp_path, "y.yaml", arms=arms)
    finals = {**FINALS, ("B", "y.yaml"): [0.10, 0.15, None], ("A2", "y.yaml"): FINALS["A", "y.yaml"]}
    on_disk(plan, results_of(plan, finals))
    one, two = stdev([0.01, 0.0, -0.01]), stdev([0.0, 0.04])
    pooled = math.sqrt((2 * one**2 + two**2) / 3)
    assert seeds(plan)[0].endswith(f"on y (scatter {pooled:.4f} of 5 pairs)") and len(seeds(plan)) == 1
