"""`yolo-sophia tune`: the plan, the trials and who takes them, the files to train with, the report.

Trainings are played by `Played`, an executor that writes a run's folder as the worker does; the test at the end kills
and shares a study of real trainings.
"""

from __future__ import annotations

import json
import math
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from optuna.trial import TrialState
from sqlalchemy import event
from sqlalchemy.engine import Engine
from ultralytics.cfg import get_cfg
from ultralytics.engine.tuner import Tuner

from yolo_sophia import cli, tune_space
from yolo_sophia.integration.arguments import OPTIMIZERS
from yolo_sophia.integration.resolution import Facts, resolve, validate_arguments
from yolo_sophia.options import OPTIONS
from yolo_sophia.presets import load_preset
from yolo_sophia.runs import scheduler
from yolo_sophia.runs.plan import TRIAL_SEED
from yolo_sophia.runs.results import MAP50_95
from yolo_sophia.runs.run import data_name
from yolo_sophia.runs.scheduler import folder_of
from yolo_sophia.runs.worker import CHECKPOINT, CURVE, LOG, RECEIPT, read_curve, read_order
from yolo_sophia.search_space import Range, merged
from yolo_sophia.tune import command, figures, objective
from yolo_sophia.tune.best_settings import best_settings
from yolo_sophia.tune.plan import SAMPLERS, TunePlan, parse, plan_yaml
from yolo_sophia.tune.report import compose, write_report
from yolo_sophia.tune.study import SharedStudy
from yolo_sophia.tune.view import View

BASE = {"data": "sets/bccd/data.yaml", "model": "yolov8n.pt", "epochs": 4, "sophia": "published"}


def words(**changes: object) -> list[str]:
    base = {key: value for key, value in BASE.items() if key != "sophia" or "optimizer" not in changes}
    return [f"{key}={value}" for key, value in {**base, **changes}.items() if value is not None]


def plan(**changes: object) -> TunePlan:
    """`BASE` with other words; None takes one out."""
    return parse(words(**changes))


# The plan -------------------------------------------------------------------------------------------------------------


def test_defaults():
    made = plan()
    assert dict(made.space) == {"lr0": Range(5e-5, 5e-3), "rho": Range(0.01, 1.0)}
    assert dict(made.start) == {key: load_preset("published").settings[key] for key in ("lr0", "rho")}
    assert (made.trials, made.sampler, made.pruner, made.prune_after) == (30, "tpe", "median", 1)
    assert (made.seeds, made.local_workers, made.study) == ((TRIAL_SEED,), 1, "SophiaG-bccd")
    assert made.out == Path("runs/tune/SophiaG-bccd")
    assert made.storage == f"sqlite:///{made.out / 'study.db'}"


def test_a_given_value_is_not_searched_and_the_space_is_written_on_top(tmp_path):
    path = tmp_path / "space.yaml"
    path.write_text("{beta2: [0.8, 99e-2], rho: null, hessian_interval: [2, 20, int]}")
    made = plan(space=path, lr0="1e-3")
    assert dict(made.space) == {"beta2": Range(0.8, 0.99, False), "hessian_interval": Range(2, 20, False, True)}
    assert made.fixed["lr0"] == 0.001
    assert dict(made.start) == {"beta2": 0.99, "hessian_interval": 10}
    inline = plan(space="{'lr0': [1e-3, 2e-3], 'hessian_estimator': ['gnb', 'empirical_fisher']}")
    assert list(inline.space) == ["lr0", "rho", "hessian_estimator"]
    assert dict(inline.start) == {"rho": 0.04, "hessian_estimator": "gnb"}  # lr0 = 3e-4 lies outside


def test_under_a_steered_rho_the_fraction_is_searched():
    made = plan(rho="auto")
    assert list(made.space) == ["lr0", "clip_fraction"] and set(made.start) == {"lr0", "clip_fraction"}
    assert list(merged({"optimizer": "SophiaG", "rho": "auto"}, {"rho": Range(0.1, 1.0)})) == ["lr0", "rho"]


def test_the_start_leaves_out_what_lies_outside_the_space():
    assert dict(plan(optimizer="SGD").start) == {"lr0": 0.01, "momentum": 0.937}
    assert dict(plan(optimizer="SGD", space="{'lr0': [0.02, 0.1]}").start) == {"momentum": 0.937}


