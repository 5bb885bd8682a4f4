"""Sophia's options as Ultralytics arguments: precedence, records, presets, and every refusal in one clear message."""

from __future__ import annotations

import importlib.util
import inspect
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from quirks import needs_tune
from ultralytics import YOLO
from ultralytics.cfg import entrypoint, get_cfg, parse_key_value_pair
from ultralytics.engine.tuner import Tuner
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils import DEFAULT_CFG_DICT

from yolo_sophia.integration import resolution
from yolo_sophia.integration.arguments import OUR_KEYS, SOPHIA_KEYS, canonical_optimizer, finalize
from yolo_sophia.integration.explicit import MARKER, keyword_arguments
from yolo_sophia.integration.resolution import Facts, resolve
from yolo_sophia.optim import DecoupledSophia, Sophia, SophiaG, SophiaH
from yolo_sophia.optim._hessian import HESSIAN_AVERAGES
from yolo_sophia.options import ALL, OPTIONS, ULTRALYTICS_ARGS
from yolo_sophia.presets import load_preset, preset_directory, preset_names

pytestmark = pytest.mark.compat

EXAMPLES = {  # a value in range for each argument, neither Ultralytics' default, nor ours, nor a shipped preset's
    "rho": 0.123,
    "clip_fraction": 0.42,
    "hessian_average": "row",
    "hessian_interval": 7,
    "hessian_warmup": 3,
    "cautious": True,
    "hessian_power": 0.5,
    "bn_momentum": 0.2,
    "lr_factors": {"head": 3.5},
    "fit_head": True,
    "hessian_fraction": 0.6,
    "hessian_estimator": "empirical_fisher",
    "beta2": 0.77,
    "fused": False,
    "lr0": 0.00321,
    "lrf": 0.5,
    "momentum": 0.81,
    "weight_decay": 0.0123,
    "warmup_bias_lr": 0.0022,
    "warmup_epochs": 1.5,
    "cos_lr": True,
}
SCRATCH = load_preset("detect-scratch").settings  # of a run that nothing is known of, and of the trainings here
PUBLISHED = load_preset("published").settings


def test_there_is_an_example_for_every_argument():
    assert EXAMPLES.keys() == ALL.keys()


def recorded(**given: Any) -> dict[str, Any]:
    """Arguments of a run with these given, before its model is there."""
    given = {"optimizer": "SophiaG", **given}
    args = get_cfg(overrides=given)
    finalize(args, given)
    return vars(args)


def decided(**given: Any) -> dict[str, Any]:
    """The same in the end, for a training from scratch; with everything of another run given, as a child gets it."""
    args = recorded(**given)
    return (
        args if canonical_optimizer(args["optimizer"]) is None else {**args, **resolve(args, (), Facts(False)).values}
    )


def again(args: dict[str, Any], **given: Any) -> dict[str, Any]:
    """The same with `cfg=` an args.yaml of these arguments, and these given on top."""
    with keyword_arguments({"cfg": "args.yaml", **given}):
        return decided(**{**args, **given})


def sources(args: dict[str, Any]) -> dict[str, str]:
    return resolve(args, (), Facts(False)).sources


def settings_of(train: Callable[[YOLO], Any], model: str) -> dict[str, Any]:
    """Arguments of a training when its optimizer has been built; it is stopped there."""
    kept: dict[str, Any] = {}

    def stop(trainer):
        kept.update(vars(trainer.args))
        raise KeyboardInterrupt

    made = YOLO(model)
    made.add_callback("on_pretrain_routine_end", stop)
    with pytest.raises(KeyboardInterrupt):
        train(made)
    return kept


