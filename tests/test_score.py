"""Scores by hand: every expected number here was worked out on paper, not by the code under test.

Unless said otherwise an epoch is 10 steps, 160 images and 2 seconds.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import pytest

from yolo_sophia.compare import score
from yolo_sophia.compare.pairwise import (
    Difference,
    Ratio,
    control,
    cost_ratio,
    final_difference,
    horizon_score,
    median_ratio,
    profiles,
)
from yolo_sophia.compare.score import Curve, Mean, cost_to_target, default_target, summarize
from yolo_sophia.compare.sections import verdict

INF, NAN = math.inf, math.nan


def run(arm: str, seed: int, *maps: float, horizon: float = 1.0, failed: bool = False, data: str = "d") -> Curve:
    epochs = range(1, len(maps) + 1)
    cost = [tuple(size * epoch for epoch in epochs) for size in (10, 160, 2.0)]
    return Curve(arm, data, seed, horizon, *cost, maps, tuple(min(1.0, m + 0.25) for m in maps), failed)


def reaching(
    arm: str, *epochs: float, length: int = 20, after: float = 0.5, seeds: tuple[int, ...] = ()
) -> list[Curve]:
    """Runs that reach .5 in the given epochs; infinity = never."""
    seeds = seeds or tuple(range(len(epochs)))
    return [run(arm, s, *[after if e >= at else 0.4 for e in range(1, length + 1)]) for s, at in zip(seeds, epochs)]


def ratio(own: list[Curve], base: list[Curve], **arguments) -> Ratio:
    return cost_ratio(own + base, "S", "A", "d", **{"target": 0.5, **arguments})


# One run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": (10,)}, "one value per epoch was expected in every column, found {'steps': 1, 'images': 2"),
        ({"steps": (10, 9)}, "steps must not fall; epoch 2 has 9 after 10"),
        ({"images": (-1, 9)}, "images must not fall; epoch 1 has -1 after 0"),
        ({"seconds": (1.0, NAN)}, "seconds must not fall; epoch 2 has nan after 1.0"),
        ({"seconds": (1.0, INF)}, "seconds must not fall; epoch 2 has inf"),
        ({"map50": (50.0, 51.0)}, "map50 is a fraction from 0 to 1; epoch 1 has 50.0"),
        ({"map50_95": (0.5, -0.1)}, "map50_95 is a fraction from 0 to 1; epoch 2 has -0.1"),
        ({"horizon": 0.0}, "the horizon must be a finite fraction of T above 0"),
        ({"horizon": NAN}, "the horizon must be a finite fraction of T above 0"),
        (dict.fromkeys(score.AXES + score.METRICS, ()), "no epoch. A run without one has failed"),
    ],
)
def test_a_curve_that_cannot_be_is_refused(change, message):
    good = {"steps": (10, 20), "images": (160, 320), "seconds": (2, 4), "map50_95": (0.1, 0.2), "map50": (0.3, 0.4)}
    Curve("A", "d", 0, **{"horizon": 1.0, **good})
    with pytest.raises(ValueError) as error:
        Curve("A", "d", 3, **{"horizon": 1.0, **good, **change})
    assert message in str(error.value) and "'A' on 'd', seed 3" in str(error.value)


def test_a_curve_takes_json_as_it_is():
    curve = Curve("A", "d", 0, 1.0, [0, 0], [160, 160], [2, 2], [0.1, None], [0.2, 0.2])  # no step in these epochs
    assert curve.steps == (0, 0) and math.isnan(curve.map50_95[1]) and curve.diverged
    assert not Curve("A", "d", 0, 1.0, [], [], [], [], [], failed=True).diverged


@pytest.mark.parametrize(
    ("maps", "diverged", "final", "best"),
    [
        ((0.3, 0.5, 0.4), False, 0.4, 0.5),
        ((0.5, 0.049), True, 0.049, 0.5),  # under a tenth of its best
        ((0.5, 0.05), False, 0.05, 0.5),  # a tenth
        ((0.05, 0.0), False, 0.0, 0.05),  # never got anywhere
        ((0.06, 0.0), True, 0.0, 0.06),
        ((0.3, NAN), True, 0.0, 0.3),
        ((NAN, 0.4), True, 0.4, 0.4),
        ((0.3, INF), True, 0.0, 0.3),
    ],
)
def test_diverged_final_and_best(maps, diverged, final, best):
    curve = run("A", 0, *maps)
    assert (curve.diverged, curve.final(), curve.best()) == (diverged, final, best)


def test_infinite_map50_alone_is_divergence():
    assert Curve("A", "d", 0, 1.0, (1,), (1,), (1,), (0.1,), (NAN,)).diverged


# Cost to the target


def test_cost_is_that_of_the_first_epoch_at_or_above_the_target():
    curve = run("A", 0, 0.1, 0.3, 0.5, 0.2, 0.6)
    assert [cost_to_target(curve, 0.5, axis) for axis in score.AXES] == [30, 480, 6]  # a tie reaches it
    assert cost_to_target(curve, 0.5001, "steps") == 50
    assert cost_to_target(curve, 0.61, "steps") == INF
    assert cost_to_target(run("A", 0, NAN, INF, 0.5), 0.5, "steps") == 30  # neither reaches anything
    assert cost_to_target(run("A", 0, 0.1, 0.6, failed=True), 0.5, "steps") == INF  # got there, then crashed


def test_default_target():
    finals = {0: 0.5, 1: 0.7, 2: 0.4}
    curves = [run("A", seed, 0.9, final) for seed, final in finals.items()] + [run("S", 0, 0.99)]
    assert default_target(curves, "A", "d") == 0.5  # the final value counts, not the best
    assert default_target([*curves, run("A", 3, 0.6)], "A", "d") == 0.5  # .4 .5 .6 .7: the lower of the middle two
    assert default_target([*curves, run("A", 3, 0.99, horizon=0.5)], "A", "d") == 0.5
    assert default_target([*curves, run("A", 3, 0.1, failed=True)], "A", "d") == 0.5
    assert default_target([*curves, run("A", 3, 0.8, NAN)], "A", "d") == 0.4  # 0 .4 .5 .7
    assert default_target([run("A", 0, 0.0)], "A", "d") is None
    assert default_target([run("A", 0, 0.3, failed=True)], "A", "d") is None


@pytest.mark.parametrize("seeds", [1, 2, 3, 4, 5])
def test_the_reference_reaches_its_own_target_in_most_seeds(seeds):
    curves = [run("A", seed, 0.1, 0.2 + 0.1 * seed) for seed in range(seeds)]
    summary = summarize(curves, "A", "d", default_target(curves, "A", "d"))
    assert summary.cost["steps"] == 20 and summary.missed == (seeds - 1) // 2


# Means


def test_mean_with_interval_of_student():
    # mean .5, standard deviation .1, t(2) = 4.3027: half width .430270 / sqrt(3) = .248416
    got = score.mean([0.4, 0.5, 0.6])
    assert (got.value, got.low, got.high) == pytest.approx((0.5, 0.251584, 0.748416), abs=1e-6)
    assert got.count == 3
    assert score.mean([0.4]) == Mean(0.4, None, None, 1)
    assert score.mean([]) == Mean(None, None, None, 0)
    assert score.mean([0.25, 0.25]) == Mean(0.25, 0.25, 0.25, 2)


def test_quantiles_of_student():
    table = dict(enumerate((12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179), 1))
    table |= {20: 2.086, 30: 2.042, 120: 1.980}  # as printed in any book
    assert {freedom: round(score.t_975(freedom), 3) for freedom in table} == table
    assert score.t_975(10**9) == pytest.approx(NormalDist().inv_cdf(0.975), abs=1e-5)


def test_summary():
    curves = [
        run("S", 0, 0.6, 0.5),
        run("S", 1, 0.4, 0.7),
        run("S", 2, 0.9, NAN, failed=True),  # diverged and crashed
        run("S", 3, 0.5, 0.0),  # diverged after it got there
        run("S", 4, 0.9, horizon=0.5),
        run("A", 0, 0.9),
    ]
    got = summarize(curves, "S", "d", 0.6)
    assert (got.seeds, got.failed, got.diverged, got.missed) == ((0, 1, 2, 3), 1, 2, 2)
    assert [m.count for m in (got.final, got.best, got.final50)] == [3] * 3
    assert got.final.value == pytest.approx(0.4) and got.best.value == pytest.approx(1.8 / 3)
    assert got.final50.value == pytest.approx(0.65)
    # Steps 10, 20, inf, inf: the middle two are 20 and infinity.
    assert got.cost == {"steps": INF, "images": INF, "seconds": INF}
    assert summarize(curves, "S", "d", 0.5).cost == {"steps": 15, "images": 240, "seconds": 3}  # 10, 10, 20, inf
    bare = summarize(curves, "S", "d", None)
    assert bare.missed is None and set(bare.cost.values()) == {None} and bare.final == got.final


# Ratio


def test_ratio_paired_by_seed():
    # 8/10, 9/10, 12/10: the median is .9; each end of the range is the median of 7 in 27 resamples.
    got = ratio(reaching("S", 8, 9, 12), reaching("A", 10, 10, 10))
    assert got.ratios == pytest.approx((0.8, 0.9, 1.2)) and got.seeds == (0, 1, 2) and got.unpaired == ()
    assert (got.value, got.low, got.high) == pytest.approx((0.9, 0.8, 1.2)) and got.direction == 0
    # Pairs, not medians: 6/5, 12/10, 18/15 are 1.2 each, whatever the order of the runs.
    got = ratio(reaching("S", 6, 12, 18)[::-1], reaching("A", 5, 10, 15))
    assert (got.value, got.low, got.high, got.direction) == pytest.approx((1.2, 1.2, 1.2, 1))


@pytest.mark.parametrize(("axis", "value"), [("steps", 0.5), ("images", 0.8), ("seconds", 1.5)])
def test_ratio_on_every_axis(axis, value):
    own = Curve("S", "d", 0, 1.0, (10, 20), (160, 400), (3, 9), (0.4, 0.5), (0.5, 0.6))
    base = Curve("A", "d", 0, 1.0, (5, 40), (100, 500), (2, 6), (0.4, 0.5), (0.5, 0.6))
    got = ratio([own], [base], axis=axis)
    assert (got.axis, got.value) == (axis, pytest.approx(value))
    assert (got.low, got.high, got.direction) == (None, None, 0)  # one seed, no interval


def test_ratio_of_an_even_number_is_the_same_seen_from_either_side():
    own, base = reaching("S", 2, 5, 10, 10), reaching("A", 10, 10, 10, 5)  # .2 .5 1 2: sqrt(.5 * 1)
    there, back = ratio(own, base), cost_ratio(own + base, "A", "S", "d", target=0.5)
    assert there.value == pytest.approx(math.sqrt(0.5)) and back.value == pytest.approx(math.sqrt(2))
    assert (there.low, there.high) == pytest.approx((1 / back.high, 1 / back.low))


def test_misses_in_numerator_denominator_and_both():
    got = ratio(reaching("S", 8, INF, 8, INF), reaching("A", 10, 10, INF, INF))
    assert got.ratios[:3] == (0.8, INF, 0) and math.isnan(got.ratios[3])
    assert (got.missed, got.informative, len(got.seeds)) == ((2, 2), 3, 4)
    assert (got.value, got.low, got.high) == (pytest.approx(0.8), 0, INF)  # 0, .8 and infinity


def test_an_even_number_of_ratios_between_a_miss_and_another():
    one_missed = ratio(reaching("S", 8, INF), reaching("A", 10, 10))  # .8 and infinity
    assert (one_missed.value, one_missed.low, one_missed.high) == (INF, pytest.approx(0.8), INF)
    each_missed = ratio(reaching("S", 8, INF), reaching("A", INF, 10))  # 0 and infinity: anything
    assert (each_missed.value, each_missed.low, each_missed.high) == (None, 0, INF)
    # One 0 in six: 4 or more draws of six are 0 in .9 % of resamples, 3 in 5.4 %; only these, unknown, lower the end.
    assert median_ratio([0, INF, INF, INF, INF, INF]) == (INF, 0, INF)
    assert median_ratio([0, 0, 0, 0, 0, INF]) == (0, 0, INF)


def test_all_missed():
    got = ratio(reaching("S", INF, INF), reaching("A", INF, INF))
    assert (got.value, got.low, got.high, got.informative, got.direction) == (None, None, None, 0, 0)
    got = ratio(reaching("S", *[INF] * 5), reaching("A", *[10] * 5))
    assert (got.value, got.low, got.high, got.direction) == (INF, INF, INF, 1)
    got = ratio(reaching("S", *[10] * 5), reaching("A", *[INF] * 5))
    assert (got.value, got.low, got.high, got.direction) == (0, 0, 0, -1)


def test_ties_are_no_difference():
    got = ratio(reaching("S", 7, 8, 9, 10, 11), reaching("A", 7, 8, 9, 10, 11))
    assert (got.value, got.low, got.high, got.direction) == (1, 1, 1, 0)
    free = Curve("S", "d", 0, 1.0, (0,), (16,), (1,), (0.5,), (0.6,))  # there before the first step
    assert ratio([free], [Curve("A", *list(vars(free).values())[1:])]).value == 1
    assert ratio([free], reaching("A", 1)).value == 0 and ratio(reaching("S", 1), [_as("A", free)]).value == INF


def _as(arm: str, curve: Curve) -> Curve:
    return Curve(arm, *list(vars(curve).values())[1:])


def test_failed_runs_are_misses():
    own = [*reaching("S", 8, 8), run("S", 2, 0.9, failed=True)]
    got = ratio(own, reaching("A", 10, 10, 10))
    assert got.ratios == (0.8, 0.8, INF) and got.failed == (1, 0) and got.missed == (1, 0)
    own = [*reaching("S", 8, 8), Curve("S", "d", 2, 1.0, (), (), (), (), (), failed=True)]
    assert ratio(own, reaching("A", 10, 10, 10)).ratios == (0.8, 0.8, INF)


def test_only_common_seeds_are_paired():
    got = ratio(reaching("S", 9, 5, 8, seeds=(4, 7, 1)), reaching("A", 10, 10, 1, seeds=(1, 4, 9)))
    assert (got.seeds, got.unpaired) == ((1, 4), (7, 9)) and got.ratios == pytest.approx((0.8, 0.9))
    got = ratio(reaching("S", 9, seeds=(1,)), reaching("A", 9, seeds=(2,)))
    assert (got.seeds, got.unpaired, got.value) == ((), (1, 2), None)


def test_shorter_horizons_are_not_mixed_in():
    short = [run("S", seed, 0.5, horizon=0.5) for seed in range(3)]
    assert ratio(reaching("S", 8) + short, reaching("A", 10)).ratios == pytest.approx((0.8,))


def test_the_target_of_a_ratio():
    own, base = [run("S", 0, 0.5, 0.6)], [run("A", 0, 0.5, 0.6)]
    got = ratio(own, base, target=None)
    assert (got.target, got.default) == (0.6, True)
    assert (ratio(own, base).target, ratio(own, base).default) == (0.5, False)
    nothing = ratio(own, [run("A", 0, 0.0)], target=None)
    assert (nothing.target, nothing.ratios, nothing.value, nothing.missed) == (None, (), None, (0, 0))


def test_bootstrap_interval_of_seven():
    # The median of 7 is the smallest in P(>= 4 of 7 at 1/7) = 1.0 % of resamples and at most the second smallest in
    # P(>= 4 of 7 at 2/7) = 10.8 %: the 2.5 % quantile is the second smallest, likewise above.
    assert median_ratio([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]) == pytest.approx((0.4, 0.2, 0.6))
    assert median_ratio([0.3, 0.1, 0.2]) == median_ratio([0.3, 0.1, 0.2])
    many = np.linspace(0.5, 1.5, 50).tolist()
    assert len({median_ratio(many) for _ in range(5)}) == 1  # no chance in the result


@pytest.mark.parametrize(
    ("low", "high", "direction"), [(0.5, 0.994, -1), (0.5, 0.996, 0), (1.006, 1.5, 1), (1.004, 1.5, 0), (0.9, 1.1, 0)]
)
def test_a_difference_is_shown_only_if_the_printed_interval_shows_it(low, high, direction):
    result = Ratio("S", "A", "d", "steps", 0.5, True, (), (), (), (0, 0), (0, 0), 1.0, low, high)
    assert result.direction == direction


def test_equal_arms_are_rarely_told_apart():
    # Five seeds of one distribution: all five ratios on one side of 1 in 2 * 2**-5 = 6 % of studies, less ties.
    rng = np.random.default_rng(7)
    studies = 300
    found = 0
    for _ in range(studies):
        epochs = rng.integers(6, 16, size=(2, 5))
        found += ratio(reaching("S", *epochs[0]), reaching("A", *epochs[1])).direction != 0
    assert found <= 0.0625 * studies + 3 * math.sqrt(0.06 * 0.94 * studies)


# Final difference


def test_final_difference():
    own = [
        run("S", 0, 0.9, 0.51),
        run("S", 1, 0.62),
        run("S", 2, 0.73),
        run("S", 3, 0.9),
        run("S", 4, 0.9, failed=True),
    ]
    base = [run("A", 0, 0.50), run("A", 1, 0.60), run("A", 2, 0.70), run("A", 4, 0.1), run("A", 5, 0.1)]
    # .01, .02, .03: mean .02, standard deviation .01, half width 4.3027 * .01 / sqrt(3) = .0248416
    got = final_difference(own + base, "S", "A", "d")
    assert (got.seeds, got.left_out, got.mean.count, got.direction) == ((0, 1, 2), (3, 4, 5), 3, 0)
    assert (got.mean.value, got.mean.low, got.mean.high) == pytest.approx((0.02, -0.0048416, 0.0448416), abs=1e-6)
    assert final_difference(own[:1] + base[:1], "S", "A", "d").mean.low is None


@pytest.mark.parametrize(("gap", "direction"), [(0.02, 1), (-0.02, -1), (0.0004, 0), (0.0, 0)])
def test_direction_of_the_final_difference(gap, direction):
    curves = [run(arm, s, 0.5 + (arm == "S") * gap + 0.01 * s) for arm in "SA" for s in range(5)]
    assert final_difference(curves, "S", "A", "d").direction == direction


@pytest.mark.parametrize(
    ("low", "high", "direction"), [(0.0004, 0.02, 0), (0.0006, 0.02, 1), (-0.02, -0.0004, 0), (-0.02, -0.0006, -1)]
)
def test_a_final_difference_is_shown_only_if_the_printed_interval_shows_it(low, high, direction):
    assert Difference("S", "A", "d", (), (), Mean(0.0, low, high, 5)).direction == direction


# Horizons


def planned(arm: str, **finals: tuple[float, ...]) -> list[Curve]:
    """Runs by horizon in hundredths of T, the mAP of a failed one given as -1."""
    return [
        run(arm, seed, abs(final) if final >= 0 else 0.9, horizon=int(name[1:]) / 100, failed=final < 0)
        for name, values in finals.items()
        for seed, final in enumerate(values)
    ]


BASE = planned("A", h100=(0.5, 0.6, 0.7), h80=(0.6, 0.6, 0.1), h65=(0.7, 0.5, 0.5), h50=(0.1, 0.1, 0.9))


@pytest.mark.parametrize(
    ("own", "shortest", "missed_longer"),
    [
        (planned("S", h100=(0.6,) * 3, h80=(0.6,) * 3, h65=(0.6, 0.6, 0.5), h50=(0.5, 0.5, 0.6)), 0.65, ()),
        (planned("S", h50=(0.9,) * 3, h100=(0.6,) * 3), 0.5, ()),  # in any order
        (planned("S", h100=(0.6,) * 3, h80=(0.5,) * 3, h65=(0.6,) * 3), 0.65, (0.8,)),
        (planned("S", h100=(0.5, 0.59, 0.9), h80=(0.1,) * 3), None, ()),
        (planned("S", h100=(0.9, 0.9, 0.9), h80=(0.9, -1, -1)), 1.0, ()),  # two crashes of three
        (planned("S", h100=(0.9, 0.9, 0.9), h80=(0.9, 0.9, -1)), 0.8, ()),
        (planned("S", h80=(0.5, 0.5, 0.9, 0.9)), None, ()),  # half of an even number is not most
        (planned("S", h80=(0.5, 0.6, 0.9, 0.9)), 0.8, ()),
    ],
)
def test_shortest_horizon(own, shortest, missed_longer):
    got = horizon_score(own + BASE, "S", "A", "d")
    assert (got.target, got.default, got.shortest, got.missed_longer) == (0.6, True, shortest, missed_longer)


def test_horizon_of_the_reference_itself():
    got = horizon_score(BASE, "A", "A", "d")
    assert got.medians == ((0.5, 0.1, 3), (0.65, 0.5, 3), (0.8, 0.6, 3), (1.0, 0.6, 3))
    assert got.shortest == 0.8
    assert horizon_score(BASE, "A", "A", "d", target=0.7).shortest is None
    assert horizon_score(BASE, "A", "A", "d", target=0.7).default is False
    assert horizon_score([run("A", 0, 0.0)], "A", "A", "d").shortest is None  # nothing to reach


# A/A control


def test_control():
    one = [run("A", 0, 0.1, 0.5), run("A", 1, 0.2, NAN), run("A", 0, 0.3, horizon=0.5), run("A", 9, 0.1)]
    same = [_as("A2", curve) for curve in one[:3]]
    got = control(one + same, "A", "A2")
    assert (got.pairs, got.largest, got.where, got.unpaired) == (3, 0, None, (("d", 9, 1.0),))
    other = [run("A2", 0, 0.1, 0.5), run("A2", 1, 0.2, NAN), run("A2", 0, 0.3125, horizon=0.5)]
    got = control(one + other, "A", "A2")
    assert got.largest == pytest.approx(0.0125) and got.where == ("d", 0, 0.5)


@pytest.mark.parametrize(
    "other",
    [run("B", 0, 0.1), run("B", 0, 0.1, 0.2, 0.3), run("B", 0, 0.1, NAN), run("B", 0, 0.1, 0.2, failed=True)],
    ids=["shorter", "longer", "nan", "failed"],
)
def test_control_of_runs_that_went_another_way(other):
    assert control([run("A", 0, 0.1, 0.2), other], "A", "B").largest == INF


def test_control_sees_map50():
    one = Curve("A", "d", 0, 1.0, (1,), (1,), (1,), (0.1,), (0.2,))
    two = Curve("B", "d", 0, 1.0, (1,), (1,), (9,), (0.1,), (0.25,))  # seconds may differ
    assert control([one, two], "A", "B").largest == pytest.approx(0.05)


# Profiles


def test_profiles():
    costs = {"S": {"x": 10, "y": 30, "z": INF, "w": INF}, "A": {"x": 20, "y": 10, "z": 50, "w": INF}}
    got = {profile.arm: profile for profile in profiles(costs, (1, 2, 3, 4))}
    # Factors: S 1, 3, inf, unsolved; A 2, 1, 1, unsolved.
    assert got["S"].fractions == (0.25, 0.25, 0.5, 0.5)
    assert got["A"].fractions == (0.5, 0.75, 0.75, 0.75)
    # From 1 to 4: S (3 + 1) / 4 / 3, A (2 + 3 + 3) / 4 / 3.
    assert got["S"].area == pytest.approx(1 / 3) and got["A"].area == pytest.approx(2 / 3)


def test_profiles_of_ties_and_of_the_whole_grid():
    tied = profiles({"S": {"x": 7.0}, "A": {"x": 7.0}})
    assert [(profile.fractions, profile.area) for profile in tied] == [((1.0,) * 100, 1.0)] * 2
    assert tied[0].taus[0] == 1 and tied[0].taus[-1] == 4
    late = profiles({"S": {"x": 13 * 1.3}, "A": {"x": 13.0}}, (1, 1.3, 4))[0]  # 13 * 1.3 / 13 > 1.3 by rounding
    assert late.fractions == (0, 1, 1) and late.area == pytest.approx(2.7 / 3)
    assert profiles({"S": {"x": 100.0}, "A": {"x": 1.0}})[0].area == 0


# Sentences


def named(own: list[Curve], base: list[Curve], **arguments) -> str:
    curves = [_as("SophiaG", curve) for curve in own] + [_as("AdamW", curve) for curve in base]
    return verdict.cost_sentence(cost_ratio(curves, "SophiaG", "AdamW", "d", **arguments))


@pytest.mark.parametrize(
    ("own", "base", "text"),
    [
        (
            (17, 18, 19, 20, 21),
            (20,) * 5,
            "SophiaG reached AdamW's final mAP50-95 in 0.95x its steps (0.85-1.05, 5 seeds): no difference shown.",
        ),
        (
            (16, 17, 18, 18, 19),
            (20,) * 5,
            "SophiaG reached AdamW's final mAP50-95 in 0.90x its steps (0.80-0.95, 5 seeds): fewer steps.",
        ),
        (
            (11, 12, 13, 13, 13),
            (10,) * 5,
            "SophiaG reached AdamW's final mAP50-95 in 1.30x its steps (1.10-1.30, 5 seeds): more steps.",
        ),
        (
            (8, 8, 8, 8, INF),
            (10,) * 5,
            "SophiaG reached AdamW's final mAP50-95 in 0.80x its steps (0.80-\N{INFINITY}, 5 seeds):"
            " no difference shown. SophiaG missed it in 1 of 5 seeds, AdamW in 0 of 5 seeds.",
        ),
        (
            (INF, INF, 5),
            (10, 10, 10),
            "SophiaG missed AdamW's final mAP50-95 in 2 of 3 seeds, AdamW in 0 of 3 seeds: no difference shown.",
        ),
        (
            (INF,) * 5,
            (10,) * 5,
            "SophiaG missed AdamW's final mAP50-95 in 5 of 5 seeds, AdamW in 0 of 5 seeds: more steps.",
        ),
        (
            (9, 9, 9),
            (10, 10, 10),
            "SophiaG reached AdamW's final mAP50-95 in 0.90x its steps (0.90-0.90, 3 seeds): fewer steps.",
        ),
        (
            (9,),
            (10,),
            "SophiaG reached AdamW's final mAP50-95 in 0.90x its steps (no interval, 1 seed): no difference shown.",
        ),
    ],
)
def test_verdict(own, base, text):
    assert named(reaching("S", *own, length=21), reaching("A", *base, length=21)) == text


def test_verdict_says_what_it_leaves_out():
    own = [*reaching("S", 8, 8, 8, 8, INF, 8), run("S", 6, 0.9, failed=True)]
    text = named(own, reaching("A", 10, 10, 10, 10, INF, seeds=(0, 1, 2, 3, 4)), target=0.5)
    assert text == (
        "SophiaG reached mAP50-95 0.500 in 0.80x AdamW's steps (0.80-0.80, 4 seeds): fewer steps."
        " SophiaG missed it in 1 of 5 seeds, AdamW in 1 of 5 seeds."
        " Where both missed it (1 seed), nothing is said about the ratio."
        " Left out, as run in one arm only: seeds 5, 6."
    )
    own = [*reaching("S", 8, 8, 8, 8), run("S", 4, 0.9, failed=True)]
    assert named(own, reaching("A", *[10] * 5)).endswith(" Crashed runs count as misses: SophiaG 1, AdamW 0.")


def test_verdict_on_training_time():
    own, base = reaching("S", *[8] * 5), reaching("A", *[10] * 5)
    assert named(base, own, axis="seconds").endswith("training time (1.25-1.25, 5 seeds): more training time.")


def test_verdict_where_there_is_none():
    assert "no final mAP50-95 above 0 on d, so there is nothing to reach" in named(
        [run("S", 0, 0.5)], [run("A", 0, 0.0)]
    )
    missed = named(reaching("S", INF), reaching("A", INF), target=0.5)
    assert missed == ("SophiaG missed mAP50-95 0.500 in 1 of 1 seed, AdamW in 1 of 1 seed: no verdict.")
    assert "no seed in common" in named(reaching("S", 1, seeds=(1,)), reaching("A", 1, seeds=(2,)))


def test_horizon_verdict():
    own = planned("S", h100=(0.6,) * 3, h80=(0.5,) * 3, h65=(0.6,) * 3, h50=(0.1,) * 3)
    base = horizon_score(BASE, "A", "A", "d")
    assert verdict.horizon_sentence(horizon_score(own + BASE, "S", "A", "d"), base) == (
        "S's shortest planned schedule that ends at or above A's final mAP50-95 is 0.65 T"
        " (0.5, 0.65, 0.8, 1 planned), although 0.8 T missed it; A's own is 0.8 T (medians, 3 seeds at least)."
    )
    none = horizon_score(planned("S", h100=(0.1,) * 5, h80=(0.1,) * 5) + BASE, "S", "A", "d", target=0.8)
    base = horizon_score(BASE, "A", "A", "d", target=0.8)
    assert verdict.horizon_sentence(none, base) == (
        "S has no planned schedule that ends at or above mAP50-95 0.800 (planned: 0.8, 1 of T);"
        " A has none, but the two ran different ones (medians, 3 seeds at least)."
    )
    many = planned("A", h100=(0.5,) * 5, h80=(0.5,) * 5)
    alone = horizon_score(many, "A", "A", "d")
    assert verdict.horizon_sentence(alone, alone) == (
        "A's shortest planned schedule that ends at or above A's final mAP50-95 is 0.8 T (0.8, 1 planned);"
        " A's own is 0.8 T (medians, 5 seeds at least)."
    )
    full = horizon_score([run("A", 0, 0.5)], "A", "A", "d")
    assert "were not run over shorter schedules" in verdict.horizon_sentence(full, full)
    nothing = horizon_score([run("A", 0, 0.0)], "A", "A", "d")
    assert "no horizon to find" in verdict.horizon_sentence(nothing, nothing)


def test_difference_verdict():
    gaps = (0.01, 0.02, 0.03, 0.02, 0.02)
    curves = [run("S", s, 0.5 + gap) for s, gap in enumerate(gaps)] + [run("A", s, 0.5) for s in range(6)]
    # Standard deviation sqrt(2e-4 / 4) = .00707107, half width 2.7764 * .00707107 / sqrt(5) = .0087798
    assert verdict.difference_sentence(final_difference(curves, "S", "A", "d")) == (
        "S's final mAP50-95 minus A's is +0.020 (+0.011 to +0.029, 5 seeds): higher."
        " Left out, as not finished in both arms: seed 5."
    )
    alike = [run("S", 0, 0.4999)] + [run("A", 0, 0.5)]
    assert verdict.difference_sentence(final_difference(alike, "S", "A", "d")) == (
        "S's final mAP50-95 minus A's is +0.000 (no interval, 1 seed): no difference shown."
    )
    crashed = [run("S", 0, 0.5, failed=True), run("A", 0, 0.5)]
    assert "no finished seed in common" in verdict.difference_sentence(final_difference(crashed, "S", "A", "d"))


def test_control_verdict():
    one, two = run("A", 0, 0.5), run("A2", 0, 0.5)
    assert verdict.control_sentence(control([one, two], "A", "A2")) == (
        "A and A2, the same settings twice, gave equal curves in 1 run: the comparison itself adds no difference."
    )
    assert verdict.control_sentence(control([one, run("A2", 0, 0.5125), run("A2", 1, 0.5)], "A", "A2")) == (
        "A and A2, the same settings twice, differ by up to 0.0125 mAP (d, seed 0, 1 T): smaller differences are"
        " not meaningful here. Left out, as in one arm only: 1 run."
    )
    assert "differ in length" in verdict.control_sentence(control([one, run("A2", 0, 0.5, 0.5)], "A", "A2"))