def test_entries_of_a_mapping_are_searched():
    """The mapping that is fixed keeps its other entries."""
    space = "{'lr_factors.new': [5, 50, log], 'lr_factors.model.22.cv3*': [2, 4]}"
    made = plan(optimizer="AdamW", lr0=0.001, weight_decay=0.0, lr_factors="{'head': 2}", space=space)
    assert set(made.space) == {"lr_factors.new", "lr_factors.model.22.cv3*"} and not made.start
    (run,) = made.runs({"lr_factors.new": 20.0, "lr_factors.model.22.cv3*": 3.0})
    assert run.arguments["lr_factors"] == {"head": 2, "new": 20.0, "model.22.cv3*": 3.0}
    assert not [key for key in run.arguments if key.startswith("lr_factors.")]
    assert plan(lr_factors="{'head': 2}", space="{'lr_factors.new': ['auto', '10']}").fixed["lr_factors"] == {"head": 2}


def test_names_of_the_version_before_are_searched():
    with pytest.warns(FutureWarning):
        made = plan(space="{'head_lr_factor': [1, 10, log]}", lr0=0.001, rho=0.1)
    assert (
        set(made.space) == {"head_lr_factor"} and made.runs({"head_lr_factor": 3.0})[0].arguments["head_lr_factor"] == 3
    )


@pytest.mark.parametrize("name", ["torch.optim.Adagrad", "AdamW"])
def test_other_optimizers(name):
    made = plan(optimizer=name)
    assert set(made.space) == {"lr0", "weight_decay"}
    (run,) = made.runs({"lr0": 0.004})
    assert run.arguments["lr0"] == 0.004 and run.arguments["optimizer"] == made.arm.arguments["optimizer"]


def test_a_trial_is_every_seed_on_every_data_set():
    made = plan(data="a.yaml,b.yaml", seeds=2, bn_recalibrate=True)
    runs = made.runs({"rho": 0.2})
    assert [(r.data, r.seed) for r in runs] == [(d, TRIAL_SEED + s) for s in (0, 1) for d in ("a.yaml", "b.yaml")]
    assert all(r.bn_recalibrate and r.arguments["rho"] == 0.2 and r.arguments["epochs"] == 4 for r in runs)
    assert made.trial_epochs == 16 and made.prune_after == 4
    assert plan(seeds="3,5").seeds == (3, 5)