@pytest.fixture
def write_preset(tmp_path):
    """Write a preset with these settings and return its path."""

    def write(settings: dict[str, Any], name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        entries = {key: {"value": value, "origin": "a test"} for key, value in settings.items()}
        path.write_text(yaml.safe_dump({"description": "For a test.", "status": "provisional", "settings": entries}))
        return path

    return write


def read_args(run: dict[str, Any]) -> dict[str, Any]:
    return yaml.safe_load((Path(run["project"]) / run["name"] / "args.yaml").read_text())


# Precedence -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", EXAMPLES)
def test_explicit_over_preset_over_default(key, write_preset):
    other = {k: v for k, v in EXAMPLES.items() if k != key}
    default = OPTIONS[key].default if key in OPTIONS else DEFAULT_CFG_DICT[key]

    empty = {"sophia": str(write_preset({}, "empty.yaml"))}
    assert decided(**empty)[key] == default
    assert sources(recorded(**empty)).get(key, "default") == "default"

    preset = {"sophia": str(write_preset({key: EXAMPLES[key]}, "one.yaml"))}
    assert decided(**preset)[key] == EXAMPLES[key]
    assert sources(recorded(**preset))[key] == "preset"

    given = {"sophia": str(write_preset(other | {key: default}, "all.yaml")), key: EXAMPLES[key]}
    explicit = decided(**given)
    assert explicit[key] == EXAMPLES[key]
    steered = {"rho"} if key == "clip_fraction" else set()  # which asks for rho=auto
    assert sources(recorded(**given)) == dict.fromkeys(EXAMPLES, "preset") | dict.fromkeys({key} | steered, "explicit")
    assert {k: explicit[k] for k in other if k not in steered} == {k: v for k, v in other.items() if k not in steered}


@pytest.mark.parametrize("key", EXAMPLES)
def test_an_explicit_value_that_equals_the_default_is_explicit(key, write_preset):
    default = OPTIONS[key].default if key in OPTIONS else DEFAULT_CFG_DICT[key]
    args = decided(sophia=str(write_preset(EXAMPLES)), **{key: default})
    assert args[key] == default
    assert sources(args)[key] == "explicit"


@pytest.mark.parametrize("typed", [{"rho": "AUTO"}, {"clip_fraction": 0.3}, {"rho": "auto", "clip_fraction": 0.3}])
def test_rho_is_steered_where_it_or_the_fraction_is_asked_for(typed, write_preset):
    args = decided(sophia=str(write_preset({"rho": 0.123})), **typed)
    assert args["rho"] == "auto"
    assert args["clip_fraction"] == typed.get("clip_fraction", OPTIONS["clip_fraction"].default)
    assert decided(**args) == args
    assert "clip_fraction=" in resolve(args, (), Facts(False)).describe()


def test_a_fixed_rho_has_no_clip_fraction(write_preset):
    path = str(write_preset({"rho": "auto", "clip_fraction": 0.3}))
    assert "clip_fraction" not in resolve(decided(sophia=path, rho=0.1), (), Facts(False)).describe()
    with pytest.raises(ValueError, match=r"clip_fraction=0.4 requires rho=auto, found rho=0.1: remove one"):
        decided(sophia=path, rho=0.1, clip_fraction=0.4)


def test_the_averages_are_those_of_the_optimizer():
    assert OPTIONS["hessian_average"].choices == ("element", *HESSIAN_AVERAGES)


@pytest.mark.parametrize("typed", [{}, {"hessian_estimator": "hutchinson"}], ids=["implied", "typed"])
def test_sophia_h_implies_hutchinson(typed):
    args = decided(optimizer="sophiah", **typed)
    assert (args["optimizer"], args["hessian_estimator"]) == ("SophiaH", "hutchinson")
    assert sources(recorded(optimizer="sophiah", **typed))["hessian_estimator"] == "optimizer"
    assert again(args) == args


@pytest.mark.parametrize(("optimizer", "estimator"), [("SophiaH", "gnb"), ("SophiaG", "hutchinson")])
def test_estimators_of_the_other_optimizer_are_refused(optimizer, estimator):
    with pytest.raises(ValueError, match=f"hessian_estimator={estimator} does not go with optimizer={optimizer}"):
        decided(optimizer=optimizer, hessian_estimator=estimator)


def test_lr0_typed_and_untyped():
    assert DEFAULT_CFG_DICT["lr0"] == 0.01
    assert decided()["lr0"] == SCRATCH["lr0"] != 0.01
    assert decided(lr0=0.01)["lr0"] == 0.01
    assert decided(sophia="published")["lr0"] == PUBLISHED["lr0"]
    assert decided(sophia="published", lr0=0.01)["lr0"] == 0.01


def test_the_default_preset_is_detect_and_its_values_arrive():
    args = decided()
    assert {key: args[key] for key in SCRATCH} == dict(SCRATCH)
    assert (args["sophia"], args[MARKER]) == ("detect-scratch", "detect-scratch:")


def test_processes_that_decide_differently_are_refused(monkeypatch):
    """As with other weights on one of the machines."""
    monkeypatch.setattr(resolution.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(resolution.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(resolution.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(resolution.dist, "broadcast_object_list", lambda found, src: None)
    resolution._check_equal_on_ranks({"lr0": 0.001})

    def of_process_0(found: list, src: int) -> None:
        found[0] = {"lr0": 0.002}

    monkeypatch.setattr(resolution.dist, "broadcast_object_list", of_process_0)
    with pytest.raises(RuntimeError, match=r"Process 1 .* other settings than process 0: \{'lr0': \(0.002, 0.001\)\}"):
        resolution._check_equal_on_ranks({"lr0": 0.001})


def test_copies_of_the_arguments_are_brought_up_to_date(monkeypatch, tmp_path):
    """args.yaml, and the configuration of a W&B run that was started before the decision."""

    class Config(dict):
        def update(self, values, allow_val_change):
            assert allow_val_change
            super().update(values)

    config = Config(lr0=0.01, epochs=3)
    monkeypatch.setitem(sys.modules, "wandb", Namespace(run=Namespace(config=config)))
    (tmp_path / "args.yaml").write_text("lr0: 0.01\n")
    args = Namespace(**decided())
    resolution.save_arguments(Namespace(args=args, save_dir=tmp_path))
    assert config == {"lr0": SCRATCH["lr0"], "epochs": 3}
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["lr0"] == SCRATCH["lr0"]


def test_untouched_arguments_stay_ultralytics_own():
    args = decided(rho=0.3)
    rest = DEFAULT_CFG_DICT.keys() - OPTIONS.keys() - ULTRALYTICS_ARGS.keys() - {*OUR_KEYS, "optimizer"}
    assert {key: args[key] for key in rest} == {key: DEFAULT_CFG_DICT[key] for key in rest}


@pytest.mark.parametrize("name", ["SophiaG", "sophiag", "SOPHIAG"])
def test_names_in_any_case(name):
    assert decided(optimizer=name, sophia="Published")["optimizer"] == "SophiaG"
    assert decided(optimizer=name, sophia="Published")["sophia"] == "published"


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "MuSGD", "auto", "Lion"]
)
def test_other_names_are_not_ours(name):
    assert canonical_optimizer(name) is None
    args = decided(optimizer=name)
    assert not set(OUR_KEYS) & args.keys()
    assert args == {k: v for k, v in DEFAULT_CFG_DICT.items() if k not in OUR_KEYS} | {"optimizer": name}


# Records: workers, resumed runs, tune children, args.yaml as cfg= -----------------------------------------------------


STARTS = [{}, {"lr0": 0.01}, {"rho": 0.3, "momentum": 0.937}, {"sophia": "published", "hessian_interval": 10}]


@pytest.mark.parametrize("typed", STARTS, ids=str)
def test_a_child_that_gets_everything_decides_the_same(typed):
    parent = recorded(**typed)
    assert recorded(**parent) == parent
    assert decided(**parent) == decided(**typed)
    assert sources(recorded(**parent)) == sources(parent)
    assert decided(**decided(**typed)) == decided(**typed)


@pytest.mark.parametrize("typed", STARTS, ids=str)
def test_the_way_through_a_command_line(typed):
    """As engine.trainer.MultiTrainer starts the children of `tune`."""
    parent = decided(**typed)
    child = dict(parse_key_value_pair(f"{key}={value}") for key, value in parent.items())
    assert {key: child[key] for key in (*EXAMPLES, *SOPHIA_KEYS)} == {
        key: parent[key] for key in (*EXAMPLES, *SOPHIA_KEYS)
    }
    assert decided(**child) == parent


@pytest.mark.parametrize("typed", STARTS, ids=str)
def test_resume_takes_the_record(typed):
    parent = decided(**typed)
    args = Namespace(**{**parent, "resume": "last.pt"})  # as check_resume leaves it
    finalize(args, {"resume": True, "rho": 9.0, "lr0": 9.0})
    assert vars(args) == {**parent, "resume": "last.pt"}
    assert resolve(vars(args), (), Facts(True)).values.items() <= parent.items()


def test_a_value_typed_over_a_record_wins():
    record = decided(lr0=0.01)
    args = again(record, rho=0.3)
    assert args == {**record, "rho": 0.3, MARKER: "detect-scratch:lr0,rho"}
    assert sources(args)["rho"] == sources(args)["lr0"] == "explicit"
    assert sources(args)["beta2"] == "recorded"
    assert again(args) == args


def test_a_preset_typed_over_a_record_decides_again_but_keeps_what_was_explicit():
    record = decided(lr0=0.01, hessian_interval=3)
    args = again(record, sophia="published")
    assert args["sophia"] == "published"
    assert (args["lr0"], args["hessian_interval"]) == (0.01, 3)
    assert {key: args[key] for key in PUBLISHED} == {**PUBLISHED, "lr0": 0.01, "hessian_interval": 3}
    assert args[MARKER] == "published:hessian_interval,lr0"


def test_a_preset_and_a_value_typed_over_a_record():
    args = again(decided(), sophia="published", rho=0.3)
    assert args["rho"] == 0.3
    assert {key: args[key] for key in PUBLISHED} == {**PUBLISHED, "rho": 0.3}


@pytest.mark.parametrize("change", ["edited", "malformed", "gone"])
def test_a_record_does_not_need_its_preset(change, write_preset):
    path = write_preset({"rho": 0.3, "lr0": 0.002})
    record = decided(sophia=str(path), beta2=0.9)
    if change == "edited":
        write_preset({"rho": 0.7, "beta2": 0.1, "momentum": 0.5})
    elif change == "malformed":
        path.write_text("settings: [")
    else:
        path.unlink()
    args = again(record)
    assert {key: args[key] for key in EXAMPLES} == {key: record[key] for key in EXAMPLES}
    assert args["sophia"] == record["sophia"]
    if change != "edited":
        assert "no longer readable" in resolve(args, (), Facts(False)).describe()
        with pytest.raises(ValueError, match=re.escape(path.name)):
            decided(sophia=str(path))  # a new run does


def test_the_record_of_a_preset_file_is_good_in_every_directory(write_preset, monkeypatch, tmp_path):
    write_preset({"rho": 0.3}, "a:b.yaml")
    monkeypatch.chdir(tmp_path)
    record = decided(sophia="a:b.yaml", lr0=0.01)
    assert record[MARKER] == f"{tmp_path / 'a:b.yaml'}:lr0"
    monkeypatch.chdir("/")
    assert again(record) == record


def test_a_record_passed_on_to_another_optimizer_leaves_nothing(write_preset):
    """`YOLO.train` of Ultralytics < 8.3.253 passes all arguments of a run on to the next; so does `cfg=args.yaml`."""
    record = decided(sophia="published", momentum=0.81, rho=0.3)
    args = again(record, optimizer="AdamW", box=3.0)
    ours = {**decided(optimizer="AdamW"), "momentum": 0.81, "box": 3.0}
    assert args == ours
    assert again(again(record, box=3.0), optimizer="AdamW", box=3.0) == ours
    tuner = Tuner({**record, "optimizer": "AdamW", "model": "yolov8n.yaml"})
    assert {key: getattr(tuner.args, key) for key in ULTRALYTICS_ARGS} == {key: ours[key] for key in ULTRALYTICS_ARGS}
    assert not set(OUR_KEYS) & vars(tuner.args).keys()


def test_defaults_passed_on_are_not_typed():
    """As there, after a run with another optimizer: `load_checkpoint` fills its arguments up with all defaults."""
    passed_on = {**DEFAULT_CFG_DICT, **decided(optimizer="AdamW", box=3.0)}
    assert decided(**passed_on) == decided(optimizer="AdamW", box=3.0)
    sophia = again(passed_on, optimizer="SophiaG", rho=0.3)
    assert sophia == decided(box=3.0, rho=0.3)
    with pytest.raises(ValueError, match="are arguments of optimizer=SophiaG"):
        again(passed_on, rho=0.3)


def test_the_line_that_says_where_each_knob_came_from():
    line = resolve(recorded(sophia="published", rho=0.3), (), Facts(False)).describe()
    assert line.startswith("preset 'published' (published), rho=0.3 (explicit), hessian_interval=10 (preset), ")
    assert all(f"{key}=" in line for key in {*OPTIONS, *PUBLISHED} - {"clip_fraction"})


# Runs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_runs_record_what_they_used(tiny_run, python):
    """SophiaG, then AdamW with the same object; their args.yaml here and in an Ultralytics without this package."""
    run = {**tiny_run, "epochs": 1}
    model = YOLO(run.pop("model"))
    model.train(**{**run, "name": "sophia"}, optimizer="SophiaG", lr0=0.01, hessian_interval=2)
    used = model.trainer.optimizer.param_groups[0]
    assert used["hessian_interval"] == 2
    assert used["initial_lr"] == 0.01
    sophia = read_args({**run, "name": "sophia"})
    assert sophia[MARKER] == "detect-scratch:hessian_interval,lr0"
    assert {key: sophia[key] for key in SCRATCH} == {**SCRATCH, "lr0": 0.01, "hessian_interval": 2}

    model.overrides.setdefault("model", tiny_run["model"])  # 8.3.253 to 8.4.100 lose it, and end in a KeyError
    model.train(**{**run, "name": "adamw"}, optimizer="AdamW")
    assert type(model.trainer.optimizer).__name__ == "AdamW"
    adamw = read_args({**run, "name": "adamw"})
    assert not set(OUR_KEYS) & adamw.keys()
    assert {key: adamw[key] for key in ULTRALYTICS_ARGS} == {key: DEFAULT_CFG_DICT[key] for key in ULTRALYTICS_ARGS}
    assert "sophia" not in (Path(run["project"]) / "adamw" / "results.csv").read_text()

    for name in ("auto", "SGD"):
        DetectionTrainer(overrides={**tiny_run, "name": name, "optimizer": name})
        assert not set(OUR_KEYS) & read_args({**run, "name": name}).keys()

    code = """
import sys, yaml
from ultralytics.models.yolo.detect import DetectionTrainer
for path in sys.argv[1:]:
    try:
        args = DetectionTrainer(overrides={**yaml.safe_load(open(path)), "save_dir": None, "name": "plain"}).args
        print("accepted:", args.optimizer)
    except SyntaxError as error:
        print("refused:", str(error).replace("\\n", " "))
"""
    paths = [Path(run["project"]) / name / "args.yaml" for name in ("adamw", "auto", "SGD", "sophia")]
    said = python("-c", code, *paths, YOLO_SOPHIA_AUTOLOAD="0").stdout
    assert re.findall(r"^accepted: (\w+)", said, re.MULTILINE) == ["AdamW", "auto", "SGD"]
    assert re.search(r"^refused: .*rho.* is not a valid YOLO argument", said, re.MULTILINE)


CHANNELS = [
    "command line",
    "command line, cfg file",
    "keywords",
    "keywords, cfg file",
    "keywords, all arguments",
    "overrides",
    "cfg mapping",
]


@pytest.mark.parametrize("channel", CHANNELS)
def test_explicit_values_by_channel(channel, tiny_run, tmp_path, caplog):
    """lr0 differs from Ultralytics' default, momentum equals it; the file is a copy of all defaults with these two."""
    given = {"optimizer": "SophiaG", "lr0": 0.00777, "momentum": 0.937, "hessian_interval": 7}
    run = {k: v for k, v in tiny_run.items() if k != "model"} | {"optimizer": "SophiaG"}
    copied = {k: v for k, v in DEFAULT_CFG_DICT.items() if k not in OUR_KEYS}
    (tmp_path / "copy.yaml").write_text(yaml.safe_dump(copied | given))
    with caplog.at_level("WARNING"):
        if channel == "command line":
            words = run | given
            args = settings_of(lambda model: run_line(model, words), tiny_run["model"])
        elif channel == "command line, cfg file":
            words = {"cfg": tmp_path / "copy.yaml", **run}
            args = settings_of(lambda model: run_line(model, words), tiny_run["model"])
        elif channel.startswith("keywords"):
            more = {"keywords": given, "keywords, all arguments": {**copied, **tiny_run, **given}}
            words = run | more.get(channel, {"cfg": str(tmp_path / "copy.yaml")})
            args = settings_of(lambda model: model.train(**words), tiny_run["model"])
        else:
            words = {**tiny_run, **given}
            words = {"overrides": words} if channel == "overrides" else {"cfg": {**copied, **words}}
            args = settings_of(lambda model: by_hand(model, words), tiny_run["model"])
    assert (args["lr0"], args["hessian_interval"]) == (0.00777, 7)
    is_known = channel in ("command line", "keywords", "overrides")
    assert args["momentum"] == (0.937 if is_known else SCRATCH["momentum"])
    assert args[MARKER] == f"detect-scratch:hessian_interval,lr0{',momentum' if is_known else ''}"
    told = [r.message for r in caplog.records if "equal Ultralytics' defaults" in r.message]
    assert len(told) == (not is_known)
    assert is_known or ("momentum=0.937" in told[0] and "lr0" not in told[0])


def run_line(model: YOLO, words: dict[str, Any]) -> None:
    """`yolo train` with these words; the model object is the one that `entrypoint` makes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ultralytics.YOLO", lambda *_, **__: model)
        entrypoint(
            " ".join(["yolo", "train", f"model={model.overrides['model']}", *(f"{k}={v}" for k, v in words.items())])
        )


def by_hand(model: YOLO, words: dict[str, Any]) -> None:
    DetectionTrainer(**words, _callbacks=model.callbacks).train()


@pytest.mark.parametrize("text", ["x", "detect-short", "detect-short:nonsense", ":lr0,x"])
def test_a_record_that_this_package_did_not_write(text):
    with pytest.raises(ValueError, match=f"'sophia_typed={text}' is not an argument to set"):
        recorded(sophia_typed=text)


def test_the_record_is_no_word_of_the_command_line(tiny_run):
    with pytest.raises(SyntaxError, match="'sophia_typed' is not a valid YOLO argument"):
        entrypoint(f"yolo train model={tiny_run['model']} optimizer=SophiaG sophia_typed=:lr0")


def test_names_of_the_version_before(write_preset):
    with pytest.warns(FutureWarning, match="hessian_root=True is now hessian_power=0.5"):
        args = decided(hessian_root=True)
    assert args["hessian_power"] == 0.5 and "hessian_root" not in args
    with pytest.warns(FutureWarning, match="hessian_root is now hessian_power=0.5"):
        assert decided(sophia=str(write_preset({"hessian_root": True})))["hessian_power"] == 0.5
    old = {**decided(), "hessian_root": True, "resume": "last.pt"}
    args = Namespace(**old)
    finalize(args, {})
    assert args.hessian_power == 0.5 and not hasattr(args, "hessian_root")
    with pytest.raises(ValueError, match="'hessian_root=3' is an invalid value; use 'hessian_power'"):
        recorded(hessian_root=3)


def test_args_yaml_as_cfg(tiny_run, tmp_path):
    """`cfg=args.yaml` gives the same run again, and takes what is typed over it."""

    def trained_with(**arguments: Any) -> dict[str, Any]:
        return settings_of(lambda model: model.train(**arguments), tiny_run["model"])

    first = trained_with(**{k: v for k, v in tiny_run.items() if k != "model"}, optimizer="sophiag", lr0=0.01)
    recorded = Path(first["save_dir"]) / "args.yaml"
    plain = yaml.safe_load(recorded.read_text())
    plain.pop("save_dir")
    path = tmp_path / "again.yaml"
    path.write_text(yaml.safe_dump(plain))
    keys = (*EXAMPLES, *SOPHIA_KEYS)

    second = trained_with(cfg=str(path))
    assert second["save_dir"] != first["save_dir"]
    assert {k: second[k] for k in keys} == {k: first[k] for k in keys}

    third = trained_with(cfg=str(path), sophia="published", beta2=0.5)
    assert (third["lr0"], third["beta2"], third["rho"]) == (0.01, 0.5, PUBLISHED["rho"])
    assert third[MARKER] == "published:beta2,lr0"

    by_hand = tmp_path / "by_hand.yaml"
    by_hand.write_text("optimizer: SophiaG\nrho: 0.7\nlr0: 0.02\n")
    rest = {k: v for k, v in tiny_run.items() if k != "model"}
    fourth = trained_with(cfg=str(by_hand), **rest, rho=0.8)
    assert (fourth["rho"], fourth["lr0"], fourth["momentum"]) == (0.8, 0.02, SCRATCH["momentum"])
    assert fourth[MARKER] == "detect-scratch:lr0,rho"


@pytest.mark.slow
def test_an_interrupted_run_resumes_with_its_record(tiny_run, write_preset):
    path = write_preset({"lr0": 0.002, "rho": 0.3})

    def interrupt(trainer):
        if trainer.epoch == 1:
            raise KeyboardInterrupt

    trainer = DetectionTrainer(overrides={**tiny_run, "optimizer": "SophiaG", "sophia": str(path), "momentum": 0.937})
    trainer.add_callback("on_train_epoch_start", interrupt)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    path.write_text("no longer a preset")
    resumed = DetectionTrainer(overrides={"model": str(trainer.last), "resume": str(trainer.last), "rho": 5.0})
    keys = (*EXAMPLES, "sophia")
    assert {k: getattr(resumed.args, k) for k in keys} == {k: getattr(trainer.args, k) for k in keys}
    resumed.train()
    assert resumed.optimizer.param_groups[0]["rho"] == 0.3
    assert resumed.epoch == 1


@needs_tune
@pytest.mark.slow
def test_a_child_of_tune(tiny_run, monkeypatch):
    """Bounds beside the preset's values make the first child's values the tuner's."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")  # 8.3 starts `yolo`
    space = {"rho": (1.0, 2.0), "lr0": (0.002, 0.003), "hessian_interval": (1.2, 3.7)}
    run = {**tiny_run, "epochs": 1, "name": "tuned"}
    YOLO(run.pop("model")).tune(
        **run, optimizer="sophiag", iterations=1, space=space, weight_decay=0.0123, warmup_bias_lr=0.1
    )
    (args_yaml,) = Path(tiny_run["project"]).rglob("args.yaml")
    child = yaml.safe_load(args_yaml.read_text())
    assert (child["rho"], child["lr0"]) == (1.0, 0.003)
    assert type(child["hessian_interval"]) is int
    assert child["hessian_interval"] == 3
    assert (child["weight_decay"], child["warmup_bias_lr"]) == (0.0123, 0.1)
    assert (child["momentum"], child["beta2"]) == (SCRATCH["momentum"], SCRATCH["beta2"])
    assert child["optimizer"] == "SophiaG"
    assert child["sophia"] == "detect-scratch"
    assert sources(child)["rho"] == sources(child)["lr0"] == "explicit"
    assert sources(child)["beta2"] == "recorded"
    assert "sophia/rho" in (args_yaml.parent / "results.csv").read_text()


def test_the_tuner_starts_from_the_preset_within_its_bounds(tiny_run):
    space = {"hessian_interval": (1.2, 3.7), "rho": (0.01, 0.05), "beta2": (0.0, 0.99)}
    tuner = Tuner({**tiny_run, "optimizer": "SophiaG", "space": space})
    first = tuner._mutate()
    assert type(first["hessian_interval"]) is int
    assert first["hessian_interval"] == 3
    assert (first["rho"], first["beta2"]) == (
        OPTIONS["rho"].default,
        SCRATCH["beta2"],
    )  # "auto" is no start of a search
    assert tuner.args.sophia_typed == ":beta2,hessian_interval,rho"


def test_the_tuner_does_not_round_a_small_rho_to_zero(tiny_run):
    tuner = Tuner({**tiny_run, "optimizer": "SophiaG", "rho": 3e-6, "space": {"rho": (1e-6, 4e-6)}})
    assert 1e-6 <= tuner._mutate()["rho"] <= 4e-6


@pytest.mark.requires(hasattr(Tuner, "_constrain"), reason="Tuner rounds what it finds from 8.4 on")
def test_the_tuner_rounds_our_whole_number(tiny_run):
    tuner = Tuner({**tiny_run, "optimizer": "SophiaG", "space": {"hessian_interval": (1, 20), "rho": (0.01, 2)}})
    assert tuner._constrain({"hessian_interval": 7.6, "rho": 3.0}) == {"hessian_interval": 8, "rho": 2}


# Presets --------------------------------------------------------------------------------------------------------------


def test_shipped_presets():
    names = preset_names()
    assert {"detect-scratch", "detect-finetune", "detect-short", "published"} == set(names)
    assert names == sorted(path.stem for path in preset_directory().glob("*"))


@pytest.mark.parametrize("name", preset_names())
def test_shipped_preset(name):
    preset = load_preset(name)
    assert preset.name == name
    assert preset.status in {"provisional", "published", "studied"}
    assert preset.description
    assert preset.settings.keys() == preset.origins.keys()
    unused = {"fused"} | ({"clip_fraction"} if preset.settings["rho"] != "auto" else set())
    assert OPTIONS.keys() - unused <= preset.settings.keys()
    assert {"lr0", "momentum", "weight_decay", "warmup_bias_lr"} <= preset.settings.keys()
    assert load_preset(str(preset_directory() / f"{name}.yaml")) == preset


HEAD = "description: x\nstatus: provisional\nsettings: "
MALFORMED = {  # content -> what the message says
    "": "found NoneType at the top level, expected the keys ['description', 'settings', 'status']",
    "- rho\n": "found list at the top level",
    "rho: 0.1\n": "found ['rho'] at the top level",
    "description: x\nstatus: studied\n": "found ['description', 'status'] at the top level",
    HEAD + "{}\nextra: 1\n": "found ['description', 'extra', 'settings', 'status'] at the top level",
    HEAD: "settings: found NoneType, expected a mapping of argument names",
    HEAD + "[rho]\n": "settings: found list",
    "description: x\nstatus: final\nsettings: {}\n": "found 'final', expected provisional, published or studied",
    "description: x\nstatus: [studied]\nsettings: {}\n": "status: found ['studied']",
    "description: x\nstatus:\nsettings: {}\n": "status: found None",
    "settings: {": "is not readable YAML: while parsing",
    "a: b: c\n": "is not readable YAML: mapping values are not allowed here",
    "settings: !!python/object:os.system {}\n": "is not readable YAML: could not determine a constructor",
    b"\xff\xfe\x00PK\x03\x04": "is not readable YAML: ",
    b"rho: \x00\n": "is not readable YAML: ",
}
ENTRIES = {  # one entry of the settings -> what the message says
    "rh: {value: 1, origin: x}": "'rh' is not a setting. Did you mean 'rho'? Valid settings: ['beta2', ",
    "1: {value: 1, origin: x}": "found 1 as a key, expected text",
    "rho: 0.1": "rho: found 0.1, expected {value: ..., origin: 'where the value comes from'}.",
    "rho: {value: 0.1}": "rho: found {'value': 0.1}, expected",
    "rho: {value: 0.1, origin: }": "rho: found {'value': 0.1, 'origin': None}, expected",
    "rho: {value: 0.1, origin: ' '}": "rho: found {'value': 0.1, 'origin': ' '}, expected",
    "rho: {value: 0.1, origin: 5}": "rho: found {'value': 0.1, 'origin': 5}, expected",
    "rho: {value: 0.1, origin: x, note: y}": "rho: found {",
}
VALUES = {  # a value in the settings -> what the message says
    "rho: true": "'rho=True' is of invalid type bool; 'rho' must be a number > 0, or auto.",
    "rho: abc": "'rho=abc' is of invalid type str; 'rho' must be a number > 0, or auto.",
    "rho: [1]": "'rho=[1]' is of invalid type list",
    "rho: ": "'rho=None' is of invalid type NoneType",
    "rho: 0": "'rho=0.0' is an invalid value; 'rho' must be a number > 0, or auto.",
    "rho: -1e-3": "'rho=-0.001' is an invalid value",
    "rho: .nan": "'rho=nan' is an invalid value",
    "rho: .inf": "'rho=inf' is an invalid value",
    "rho: 1e999": "'rho=inf' is an invalid value",
    f"rho: 1{'0' * 400}": "'rho=inf' is an invalid value",
    "beta2: 1": "'beta2=1.0' is an invalid value; 'beta2' must be a number in [0, 1).",
    "momentum: 1.5": "'momentum=1.5' is an invalid value",
    "lr0: -1": "'lr0=-1.0' is an invalid value; 'lr0' must be a number in [0, 1], or auto.",
    "weight_decay: 1.1": "'weight_decay=1.1' is an invalid value",
    "warmup_epochs: .inf": "'warmup_epochs=inf' is an invalid value",
    "hessian_interval: 0": "'hessian_interval=0' is an invalid value; 'hessian_interval' must be a whole number >= 1.",
    "hessian_fraction: 0": "'hessian_fraction=0.0' is an invalid value; 'hessian_fraction' must be a number in (0, 1].",
    "hessian_interval: 2.5": "'hessian_interval=2.5' is of invalid type float",
    "hessian_interval: '5'": "'hessian_interval=5' is of invalid type str",
    "hessian_estimator: gnbb": "must be gnb, empirical_fisher, sign or hutchinson. Did you mean 'gnb'?",
    "hessian_estimator: 1": "'hessian_estimator=1' is of invalid type int",
}
MALFORMED |= {f"{HEAD}{{{entry}}}\n": says for entry, says in ENTRIES.items()}
MALFORMED |= {HEAD + "{{{}: {{value: {}, origin: x}}}}\n".format(*v.split(": ", 1)): says for v, says in VALUES.items()}


@pytest.mark.parametrize("content", MALFORMED, ids=lambda content: repr(content)[-60:])
def test_malformed_preset(content, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        decided(sophia=str(path))
    message = str(caught.value)
    assert message.startswith(f"Preset {path}: ") or message.startswith(f"Preset {path} is not readable YAML: ")
    assert MALFORMED[content] in message
    assert "\n" not in message
    assert one_exception(caught.value)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", ".001", "1e-03", "'1e-3'"])
def test_numbers_without_a_dot(text, tmp_path):
    """YAML 1.1 reads 1e-3 as text."""
    path = tmp_path / "mine.yaml"
    path.write_text(f"{HEAD}{{lr0: {{value: {text}, origin: x}}, rho: {{value: 1e2, origin: x}}}}\n")
    args = decided(sophia=str(path))
    assert (args["lr0"], args["rho"]) == (0.001, 100.0)


UNKNOWN = {
    "detect-shrt": "'detect-shrt' is not a preset. Did you mean 'detect-short'? Valid presets: ['detect-finetune', ",
    "publish": "Did you mean 'published'?",
    "zzz": "sophia='zzz' is not a preset. Valid presets: [",
    "../detect": "'../detect' is not a preset.",
    "../presets/detect": "is not a preset.",
    "/etc/passwd": "is not a preset.",
    "detect.yml": "sophia=detect.yml: no such file. Pass the path of a preset YAML, or one of ['detect-finetune', ",
    "nowhere/mine.yaml": "sophia=nowhere/mine.yaml: no such file.",
    "5": "sophia='5' is not a preset.",
    "False": "sophia='False' is not a preset.",
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_unknown_preset(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as caught:
        decided(sophia=parse_key_value_pair(f"sophia={name}")[1])
    assert UNKNOWN[name] in str(caught.value)
    assert one_exception(caught.value)


def test_a_folder_is_not_a_preset(tmp_path):
    (tmp_path / "mine.yaml").mkdir()
    with pytest.raises(ValueError, match="no such file"):
        decided(sophia=str(tmp_path / "mine.yaml"))


def test_presets_cannot_be_changed():
    preset = load_preset("detect-short")
    with pytest.raises(TypeError):
        preset.settings["rho"] = 1.0
    with pytest.raises(AttributeError):
        preset.name = "x"


@pytest.mark.parametrize("key", EXAMPLES)
def test_check_value_returns_the_kind(key):
    value = ALL[key].check(EXAMPLES[key])
    assert value == EXAMPLES[key]
    assert type(value) is ALL[key].kind


def test_whole_numbers_are_numbers():
    assert repr(OPTIONS["rho"].check(1)) == "1.0"


@pytest.mark.parametrize("page", ["arguments.md", "VERSIONS.md"])
def test_the_tables_in_the_documentation(page):
    """`python scripts/make_tables.py` writes them."""
    root = preset_directory().parent.parent
    spec = importlib.util.spec_from_file_location("make_tables", root / "scripts" / "make_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.with_table(page) == (root / "docs" / page).read_text()


@pytest.mark.parametrize("cls", [SophiaG, SophiaH, DecoupledSophia, Sophia])
def test_constructors_document_the_options_that_they_share(cls):
    """The text and the defaults of options.py; two names of the Agora interface mean other things."""
    text = " ".join(cls.__doc__.split())
    agora = issubclass(cls, DecoupledSophia)
    apart = {"rho", "hessian_estimator"} if agora else set()
    shared = inspect.signature(cls.__init__).parameters.keys() & OPTIONS.keys() - apart
    assert agora or {"rho", "clip_fraction", "hessian_power", "hessian_average", "cautious"} <= shared
    assert all(f"{name}: {OPTIONS[name].doc}" in text for name in shared)
    assert "{" not in cls.__doc__


# Refusals -------------------------------------------------------------------------------------------------------------


def one_exception(error: BaseException) -> bool:
    """Whether Python prints this exception alone, without "During handling of the above exception"."""
    return error.__cause__ is None and (error.__context__ is None or error.__suppress_context__)


REFUSED = {  # typed -> the exception and what it says
    "optimizer=SofiaG": (ValueError, "optimizer='SofiaG' is not an optimizer of yolo-sophia. Did you mean 'SophiaG'?"),
    "optimizer=Sophia": (ValueError, "Did you mean 'SophiaG'? Valid names: ['SophiaG', 'SophiaH']."),
    "optimizer=sophia_x.y": (ValueError, "cannot import sophia_x"),
    "optimizer=SophiaG optimizer_args={'a':1}": (
        ValueError,
        "optimizer_args requires an optimizer given by a dotted path",
    ),
    "optimizer=SophiaG sophia=detect-shrt": (
        ValueError,
        "sophia='detect-shrt' is not a preset. Did you mean 'detect-short'?",
    ),
    "optimizer=SophiaG rho=-1": (ValueError, "'rho=-1.0' is an invalid value; 'rho' must be a number > 0, or auto."),
    "optimizer=SophiaG rho=0": (ValueError, "'rho=0.0' is an invalid value; 'rho' must be a number > 0, or auto."),
    "optimizer=SophiaG rho=1e999": (ValueError, "'rho=inf' is an invalid value"),
    "optimizer=SophiaG rho=True": (
        TypeError,
        "'rho=True' is of invalid type bool; 'rho' must be a number > 0, or auto.",
    ),
    "optimizer=SophiaG rho=abc": (TypeError, "'rho=abc' is of invalid type str; 'rho' must be a number > 0, or auto."),
    "optimizer=SophiaG hessian_interval=0": (ValueError, "'hessian_interval=0' is an invalid value"),
    "optimizer=SophiaG hessian_interval=2.5": (TypeError, "'hessian_interval' must be an int"),
    "optimizer=SophiaG sophia_typed=x": (SyntaxError, "'sophia_typed' is not a valid YOLO argument"),
    "optimizer=SophiaG beta2=1.5": (ValueError, "'beta2=1.5' is an invalid value. Valid 'beta2' values are between"),
    "optimizer=SophiaG beta2=1": (ValueError, "'beta2=1.0' is an invalid value; 'beta2' must be a number in [0, 1)."),
    "optimizer=SophiaG beta2=-0.1": (ValueError, "'beta2=-0.1' is an invalid value"),
    "optimizer=SophiaG momentum=1.5": (ValueError, "'momentum=1.5' is an invalid value"),
    "optimizer=SophiaG momentum=1": (ValueError, "'momentum=1.0' is an invalid value; 'momentum' must be a number in"),
    "optimizer=SophiaG lr0=-1": (ValueError, "'lr0=-1' is an invalid value. Valid 'lr0' values are between 0.0 and 1"),
    "optimizer=SophiaG warmup_epochs=-1": (ValueError, "'warmup_epochs' must be a number >= 0."),
    "optimizer=SophiaG hessian_estimator=gbn": (
        ValueError,
        "'hessian_estimator=gbn' is an invalid value; 'hessian_estimator' must be gnb, empirical_fisher, sign or "
        "hutchinson. Did you mean 'gnb'?",
    ),
    "optimizer=SophiaG hessian_estimator=3": (TypeError, "'hessian_estimator=3' is of invalid type int"),
    "optimizer=SophiaG rhoo=1": (SyntaxError, "'rhoo' is not a valid YOLO argument. Similar arguments are i.e. ['rho="),
    "optimizer=SophiaG hesian_interval=1": (SyntaxError, "Similar arguments are i.e. ['hessian_interval=10'"),
    "optimizer=AdamW rho=0.1": (ValueError, "['rho'] are arguments of optimizer=SophiaG, but this run has optimizer=A"),
    "sophia=detect beta2=0.9": (ValueError, "['beta2', 'sophia'] are arguments of optimizer=SophiaG, but this run has"),
}


@pytest.mark.parametrize("typed", REFUSED)
def test_refused_before_the_run_directory(typed, tiny_run):
    kind, says = REFUSED[typed]
    command = " ".join(["yolo", "train", *(f"{k}={v}" for k, v in tiny_run.items()), typed])
    with pytest.raises(kind) as caught:
        entrypoint(command)
    assert type(caught.value) is kind
    assert says in re.sub(r"\x1b\[\d+m", "", str(caught.value))  # without colours
    assert one_exception(caught.value)
    assert not Path(tiny_run["project"]).exists()


def test_names_unlike_ours_keep_the_error_of_ultralytics(tiny_run):
    arguments = {**tiny_run, "optimizer": "Foo"}
    with pytest.raises(NotImplementedError) as caught:
        YOLO(arguments.pop("model")).train(**arguments)
    # Some versions name None for what they do not know.
    assert re.match(r"Optimizer '(Foo|None)' not found in list of available optimizers ", str(caught.value))
    assert "Sophia" not in str(caught.value)


@pytest.mark.parametrize(
    ("typed", "kind", "says"),
    [
        ({"optimizer": "AdamW", "rho": 0.1}, ValueError, "['rho'] are arguments of optimizer=SophiaG, but"),
        ({"rho": 0.1}, ValueError, "['rho'] are arguments of optimizer=SophiaG, but"),
        ({"space": {"rho": (0.1, 1.0), "lr0": (0.1, 1.0)}}, ValueError, "['rho'] are arguments of optimizer=SophiaG"),
        ({"optimizer": "SofiaG"}, ValueError, "Did you mean 'SophiaG'?"),
        ({"optimizer": "SophiaG", "rho": -1}, ValueError, "'rho=-1.0' is an invalid value"),
        ({"optimizer": "SophiaG", "sophia": "detect-shrt"}, ValueError, "Did you mean 'detect-short'?"),
    ],
    ids=str,
)
def test_tune_refuses_before_its_directory(typed, kind, says, tiny_run):
    arguments = {**tiny_run, **typed}
    with pytest.raises(kind, match=re.escape(says)) as caught:
        YOLO(arguments.pop("model")).tune(**arguments, iterations=1)
    assert one_exception(caught.value)
    assert not Path(tiny_run["project"]).exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (
            "optimizer=SofiaG",
            "ValueError: optimizer='SofiaG' is not an optimizer of yolo-sophia. Did you mean 'SophiaG'?",
        ),
        ("optimizer=SGD rho=0.1", "ValueError: ['rho'] are arguments of optimizer=SophiaG, but this run has"),
    ],
)
def test_one_message_and_an_exit_code(typed, says, tiny_run, python):
    command = ["train", *(f"{k}={v}" for k, v in tiny_run.items()), *typed.split()]
    done = python("-m", "ultralytics.cfg.__init__", *command, check=False)
    assert done.returncode == 1
    assert (done.stdout + done.stderr).count(says) == 1
    assert done.stderr.count("Traceback (most recent call last)") == 1  # not "During handling of the above exception"
    assert done.stderr.splitlines()[-1].startswith(says)
    assert not Path(tiny_run["project"]).exists()
