"""Comparisons over several data sets: their plan, the statistics over all of them, and what the report says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from yolo_sophia.compare.plan import parse, plan_yaml, runs
from yolo_sophia.compare.tuning import tune_plans
from yolo_sophia.runs import estimate

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