def test_grid():
    made = plan(sampler="grid", grid_points=2, space="{'nbs': {choices: [16, 64]}}", rho=0.1)
    assert made.grid() == [{"lr0": lr0, "nbs": nbs} for lr0 in (5e-5, 5e-3) for nbs in (16, 64)]
    assert made.trials == 4
    assert plan(sampler="grid", trials=5).trials == 5
    whole = plan(sampler="grid", grid_points=5, lr0=0.1, rho=1, space="{'hessian_interval': [1, 2, 'int']}")
    assert whole.grid() == [{"hessian_interval": 1}, {"hessian_interval": 2}]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sampler": "grid", "grid_points": 2, "lr0": 0.01, "space": "{'nbs': {choices: [16, 64]}, 'rho': null}"},
        {"rho": "auto", "space": "{'lr0': null}"},
        {"pruner": "none", "workers": 2, "seeds": "1,2", "optimizer": "SGD", "space": "{'imgsz': [64, 96, 'int']}"},
        {"prune_after": 2, "study": "mine", "storage": "x.db", "out": "there", "optimizer_args": "{'eps': 1e-7}",
         "optimizer": "torch.optim.Adagrad", "bn_recalibrate": True, "devices": "0,1"},
    ],
)  # fmt: skip
def test_the_written_plan_is_read_back(changes, tmp_path):
    made = plan(**changes)
    path = tmp_path / "plan.yaml"
    path.write_text(plan_yaml(made))
    again = parse([f"plan={path}"])
    assert again == made and list(again.space) == list(made.space)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": None}, "the plan lacks data"),
        ({"trials": 0}, "trials=0: expected a whole number >= 1"),
        ({"sampler": "tpee"}, "sampler='tpee': expected tpe, random, cmaes or grid"),
        ({"pruner": "mean"}, "pruner='mean': expected median, hyperband or none"),
        ({"optimizers": "SGD"}, "'optimizers' is not a known argument. Did you mean 'optimizer'?"),
        ({"trails": 3}, "'trails' is not a known argument. Did you mean 'trials'?"),
        ({"optimizer": "SofiaG"}, "Did you mean 'SophiaG'?"),
        ({"optimizer": "auto"}, "there is nothing to search"),
        ({"seed": 3}, "seed is decided by the plan"),
        ({"val": False}, "val=False: a study needs the mAP50-95 of every epoch"),
        ({"seeds": 0}, "seeds=0: expected a number >= 1"),
        ({"rho": -1}, "'rho=-1.0' is an invalid value"),
        ({"space": "rho.yaml"}, "space=rho.yaml: no such file"),
        ({"space": "[1, 2]"}, "space: found [1, 2], expected a mapping"),
        ({"space": "{'roh': [0.1, 1.0]}"}, "space: 'roh' is not a known argument. Did you mean 'rho'?"),
        ({"space": "{'seed': [1, 2, 3]}"}, "space: seed is decided by the plan"),
        ({"space": "{'lr_factors.new': [1, 2]}", "lr_factors": "{'new': 3}"}, "lr_factors.new=3 is fixed, and it is"),
        ({"space": "{'lr_factors.head': [0, 2]}"}, "space: lr_factors.head: 'lr_factors': head: found 0.0"),
        ({"space": "{'lr_factors': [1, 2]}"}, "space: lr_factors: 'lr_factors=1.0' is of invalid type float"),
        ({"space": "{'rho.new': [1, 2]}"}, "space: 'rho.new' is not a known argument"),
        ({"space": "{'beta2': [0.9, 1.0]}"}, "space: beta2: 'beta2=1.0' is an invalid value"),
        ({"space": "{'hessian_interval': [2, 20]}"}, "Add 'int' for whole numbers."),
        ({"space": "{'hessian_estimator': ['gnb', 'gbn']}"}, "space: hessian_estimator: 'hessian_estimator=gbn'"),
        ({"space": "{'rho': [0.1, 0.2]}", "optimizer": "SGD"}, "['rho'] are arguments of optimizer=SophiaG"),
        ({"space": "{'clip_fraction': [0.1, 0.9], 'rho': null}"}, "clip_fraction requires rho=auto, found rho="),
        ({"space": "{'rho': [0.1, 0.2]}", "rho": 0.1}, "rho=0.1 is fixed, and it is in the space"),
        ({"grid_points": 4}, "grid_points requires sampler=grid, found sampler=tpe"),
        ({"pruner": "none", "prune_after": 2}, "prune_after requires pruner=median or hyperband"),
        ({"prune_after": 4}, "prune_after=4: expected less than a trial's 4 epochs"),
        ({"sampler": "grid", "trials": 10}, "trials=10: the grid has 9 points"),
        ({"sampler": "grid", "grid_points": 40}, "the grid has 1600 points, expected at most 1000"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(changes, says, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["tune", *words(**changes)]) == 2
    error = capsys.readouterr().err
    assert says in error and error.startswith("yolo-sophia: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_help(capsys):
    assert cli.main(["tune"]) == 0
    shown = capsys.readouterr().out
    assert all(f"\n  {key} " in shown for key in ("trials", "space", "storage"))


@pytest.mark.parametrize(("sampler", "package"), [("tpe", "optuna"), ("cmaes", "cmaes")])
def test_a_missing_package_is_one_line(sampler, package, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "find_spec", lambda name: None if name == package else object())
    assert cli.main(["tune", *words(sampler=sampler)]) == 2
    error = capsys.readouterr().err
    assert (
        error == f'yolo-sophia: tune needs the package {package}, which is missing: pip install "yolo-sophia[tune]".\n'
    )
    assert not list(tmp_path.iterdir())


def test_choices_of_a_space_are_read_as_words():
    made = plan(space="{'freeze': {choices: ['0,1', 2, 'None']}, 'cache': ['ram', 'False']}")
    (run,) = made.runs({"freeze": "0,1", "cache": "ram"})
    assert (run.arguments["freeze"], run.arguments["cache"]) == ((0, 1), "ram")
    (run,) = made.runs({"freeze": "None", "cache": "False"})
    assert (run.arguments["freeze"], run.arguments["cache"]) == (None, False)
    text = best_settings(made, {"freeze": "0,1"}, 0.5, 3).files["best-arguments.yaml"]
    assert yaml.safe_load(text)["freeze"] == [0, 1]


# Trials ---------------------------------------------------------------------------------------------------------------


class Played:
    """An executor whose trainings get scores that are a function of arguments and epoch, an epoch per round."""

    threads = 1

    def __init__(self, score: Callable[[dict, int], float | str | None], places: int):
        self.score, self.places, self.begun = score, places, []

    def start(self, folder: Path) -> PlayedJob:
        arguments = read_order(folder)["arguments"]
        self.begun.append(arguments)
        return PlayedJob(folder, arguments, self.score)


class PlayedJob:
    def __init__(self, folder: Path, arguments: dict, score: Callable):
        self.folder, self.arguments, self.score, self.code = folder, arguments, score, None

    def started(self) -> bool:
        return True

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        done = len(read_curve(self.folder))
        if done == self.arguments["epochs"]:
            (self.folder / RECEIPT).write_text("{}")
            self.code = 0
            return 0
        value = self.score(self.arguments, done + 1)
        if isinstance(value, str):
            (self.folder / LOG).write_text(value)
            self.code = 1
            return 1
        with (self.folder / CURVE).open("a") as file:
            file.write(json.dumps({"epoch": done + 1, MAP50_95: value}) + "\n")
        return None

    def stop(self) -> None:
        self.code = -signal.SIGTERM

    def explain(self) -> str:
        return ""


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk():
    def relax(connection: sqlite3.Connection, _: object) -> None:
        connection.execute("pragma synchronous=off")

    event.listen(Engine, "connect", relax)
    yield
    event.remove(Engine, "connect", relax)


def by_lr0(arguments: dict, epoch: int) -> float:
    """Best at lr0 = .001, growing with the epochs."""
    return epoch / 10 * math.exp(-abs(math.log(arguments["lr0"] / 1e-3)))


@pytest.fixture
def tuned(tmp_path, monkeypatch) -> Callable[..., View]:
    """Run a study of played trainings in `tmp_path / out`, or go on with it; returns it as it stands."""

    def tune(score: Callable[[dict, int], float | None] = by_lr0, **changes: object) -> View:
        made = plan(**{"out": tmp_path / "out", "trials": 4, "pruner": "none", **changes})
        tune.played, tune.states = Played(score, made.local_workers), []
        tune.study = study = SharedStudy(made)
        monkeypatch.setattr(scheduler, "POLL", 0.0)
        command.train_trials(
            study, tune.played, lambda shown: tune.states.append([(item.run.key, item.state) for item in shown])
        )
        return View.of(study)

    return tune


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samplers(sampler, tuned):
    view = tuned(sampler=sampler, trials=5)
    assert [trial.state for trial in view.trials] == ["finished"] * 5
    for trial, arguments in zip(view.trials, tuned.played.begun):
        assert all(own.contains(trial.settings[key]) for key, own in view.plan.space.items())
        assert trial.settings == {key: arguments[key] for key in view.plan.space}
        assert trial.value == pytest.approx(by_lr0(arguments, 4))
        assert dict(trial.curve) == {e: pytest.approx(by_lr0(arguments, e)) for e in (1, 2, 3, 4)}
    assert view.best.value == max(trial.value for trial in view.trials)
    if sampler == "grid":
        assert [trial.settings for trial in view.trials] == view.plan.grid()[:5]
    else:
        assert view.trials[0].settings == dict(view.plan.start) and view.start is view.trials[0]


def test_a_study_in_two_calls_is_that_in_one(tuned, tmp_path):
    tuned(trials=12, out=tmp_path / "one")
    one = [dict(trial.settings) for trial in View.of(tuned.study).trials]
    for trials in (5, 12):
        view = tuned(trials=trials)
        assert len(view.trials) == trials
    assert [dict(trial.settings) for trial in view.trials] == one
    assert len(tuned.played.begun) == 7  # the last call trained what was missing


@pytest.mark.parametrize("pruner", ["median", "hyperband"])
def test_pruning(pruner, tuned):
    """A queue of ever worse learning rates: after five finished trials the median pruner stops what is below."""
    view = tuned(pruner=pruner, sampler="grid", trials=None, grid_points=7, epochs=6, prune_after=2,
                 space="{'lr0': [1e-3, 9e-3], 'rho': null}")  # fmt: skip
    states = [trial.state for trial in view.trials]
    if pruner == "median":
        assert states == ["finished"] * 5 + ["pruned"] * 2
    assert states[0] == "finished" and "pruned" in states
    for trial in view.having("pruned"):
        assert 2 <= max(trial.curve) < 6 and trial.value is None
        (run,) = view.plan.runs(trial.settings)
        assert not (folder_of(view.plan.out, run) / RECEIPT).is_file()


def test_a_trial_of_several_trainings_is_their_mean(tuned):
    def score(arguments, epoch):
        return epoch / 10 + (arguments["seed"] == TRIAL_SEED + 1) * 0.2 + (data_name(arguments["data"]) == "b") * 0.1

    view = tuned(score, seeds=2, data="a.yaml,b.yaml", epochs=2, trials=1)
    (trial,) = view.trials
    assert trial.value == pytest.approx(0.2 + 0.1 + 0.05)
    expected = [0.1, 0.2, 0.2, 0.25, (0.2 + 0.3 + 0.3) / 3, (0.2 + 0.3 + 0.4) / 3, (0.2 + 0.3 + 0.4 + 0.4) / 4, 0.35]
    assert list(trial.curve.values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("score", "note"), [("out of memory", "out of memory"), (None, "the last mAP50-95 is not finite")]
)
def test_a_failed_trial_counts_and_the_others_go_on(score, note, tuned):
    view = tuned(lambda arguments, epoch: score if arguments["lr0"] == 0.0003 else 0.1, trials=3)
    assert [trial.state for trial in view.trials] == ["failed", "finished", "finished"]
    assert view.trials[0].note == note and view.best.number == 1
    assert len(tuned(trials=3).trials) == 3


def test_ctrl_c_leaves_a_study_that_goes_on(tuned):
    def score(arguments, epoch):
        if epoch == 2 and not interrupted:
            interrupted.append(arguments["lr0"])
            raise KeyboardInterrupt
        return 0.1 * epoch

    interrupted: list[float] = []
    with pytest.raises(KeyboardInterrupt):
        tuned(score, trials=2)
    view = tuned(score, trials=2)
    assert [trial.state for trial in view.trials] == ["finished"] * 2
    assert view.trials[0].settings["lr0"] == interrupted[0] and list(view.trials[0].curve) == [1, 2, 3, 4]


def test_the_progress(tuned):
    tuned(trials=3, workers=2)
    boards = tuned.states
    assert all(len(board) == 3 for board in boards)
    assert boards[0][0] == ("trial 0: lr0=0.0003, rho=0.04", "running") and boards[0][2] == ("trial 2", "waiting")
    assert [state for _, state in boards[-1]] == ["finished"] * 3
    assert any([state for _, state in board].count("running") == 2 for board in boards)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"epochs": 5}, "epochs: '4' there, '5' here"),
        ({"space": "{'rho': [0.1, 0.2]}"}, "space: "),
        ({"weight_decay": 0.1}, "weight_decay: None there, '0.1' here"),
    ],
)
def test_another_study_under_the_same_name_is_refused(changes, says, tuned):
    before = len(tuned(trials=1).trials)
    with pytest.raises(ValueError, match="has other arguments") as caught:
        tuned(**changes)
    assert says in str(caught.value) and "study=" in str(caught.value)
    assert len(tuned(trials=1, sampler="random", workers=2).trials) == before  # these may change


