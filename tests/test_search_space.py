"""Search spaces: how they are written, and that every value they give is inside and as it is recorded."""

from __future__ import annotations

import pytest

from yolo_sophia.integration.resolution import validate_arguments
from yolo_sophia.search_space import SPACES, Choice, Range, read_dimension


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([0.8, 0.99], Range(0.8, 0.99, log=False)),
        ([1e-4, 1e-2, "log"], Range(1e-4, 1e-2)),
        ((2, 20, "int"), Range(2, 20, log=False, is_int=True)),
        ([2, 200, "int", "log"], Range(2, 200, is_int=True)),
        ([320, 480, 640], Choice((320, 480, 640))),
        (["gnb", "empirical_fisher"], Choice(("gnb", "empirical_fisher"))),
        ([True, False], Choice((True, False))),
        ({"choices": [320, 640]}, Choice((320, 640))),
        (None, None),
    ],
)
def test_forms(given, expected):
    assert read_dimension("key", given) == expected


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (0.1, "expected [low, high]"),
        ([0.1], None),  # one value to choose from
        ([], "expected [low, high]"),
        ([0.1, 0.2, "lgo"], "expected [low, high]"),
        ([0.1, 0.2, "log", "log"], "expected [low, high]"),
        ([0.2, 0.1], "expected low < high"),
        ([0.0, 0.1, "log"], "expected 0 < low < high for 'log'"),
        ([0.1, float("inf")], "expected low < high"),
        ([0.5, 20, "int"], "expected whole numbers as bounds"),
        (["a", "a"], "expected [low, high]"),
        ([[1, 2], [3, 4]], "expected [low, high]"),
        ({"choice": [1, 2]}, "expected [low, high]"),
    ],
)
def test_malformed(given, says):
    if says is None:
        assert read_dimension("rho", given) == Choice(tuple(given))
        return
    with pytest.raises(ValueError, match="space: rho: found") as caught:
        read_dimension("rho", given)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("dimension", "value", "settled"),
    [
        (Range(1e-4, 1e-2), 0.00123456, 0.001235),
        (Range(0.00123441, 1.0), 0.00123442, 0.00123441),  # rounded it would be outside
        (Range(0.1, 0.123456), 0.123456, 0.123456),
        (Range(2, 20, is_int=True), 7.6, 8),
        (Choice((1, 2)), 2, 2),
    ],
)
def test_settled_values_are_short_and_inside(dimension, value, settled):
    assert dimension.rounded(value) == settled and dimension.contains(settled)


@pytest.mark.parametrize(
    ("dimension", "value"),
    [(Range(1, 3, is_int=True), 1.5), (Range(0, 1, log=False), True), (Range(1, 2), "auto"), (Choice((1, 2)), True)],
)
def test_what_a_dimension_does_not_hold(dimension, value):
    assert not dimension.contains(value)


def test_fractions_cover_a_dimension():
    assert [Range(1, 9, is_int=True).at(u) for u in (0, 0.5, 1)] == [1, 3, 9]


@pytest.mark.parametrize("name", SPACES)
def test_every_end_of_our_spaces_is_accepted_by_the_optimizer(name):
    for key, dimension in SPACES[name].items():
        for value in dimension.samples:
            validate_arguments({"optimizer": name, key: value})