def test_a_storage_that_cannot_be_opened(tiny_data, tmp_path, capsys):
    broken = tmp_path / "broken.db"
    broken.write_text("no data base, but long enough to be read as one " * 10)
    for storage in (str(broken), "nosuch://server/db"):
        assert cli.main(["tune", *words(storage=storage, out=tmp_path / "out", data=tiny_data)]) == 2
        assert "cannot be opened: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [broken]


# Who takes a trial ----------------------------------------------------------------------------------------------------


@pytest.fixture
def at(tmp_path) -> Callable[..., SharedStudy]:
    """A process at the study in `storage`, with its folder."""

    def process(folder: str = "out", **changes: object) -> SharedStudy:
        storage = tmp_path / "shared.db"
        return SharedStudy(plan(**{"out": tmp_path / folder, "storage": storage, "trials": 3, **changes}))

    return process


def states(study: SharedStudy) -> list[str]:
    return [trial.state.name for trial in study.trials]


def test_a_trial_that_was_cut_off_is_taken_up_and_a_held_one_is_not(at):
    first, second = at(), at()
    held, cut = first.claim(), first.claim()
    cut.trial.report(0.25, 1)
    cut.lock.release()  # as the system does when the process dies
    taken = second.claim()
    assert (taken.trial.number, taken.settings) == (cut.trial.number, cut.settings)
    third = second.claim()
    assert third.trial.number == 2 and second.claim() is None
    second.end(taken, TrialState.COMPLETE, 0.5)
    first.end(held, TrialState.PRUNED)
    assert states(first) == ["PRUNED", "COMPLETE", "RUNNING"]
    assert second.claim() is None


def silence(study: SharedStudy) -> None:
    """Let all heartbeats be long ago, and the next beat be due."""
    with sqlite3.connect(study.plan.storage.removeprefix("sqlite:///")) as database:
        database.execute("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'")
    study._beaten = 0.0


def test_a_trial_of_another_machine_is_left_alone_until_it_is_dead(at):
    here, there = at("here"), at("there")
    claim = there.claim()
    claim.lock.release()  # its lock means nothing here
    claim.trial.report(0.25, 1)
    there.beat()
    own = here.claim()
    assert own.trial.number == 1
    here.beat()
    assert states(here) == ["RUNNING", "RUNNING"]
    silence(here)
    here.beat()  # records heartbeats of its own trials, and finds the other one without
    assert states(here) == ["FAIL", "RUNNING"]
    there.end(claim, TrialState.COMPLETE, 0.9)  # it was only slow: too late
    assert states(there) == ["FAIL", "RUNNING"]
    assert View.of(here).trials[0].note
    retry = here.claim()  # the same settings, and what was reported
    assert (retry.trial.number, retry.settings) == (2, claim.settings)
    assert here.trials[2].intermediate_values == {1: 0.25}
    last = here.claim()
    assert last.trial.number == 3  # a retry is not one of the three trials
    assert here.claim() is None and there.claim() is None


def test_a_trial_is_retried_a_few_times_only(at):
    here, there = at("here", trials=1), at("there", trials=1)
    claims = []
    while (claim := there.claim()) is not None:
        claims.append(claim)
        claim.lock.release()
        there.beat()
        silence(here)
        here.beat()
    assert states(here) == ["FAIL"] * 4
    assert all(claim.settings == claims[0].settings for claim in claims)


def test_an_interrupted_trial_of_this_folder_keeps_its_number_however_late(at):
    """Two are cut off, one process comes back: none fails while the other one is trained."""
    first = at()
    cut = [first.claim(), first.claim()]
    first.beat()
    for claim in cut:
        claim.lock.release()
    second, other = at(), at("elsewhere")
    silence(second)
    taken = second.claim()
    second.beat()
    other.beat()
    assert states(second) == ["RUNNING", "RUNNING"] and taken.trial.number == 0
    again = second.claim()
    assert (again.trial.number, again.settings) == (1, cut[1].settings)


def test_a_comparison_waits_for_the_trials_of_another_invocation(at, monkeypatch):
    """Else the two would choose different settings."""
    monkeypatch.setattr(objective, "READ_INTERVAL", 0.0)
    one, other = at(trials=1), at(trials=1)
    held = one.claim()
    alone, waiting = objective.TrialQueue(other), objective.TrialQueue(other, wait=True)
    assert alone.take() is None and alone.is_done()
    assert waiting.take() is None and not waiting.is_done()
    one.end(held, TrialState.COMPLETE, 0.5)
    assert waiting.take() is None and waiting.is_done()


# Files to train with, report ------------------------------------------------------------------------------------------


def test_the_preset_is_what_was_found(tuned):
    view = tuned(space="{'beta2': [0.8, 0.99], 'hessian_interval': [2, 20, 'int']}", weight_decay=0.01, trials=5)
    path = view.plan.out / "best.yaml"
    path.write_text(view.best_settings.files["best.yaml"])
    preset = load_preset(str(path))
    published = load_preset("published")
    assert dict(preset.settings) == {
        **{key: knob.default for key, knob in OPTIONS.items()}, **published.settings, "weight_decay": 0.01,
        **view.best.settings,
    }  # fmt: skip
    assert preset.origins["clip_fraction"] == "package default; not varied"
    for key in view.plan.space:
        assert preset.origins[key].startswith(f"study SophiaG-bccd: best of 5 trials, mAP50-95 {view.best.value:.4f}")
    assert preset.origins["weight_decay"] == "study SophiaG-bccd: given, not varied"
    assert preset.origins["momentum"] == f"preset published: {published.origins['momentum']}"
    assert resolve({"sophia": str(path)}, {"sophia"}, Facts(False)).values["beta2"] == view.best.settings["beta2"]
    assert f"sophia={path}" in view.best_settings.command and list(view.best_settings.files) == ["best.yaml"]


def test_the_preset_has_the_factors_that_were_found(tuned):
    view = tuned(space="{'lr_factors.new': [5, 50, log]}", lr_factors="{'head': 2}", trials=2)
    path = view.plan.out / "best.yaml"
    path.write_text(view.best_settings.files["best.yaml"])
    preset = load_preset(str(path))
    assert preset.settings["lr_factors"] == {"head": 2.0, "new": view.best.settings["lr_factors.new"]}
    assert preset.origins["lr_factors"].startswith("study SophiaG-bccd: best of 2 trials")
    assert f"sophia={path}" in view.best_settings.command and list(view.best_settings.files) == ["best.yaml"]
    other = tuned(space="{'lr_factors.new': [5, 50, log]}", optimizer="AdamW", lr_factors="{'head': 2}", trials=2,
                  out=view.plan.out.with_name("other"))  # fmt: skip
    content = yaml.safe_load(other.best_settings.files["best.yaml"])
    assert content["lr_factors"] == {"head": 2, "new": other.best.settings["lr_factors.new"]}
    validate_arguments(content)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_preset_has_the_current_names(tuned):
    view = tuned(space="{'head_lr_factor': [2, 10]}", trials=2)
    content = yaml.safe_load(view.best_settings.files["best.yaml"])["settings"]
    assert content["lr_factors"]["value"] == {"head": view.best.settings["head_lr_factor"]}


def test_arguments_that_no_preset_has_come_beside_it(tuned):
    view = tuned(space="{'box': [5.0, 9.0]}", trials=2)
    beside = view.plan.out / "best-arguments.yaml"
    assert yaml.safe_load(view.best_settings.files[beside.name]) == {
        "optimizer": "SophiaG",
        "box": view.best.settings["box"],
    }
    assert view.best_settings.command.startswith(f"yolo train cfg={beside} ")
    assert "box" not in yaml.safe_load(view.best_settings.files["best.yaml"])["settings"]


@pytest.mark.parametrize(
    ("optimizer", "given"),
    [("AdamW", {}), ("torch.optim.Adagrad", {"optimizer_args": "{'eps': 1e-7}", "momentum": 0.8})],
)
def test_arguments_of_other_optimizers(optimizer, given, tuned):
    view = tuned(optimizer=optimizer, trials=2, **given)
    path = view.plan.out / "best.yaml"
    path.write_text(view.best_settings.files["best.yaml"])
    content = yaml.safe_load(path.read_text())
    assert content == {**content, "optimizer": optimizer, **view.best.settings}
    assert ("momentum" in content) == ("momentum" in given)
    validate_arguments(content)
    if optimizer == "AdamW":
        assert vars(get_cfg(path)).items() >= content.items()
    assert view.best_settings.command.startswith(f"yolo train cfg={path} ")


def test_the_report(tuned):
    def score(arguments, epoch):
        return "the disk is full" if arguments["lr0"] > 0.004 else by_lr0(arguments, epoch)

    space = "{'lr0': [1e-3, 5e-3], 'hessian_estimator': ['gnb', 'empirical_fisher']}"
    view = tuned(
        score, sampler="grid", trials=None, grid_points=6, rho=0.1, space=space, pruner="median", prune_after=2
    )
    document = compose(view)
    page = write_report(view)
    assert document.title == "SophiaG tuned on bccd"
    assert {"5 of 12 trials finished", "3 pruned", "4 failed"} <= set(document.badges)
    text = page.read_text()
    names = {path.stem for path in (page.parent / "figures").iterdir()}
    assert names == {"history", "curves", "importance", "slice-lr0", "slice-hessian-estimator"}
    assert "<script" not in text and text.count("<svg") == len(names)
    low, high = figures.slices(view, "lr0", view.plan.space["lr0"]).axes[0].get_xlim()
    assert all(low < trial.settings["lr0"] < high for trial in view.trials if trial.score is not None)
    markdown = (page.parent / "report.md").read_text()
    for shown in ("At the edge of the space: lr0 0.001", "the disk is full", "Importance: ", "sophia="):
        assert shown in re.sub(r"\\\\(.)", r"\\1", markdown)
    rows = (page.parent / "trials.csv").read_text().splitlines()
    assert len(rows) == 13 and rows[1].startswith("0,finished,0.4,0.001,gnb,4,")


def test_text_of_users_is_escaped_in_the_report(tuned):
    nasty = '<script>alert("x")</script> $x^$'  # not mathematics either

    def score(arguments, epoch):
        return f"failed: {nasty}" if arguments["copy_paste_mode"] == "b" else by_lr0(arguments, epoch)

    space = f"{{'lr0': [1e-3, 5e-3], 'copy_paste_mode': {{'choices': ['{nasty}', 'b']}}}}"
    view = tuned(score, sampler="grid", trials=None, grid_points=2, space=space, model=f"m{nasty}.pt", rho=0.1)
    page = write_report(view)
    for text in (
        page.read_text(),
        re.sub(r"^(`{3,})\n.*?^\1$", "", (page.parent / "report.md").read_text(), flags=re.S | re.M),
    ):
        assert "<script" not in text and "alert" in text
    for name in ("best.yaml", "best-arguments.yaml"):
        assert yaml.safe_load((page.parent / name).read_text())


@pytest.mark.parametrize("score", ["broken", 0.0])
def test_a_report_of_little(score, tuned):
    view = tuned(lambda *_: score, trials=2)
    assert command.finish(view) == (1 if score == "broken" else 0)
    text = (view.plan.out / "report.md").read_text()
    assert ("No trial has finished yet" if score == "broken" else "No importances") in text
    assert (view.plan.out / "best.yaml").exists() == (score != "broken")


# Ultralytics' own tuner -----------------------------------------------------------------------------------------------


@pytest.mark.compat
def test_a_space_for_the_genetic_tuner_keeps_rho_above_zero(tiny_run):
    space = tune_space("SophiaG", space={"rho": [1e-5, 1.0, "log"], "hessian_interval": [2, 20, "int"]})
    assert space == {"lr0": (5e-5, 5e-3), "rho": (1e-5, 1.0), "hessian_interval": (2, 20)}
    tuner = Tuner({**tiny_run, "optimizer": "SophiaG", "space": dict(space)})
    tuner.args.rho = 1e-9  # below the space, as a run before it may have had
    for _ in range(3):
        made = tuner._mutate()
        assert 1e-5 <= made["rho"] <= 1.0 and made["hessian_interval"] in range(2, 21)
    old = Tuner({**tiny_run, "optimizer": "SophiaG", "space": {"head_lr_factor": (1.0, 10.0)}})
    assert old.args.head_lr_factor == 1 and "head_lr_factor" in old.args.sophia_typed and old._mutate()
    if hasattr(tuner, "_constrain"):
        assert tuner._constrain({"lr0": 1e-9, "rho": 4e-6, "hessian_interval": 1})["rho"] == 1e-5


@pytest.mark.compat
@pytest.mark.parametrize("name", [*OPTIMIZERS, "AdamW", "SGD", "RMSProp", "torch.optim.Adagrad"])
def test_no_bound_of_ours_is_lost_in_rounding(name):
    for low, high in tune_space(name).values():
        assert round(low, 5) == low < high


@pytest.mark.parametrize(
    ("space", "says"),
    [
        ({"rho": [1e-6, 1.0]}, "rounds to 5 decimals"),
        ({"hessian_estimator": ["gnb", "x"]}, "bounds only"),
        ({"lr_factors.new": [5, 50]}, "lr_factors.new: Ultralytics' tuner knows whole arguments only"),
    ],
)
def test_what_the_genetic_tuner_cannot_search_is_refused(space, says):
    with pytest.raises(ValueError, match=says):
        tune_space("SophiaG", space=space)


@pytest.mark.extras
def test_a_space_for_ray(monkeypatch):
    tune = pytest.importorskip("ray.tune")
    extra = {"rho": [1e-7, 1.0, "log"], "nbs": [16, 64, "int"], "hessian_interval": [1, 20, "int", "log"],
             "hessian_estimator": ["gnb", "empirical_fisher"], "beta2": [0.8, 0.9]}  # fmt: skip
    space = tune_space("SophiaG", ray=True, space=extra)
    assert space.keys() == {"lr0", *extra}
    samples = [{key: domain.sample() for key, domain in space.items()} for _ in range(200)]
    for key, (low, high) in {"lr0": (5e-5, 5e-3), "rho": (1e-7, 1.0), "beta2": (0.8, 0.9)}.items():
        assert all(low <= sample[key] <= high for sample in samples)
    assert sum(sample["rho"] < 1e-3 for sample in samples) > 50  # logarithmic
    assert {sample["hessian_interval"] for sample in samples} <= set(range(1, 21))
    assert {sample["hessian_estimator"] for sample in samples} == {"gnb", "empirical_fisher"}
    assert isinstance(space["nbs"], type(tune.randint(1, 2))) and space["nbs"].upper == 65


# Real trainings -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_study_is_finished_by_two_processes(tiny_data, tiny_model, tmp_path):
    """SIGKILL after the first checkpoint, then two processes at once: no trial is lost, none is trained twice."""
    out = tmp_path / "out"
    typed = [f"data={tiny_data}", f"model={tiny_model}", "imgsz=64", "batch=8", "nbs=8", "epochs=2", "device=cpu",
             "trials=2", "warmup_epochs=0", "pruner=none", f"out={out}"]  # fmt: skip

    def start() -> subprocess.Popen[str]:
        line = [sys.executable, "-m", "yolo_sophia.cli", "tune", *typed]
        return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ})

    first, end = start(), time.monotonic() + 200
    while not (cut := list(out.glob(f"runs/*/{CHECKPOINT}"))):
        assert first.poll() is None and time.monotonic() < end, first.communicate()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    before = read_curve(cut[0].parent)
    both = [start(), start()]
    for process in both:
        shown, error = process.communicate(timeout=250)
        assert process.returncode == 0 and "Traceback" not in error, error[-2000:]
    view = View.of(SharedStudy(parse(typed)))
    assert [trial.state for trial in view.trials] == ["finished", "finished"]
    folders = [folder_of(out, run) for trial in view.trials for run in view.plan.runs(trial.settings)]
    assert folders[0] == cut[0].parent and before and before[0] == read_curve(folders[0])[0]
    for trial, folder in zip(view.trials, folders):
        assert trial.value == read_curve(folder)[-1][MAP50_95]
        assert json.loads((folder / RECEIPT).read_text())["epochs"] == 2
    assert "mAP50-95" in shown and (out / "best.yaml").is_file() and (out / "report.html").is_file()
