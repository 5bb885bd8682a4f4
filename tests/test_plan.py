"""Plans of a comparison as data: what is read and refused, which runs follow; tuning, the progress and the command."""

from __future__ import annotations

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from ultralytics.cfg import merge_equals_args, parse_key_value_pair

from yolo_sophia import cli
from yolo_sophia.compare.plan import KEYS, Plan, parse, plan_yaml, runs
from yolo_sophia.compare.tuning import check_tuning, tune_plans
from yolo_sophia.integration.measure import measure_step
from yolo_sophia.runs.plan import TRIAL_SEED
from yolo_sophia.runs.progress import duration, eta_seconds
from yolo_sophia.runs.run import data_name, make_run
from yolo_sophia.runs.scheduler import Progress, last_lines
from yolo_sophia.runs.worker import read_order, write_order
from yolo_sophia.search_space import SPACES
from yolo_sophia.tune.plan import parse as tune_parse

BASE = {"data": "sets/bccd/data.yaml", "model": "yolov8n.pt", "optimizers": "SophiaG,AdamW"}


def plan(**changes) -> Plan:
    """`BASE` with other words; None takes one out."""
    return parse([f"{key}={value}" for key, value in {**BASE, **changes}.items() if value is not None])


def from_file(folder: Path, text: str, *words: str) -> Plan:
    path = folder / "plan-file.yaml"
    path.write_text(text)
    return parse([f"plan={path}", *words])


def arms(made: Plan) -> dict[str, dict]:
    return {arm.name: dict(arm.arguments) for arm in made.arms}


# Reading --------------------------------------------------------------------------------------------------------------


def test_words():
    made = plan(epochs=7, lr0="1e-3", imgsz="192", cos_lr="true", seeds=2, out="somewhere", workers=2)
    assert arms(made) == {"SophiaG": {"optimizer": "SophiaG"}, "AdamW": {"optimizer": "AdamW"}}
    assert dict(made.common) == {"model": "yolov8n.pt", "epochs": 7, "lr0": 0.001, "imgsz": 192, "cos_lr": True}
    assert (made.data, made.seeds, made.out) == (("sets/bccd/data.yaml",), (0, 1), Path("somewhere"))
    assert (made.workers, made.reference, made.epochs) == (2, "AdamW", 7)


def test_defaults():
    made = plan()
    assert (made.epochs, made.seeds, made.horizons, made.target) == (100, (0, 1, 2), (1.0,), None)
    assert (made.tune_trials, made.tune_epochs, made.bn_recalibrate, made.dry_run) == (0, None, False, False)
    assert (made.workers, made.devices, made.out) == (None, (), Path("runs/compare"))
    assert (made.engine, made.cpus, made.gpus) == ("local", None, None)


def test_dashes_and_brackets_are_read_as_well():
    made = parse(["--data=[a.yaml, b.yaml]", "--model=m.pt", "optimizers=(SGD)", "seeds=[4]", "devices=0,1"])
    assert (made.data, made.seeds, made.devices, list(arms(made))) == (("a.yaml", "b.yaml"), (4,), ("0", "1"), ["SGD"])


def test_words_win_over_the_plan_file(tmp_path):
    text = """
        data: sets/a.yaml
        model: yolov8n.yaml
        epochs: 30
        seeds: [5, 7]
        lr0: 1e-3            # text to YAML 1.1
        bn_recalibrate: true
        arms:
          ours: {optimizer: SophiaG, rho: 5e-2}
          Adamax: {optimizer: torch.optim.Adamax, optimizer_args: {eps: 1e-7, betas: [0.9, 1e-1]}}
          SGD:
    """
    made = from_file(tmp_path, text, "epochs=3", "data=sets/b.yaml")
    assert (made.epochs, made.data, made.seeds, made.bn_recalibrate) == (3, ("sets/b.yaml",), (5, 7), True)
    assert made.common["lr0"] == 0.001
    assert arms(made) == {
        "ours": {"optimizer": "SophiaG", "rho": 0.05},
        "Adamax": {"optimizer": "torch.optim.Adamax", "optimizer_args": {"eps": 1e-7, "betas": [0.9, 0.1]}},
        "SGD": {"optimizer": "SGD"},
    }
    assert made.reference == "Adamax"  # there is no AdamW: the second arm


@pytest.mark.parametrize(
    ("given", "expected"), [("3", (0, 1, 2)), ("1", (0,)), ("0,4", (0, 4)), ("[0]", (0,)), ("7,", (7,))]
)
def test_seeds(given, expected):
    assert plan(seeds=given).seeds == expected


def test_horizons_are_sorted_and_once_each():
    assert plan(horizons="0.5,1,0.8,.5").horizons == (1.0, 0.8, 0.5)


@pytest.mark.parametrize(
    ("optimizers", "reference"), [("SGD,AdamW", "AdamW"), ("SGD,Adam,NAdam", "Adam"), ("SGD", "SGD")]
)
def test_reference(optimizers, reference):
    assert plan(optimizers=optimizers).reference == reference
    assert plan(optimizers=optimizers, reference="SGD").reference == "SGD"


def test_an_arm_given_again_is_a_control(tmp_path):
    assert list(arms(plan(optimizers="SGD,AdamW,AdamW,AdamW"))) == ["SGD", "AdamW", "AdamW-again1", "AdamW-again2"]
    blogs = arms(plan(optimizers="blog,blog"))
    assert blogs["blog"] == blogs["blog-again1"]
    text = "{data: d.yaml, model: m.pt, arms: {AdamW: {lr0: 0.002}, AdamW-again1: {optimizer: AdamW}}}"
    made = from_file(tmp_path, text, "optimizers=AdamW")  # its words come first, and a plan file may hold such names
    assert list(arms(made)) == ["AdamW", "AdamW-again1", "AdamW-again1-again1"]


def test_ready_made_arms():
    """What people paste: momentum, no refresh, no decay, Ultralytics' own learning rate; an arm may change it."""
    expected = {"betas": [0.937, 0.999], "rho": 0.04, "weight_decay": 0.0}
    blog = arms(plan(optimizers="blog"))["blog"]
    assert blog == {"optimizer": "yolo_sophia.SophiaG", "optimizer_args": expected, "lr0": 0.01}
    changed = parse({"data": "d.yaml", "model": "m.pt", "arms": {"blog": {"lr0": 0.001}}})
    assert arms(changed)["blog"] == {**blog, "lr0": 0.001}


def test_an_arm_has_rates_by_part(tmp_path):
    """With every optimizer; the written plan is read back to the same."""
    text = "{data: d.yaml, model: m.pt, arms: {parts: {optimizer: AdamW, lr_factors: {new: 2e1, head: 2}}, AdamW: {}}}"
    made = from_file(tmp_path, text)
    assert arms(made) == {
        "parts": {"optimizer": "AdamW", "lr_factors": {"new": 20.0, "head": 2}},
        "AdamW": {"optimizer": "AdamW"},
    }
    again = tmp_path / "again.yaml"
    again.write_text(plan_yaml(made))
    assert arms(parse([f"plan={again}"])) == arms(made)
    assert plan(lr_factors="{new: auto}").common["lr_factors"] == {"new": "auto"}
    with pytest.raises(ValueError, match="arm parts: 'lr_factors': new: found 0, expected a finite number > 0"):
        parse({"data": "d.yaml", "model": "m.pt", "arms": {"parts": {"optimizer": "SGD", "lr_factors": {"new": 0}}}})


def test_the_cautious_control_names_its_package():
    try:
        import timm  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match=r"cannot import timm.optim .*Is its package installed\?"):
            plan(optimizers="adamw-cautious")
    else:
        assert arms(plan(optimizers="adamw-cautious"))["adamw-cautious"]["optimizer_args"] == {"caution": True}


def test_arms_spell_optimizers_in_any_case():
    assert list(arms(plan(optimizers="sophiag,ADAMW,RMSprop,musgd,Auto"))) == "sophiag ADAMW RMSprop musgd Auto".split()


ULTRALYTICS_WORDS = (
    "classes=0,3", "classes=[0, 3]", "classes=2", "classes=None", "freeze=0,1", "freeze=10", "freeze=[0,1]",
    "imgsz=64,96", "imgsz=[64, 96]", "lr0=1e-3", "lr0=.5", "momentum=0.9", "cos_lr=true", "cos_lr=FALSE", "amp=False",
    "cache=ram", "cache=disk", "cache=True", "cache=none", "device=cpu", "device=0", "device=-1", "split=val",
    "pretrained=some weights.pt", "pretrained=a=b.pt", "pretrained=False", "auto_augment=None", "time=0.5", "batch=-1",
    "batch=0.7", "lrf= 0.1 ", "copy_paste_mode='flip'", "erasing=0.4,", "scale=0.5",
)  # fmt: skip


def ultralytics_reads(words: list[str]) -> dict:
    """What `yolo train` gives its trainer: Ultralytics' own parser, with the loop of its entrypoint around it."""
    found = {}
    for word in merge_equals_args(words):
        key, value = parse_key_value_pair(word.removesuffix(","))
        found[key] = value
    return found


@pytest.mark.compat
@pytest.mark.parametrize("word", ULTRALYTICS_WORDS)
def test_a_word_means_what_it_means_in_yolo_train(word, tmp_path, monkeypatch):
    # What is valid is another question.
    monkeypatch.setattr("yolo_sophia.runs.plan.check_arm", lambda *_: None)
    monkeypatch.setattr("yolo_sophia.runs.plan.check_free", lambda *_: None)
    key, _, text = word.partition("=")
    expected = ultralytics_reads([word])[key]
    assert parse([*(f"{k}={v}" for k, v in BASE.items()), word]).common[key] == expected
    assert (
        tune_parse(["data=d.yaml", "model=m.pt", word, *["space={'rho': [0.1, 1.0]}"] * (key != "lr0")]).common[key]
        == expected
    )
    if "'" in text or text.endswith(","):
        return
    content = yaml.safe_dump({"data": "d.yaml", "model": "m.pt", key: text, "arms": {"SGD": {key: text}}})
    made = from_file(tmp_path, content)
    assert made.common[key] == arms(made)["SGD"][key] == expected
    again = from_file(tmp_path, plan_yaml(made))
    assert again.common[key] == expected and runs(again) == runs(made)


def test_a_worker_gets_what_the_plan_has(tmp_path):
    """JSON has no tuples; Ultralytics takes some for what lists are not."""
    (run,) = runs(parse([*(f"{k}={v}" for k, v in BASE.items()), "optimizers=SGD", "seeds=1", "classes=0,3", "time=1"]))
    write_order(tmp_path, run, 2)
    assert read_order(tmp_path)["arguments"] == dict(run.arguments) and run.arguments["classes"] == (0, 3)


def test_a_measured_step_has_the_models_channels(tiny_model, tmp_path):
    import torch
    from ultralytics.nn.tasks import DetectionModel

    network = DetectionModel(str(tiny_model), ch=1, verbose=False)
    torch.save({"model": network, "train_args": {}}, tmp_path / "one.pt")
    threads = torch.get_num_threads()
    try:
        _, parameters, _ = measure_step(str(tmp_path / "one.pt"), 2, 64, 1)
    finally:
        torch.set_num_threads(threads)
    assert parameters == sum(p.numel() for p in network.parameters())


@pytest.mark.compat
def test_words_are_merged_as_in_yolo_train():
    given = ["imgsz", "=", "64", "lr0=", "0.1", "momentum", "=0.5"]
    made = parse([*(f"{k}={v}" for k, v in BASE.items()), *given, "cos_lr"])
    assert {**made.common} == {"model": "yolov8n.pt", "epochs": 100, **ultralytics_reads(given), "cos_lr": True}


@pytest.mark.compat
def test_text_of_a_plan_file_is_not_executed(tmp_path):
    for text in ("__import__('os').system('touch pwned')", "open('pwned', 'w')", "2**3"):
        made = from_file(tmp_path, yaml.safe_dump({**BASE, "pretrained": text}))
        assert made.common["pretrained"] == text
    assert not Path("pwned").exists()


def test_a_file_that_exists_is_taken_as_it_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [
        "[old](v8)/data.yaml",
        "a,b/data.yaml",
        "[x].yaml",
        "(y)",
        "k=v w/data.yaml",
        "'q'/data.yaml",
        "[un/data.yaml",
    ]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("{}")
    for name in names:
        assert plan(data=name).data == (name,), name
        assert parse({"data": name, "model": "m.pt", "optimizers": "SGD"}).data == (name,)
        if name.count("[") == name.count("]"):
            assert plan(data=f"[c.yaml, {name}]").data == ("c.yaml", name)
        assert tune_parse([f"data={name}", "model=m.pt"]).data == (name,)
    assert plan(data="c.yaml,a,b/data.yaml,d.yaml").data == ("c.yaml", "a,b/data.yaml", "d.yaml")
    assert plan(data="['c.yaml', \"d,e.yaml\"]").data == ("c.yaml", "d,e.yaml")
    for path in ("[old](v8)/m=1,2.pt", "it's here/x", "1e3", "(a)"):
        made = tune_parse(["data=d.yaml", f"model={path}", f"out={path}", f"storage={path}"])
        assert (made.common["model"], str(made.out), made.storage) == (path, path, f"sqlite:///{path}")
        made = plan(model=path, project=path, name="n,1")
        assert (made.common["model"], made.out) == (path, Path(path, "n,1"))
    file = tmp_path / "[s], {1}.yaml"
    file.write_text("{'rho': [0.1, 1.0]}")
    assert list(tune_parse(["data=d.yaml", "model=m.pt", f"space={file}"]).space) == ["lr0", "rho"]


def test_project_and_name_as_in_ultralytics():
    assert plan(project="here").out == Path("here/compare") and plan(name="mine").out == Path("runs/mine")
    assert plan(project="here", name="mine").out == Path("here/mine")
    assert tune_parse(["data=sets/d.yaml", "model=m.pt", "project=here"]).out == Path("here/SophiaG-d")
    assert tune_parse(["data=sets/d.yaml", "model=m.pt", "name=mine"]).out == Path("runs/tune/mine")


# Refusing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": None}, "lacks data: add data=..."),
        ({"data": None, "model": None}, "lacks data and model: add data=... model=..."),
        ({"model": ""}, "lacks model"),
        ({"optimizers": None}, "no arms: add optimizers=SophiaG,AdamW"),
        ({"epochz": 3}, "the plan: 'epochz' is not a known argument. Did you mean 'epochs'?"),
        ({"seed_s": 3}, "Did you mean 'seeds'?"),
        ({"optimizers": "SophiaG,AdamWW"}, "arm AdamWW: optimizer='AdamWW' is not an optimizer. Did you mean 'AdamW'?"),
        ({"optimizers": "SofiaG"}, "Did you mean 'SophiaG'?"),
        ({"optimizers": "torch.optim.Adammax"}, "Did you mean 'Adamax'?"),
        ({"optimizers": "no_such_package.Lion"}, "cannot import no_such_package"),
        ({"epochs": 0}, "epochs=0: expected a whole number >= 1"),
        ({"epochs": 2.5}, "epochs=2.5"),
        ({"epochs": "True"}, "epochs=True"),
        ({"seeds": 0}, "seeds=0: expected a number >= 1, or a list of different whole numbers"),
        ({"seeds": -1}, "seeds=-1"),
        ({"seeds": "1,1"}, r"seeds=[1, 1]"),
        ({"seeds": "0,-2"}, r"seeds=[0, -2]"),
        ({"seeds": "1.5"}, "seeds=1.5"),
        ({"seeds": "True"}, "seeds=True"),
        ({"seeds": "[]"}, "seeds=[]"),
        ({"horizons": "0.5"}, "horizons=[0.5]: expected fractions in (0, 1], 1.0 among them"),
        ({"horizons": "1,2"}, "horizons=[1, 2]"),
        ({"horizons": "1,0"}, "horizons=[1, 0]"),
        ({"horizons": "1,x"}, "horizons=[1, 'x']"),
        ({"target": 2}, "target=2: expected a number between 0 and 1"),
        ({"target": "high"}, "target='high'"),
        ({"tune_trials": -1}, "tune_trials=-1: expected a whole number >= 0"),
        ({"tune_epochs": 0}, "tune_epochs=0"),
        ({"workers": 0}, "workers=0"),
        ({"engine": "slurm"}, "engine='slurm': expected local or ray"),
        ({"engine": "ray", "cpus": 0}, "cpus=0: expected a whole number >= 1"),
        ({"engine": "ray", "gpus": 2}, "gpus=2: expected a number from 0 to 1"),
        ({"engine": "ray", "workers": 2}, "workers=2 is not for engine=ray: use cpus and gpus instead"),
        ({"engine": "ray", "devices": "0,1"}, "devices=[0, 1] is not for engine=ray"),
        ({"cpus": 2}, "cpus=2 is not for engine=local: use workers and devices instead"),
        ({"engine": "local", "gpus": 0.5}, "gpus=0.5 is not for engine=local"),
        ({"bn_recalibrate": "perhaps"}, "bn_recalibrate='perhaps': expected True or False"),
        ({"dry_run": 1}, "dry_run=1: expected True or False"),
        ({"reference": "Adamw"}, "reference='Adamw' is not an arm. Did you mean 'AdamW'?"),
        ({"optimizers": "../AdamW"}, "arm '../AdamW': expected letters"),
        ({"optimizers": "-x"}, "arm '-x'"),
        ({"optimizers": ".hidden"}, "arm '.hidden'"),
        ({"data": "a/coco.yaml,b/coco.yaml"}, "expected different names, found ['coco', 'coco']"),
        ({"lr0": "fast"}, "arm SophiaG: 'lr0=fast' is of invalid type str"),
        ({"lr0": 2}, "arm SophiaG: 'lr0=2' is an invalid value"),
        ({"optimizers": "SophiaG", "rho": 0}, "arm SophiaG: 'rho=0.0' is an invalid value"),
        ({"rho": 0.1}, "arm AdamW: ['rho'] are arguments of optimizer=SophiaG"),
        ({"optimizers": "SGD", "optimizer_args": "{eps: 1}"}, "arm SGD: ['optimizer_args']"),
        ({"optimizers": "torch.optim.SGD", "optimizer_args": "{nesteroff: 1}"}, "Did you mean 'nesterov'?"),
        ({"seed": 3}, "seed is decided by the plan: use seeds=..."),
        ({"optimizer": "SGD"}, "optimizer is decided by the plan: use optimizers=..."),
        ({"project": "here", "out": "there"}, "out=there and project=here: use one of them"),
        ({"resume": "True"}, "resume is decided by the plan"),
        ({"lr0": ""}, "lr0= has no value"),
        ({"batch": 0}, "batch=0: expected a whole number >= 1, or -1 or a fraction"),
        ({"batch": -3}, "batch=-3"),
        ({"batch": 2.5}, "batch=2.5"),
        ({"imgsz": 0}, "imgsz=0: expected a whole number >= 1"),
        ({"imgsz": "big"}, "imgsz='big'"),
        ({"imgsz": "64,64,64"}, "imgsz=(64, 64, 64)"),
        ({"nbs": 0}, "nbs=0: expected a number >= 1"),
        ({"fraction": -0.5}, "fraction=-0.5: expected a number above 0"),
        ({"fraction": 0}, "fraction=0"),
        ({"patience": -1}, "patience=-1"),
        ({"time": -2}, "time=-2: expected a number >= 0"),
        ({"workers": -1}, "workers=-1"),
        ({"device": "0,1"}, "device=0,1: a training has one; use devices=... to spread the trainings"),
    ],
)
def test_refuses(changes, message):
    with pytest.raises(ValueError) as error:
        plan(**changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "found list, expected a mapping"),
        ("3: x", "found 3 as a key, expected text"),
        ("a: [", "is not readable YAML"),
        ("{data: d, model: m, arms: [AdamW]}", "arms: found list, expected a mapping of names to arguments"),
        ("{data: d, model: m, arms: {AdamW: 3}}", "arms: AdamW: found 3, expected a mapping of arguments"),
        ("{data: d, model: m, arms: {}}", "the plan has no arms"),
        ("{data: d, model: m, arms: {AdamW: {lr: 1}}}", "arm AdamW: 'lr' is not a known argument. Did you mean 'lrf'?"),
        ("{data: d, model: m, arms: {AdamW: {epochs: 3}}}", "arm AdamW: epochs is decided by the plan"),
        ("{data: d, model: m, arms: {AdamW: {data: e}}}", "arm AdamW: data is decided by the plan"),
        ("{data: d, model: m, arms: {AdamW: {seeds: 3}}}", "arm AdamW: 'seeds' is not a known argument"),
        ("{data: d, model: m, arms: {mine: {lr0: 0.1}}}", "arm mine: optimizer='mine' is not an optimizer"),
        ("{data: d, model: m, arms: {a/b: {optimizer: SGD}}}", "arm 'a/b': expected letters"),
        ('{data: d, model: m, arms: {"..": {optimizer: SGD}}}', "arm '..': expected letters"),
        ("{data: d, model: m, arms: {%s: {optimizer: SGD}}}" % ("a" * 65), "expected letters"),
    ],
)
def test_refuses_a_plan_file(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        from_file(tmp_path, text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("words", [["data"], ["=3"], ["data=d.yaml", "compare"]])
def test_refuses_words_that_are_no_pairs(words):
    with pytest.raises(ValueError, match=r"expected key=value, such as data=my\.yaml"):
        parse(words)


def test_refuses_a_plan_file_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        parse([f"plan={tmp_path / 'none.yaml'}"])


# Runs -----------------------------------------------------------------------------------------------------------------


def test_every_arm_has_the_same_runs():
    made = plan(epochs=20, seeds="4,9", horizons="1,0.33", data="a.yaml,b.yaml", lr0=0.002)
    ordered = runs(made)
    assert Counter(run.arm for run in ordered) == {"SophiaG": 8, "AdamW": 8}
    assert [run.seed for run in ordered] == [4] * 8 + [9] * 8  # seeds outermost: what is finished early is paired
    assert len({run.key for run in ordered}) == 16
    for run in ordered:
        assert run.arguments["seed"] == run.seed and run.arguments["data"] == run.data
        assert run.arguments["epochs"] == {1.0: 20, 0.33: 7}[run.horizon]
        assert run.arguments["optimizer"] == run.arm and run.arguments["lr0"] == 0.002
    assert {run.arguments["epochs"] for run in runs(plan(epochs=1, horizons="1,0.1"))} == {1}


def test_an_arms_arguments_win_and_what_tuning_found_wins_over_them():
    given = {"data": "d.yaml", "model": "m.pt", "lr0": 0.1, "momentum": 0.8, "seeds": 1}
    made = parse({**given, "arms": {"SGD": {"lr0": 0.2}, "AdamW": {}}})
    found = {("SGD", "d.yaml"): {"momentum": 0.7}}
    sgd, adamw = runs(made, found)
    assert (sgd.arguments["lr0"], sgd.arguments["momentum"]) == (0.2, 0.7)
    assert (adamw.arguments["lr0"], adamw.arguments["momentum"]) == (0.1, 0.8)
    assert runs(made)[1].key == adamw.key
    assert runs(made)[0].key != sgd.key


def test_keys_stay_the_same():
    """A pinned key: finished runs of earlier versions must be found again."""
    first = [run.key for run in runs(plan(epochs=3, seeds=2, lr0="1e-3"))]
    assert first == [run.key for run in runs(plan(lr0=0.001, seeds="0,1", epochs=3, out="elsewhere", workers=7))]
    assert first[0] == "bccd-SophiaG-s0-h1-d3118289"
    arguments = {"optimizer": "SGD", "lr0": 0.01}
    assert make_run("SGD", "d.yaml", 0, 1.0, arguments, False).key == "d-SGD-s0-h1-c91fe51a"


@pytest.mark.parametrize(
    "changed", [{"lr0": 0.011}, {"optimizer": "Adam"}, {"epochs": 4}, {"amp": False}, {"a": {"b": 3}}]
)
def test_another_argument_is_another_run(changed):  # fmt: skip
    given = {"optimizer": "SGD", "lr0": 0.01, "epochs": 3, "a": {"b": 2}}
    keys = {make_run("SGD", "d.yaml", 0, 1.0, arguments, False).key for arguments in (given, {**given, **changed})}
    assert len(keys) == 2


def test_recalibration_and_horizon_are_in_the_key():
    made = [make_run("SGD", "d.yaml", 0, h, {"lr0": 0.01}, bn) for h in (1.0, 0.5) for bn in (False, True)]
    assert len({run.key for run in made}) == 4


@pytest.mark.parametrize(
    ("data", "name"),
    [("coco.yaml", "coco"), ("sets/bccd/data.yaml", "bccd"), ("data.yaml", "data"), ("my set.yaml", "my_set")],
)
def test_data_name(data, name):
    assert data_name(data) == name


def test_keys_are_names_of_folders():
    made = plan(data="../we ird/%2e.yaml,x/data.yaml", optimizers="torch.optim.RAdam,adamw,adamw")
    for run in runs(made):
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._+-]*", run.key), run.key


def test_plan_yaml_reads_back_as_the_same_plan(tmp_path):
    given = {
        **BASE, "data": ["a.yaml", "b/data.yaml"], "optimizers": ["AdamW", "AdamW", "blog"], "epochs": 7, "lrf": 1e-05,
        "arms": {"ä".encode().hex(): {"optimizer": "torch.optim.Adamax", "optimizer_args": {"eps": 1e-8}}},
        "seeds": [3, 5], "horizons": [0.5, 1.0], "target": 0.3, "tune_trials": 2, "tune_epochs": 4, "workers": 2,
        "bn_recalibrate": True, "devices": [0, 1], "out": str(tmp_path / "é"), "cache": None, "dry_run": True,
    }  # fmt: skip
    made = parse(given)
    again = from_file(tmp_path, plan_yaml(made), "dry_run=True")
    assert again == made
    assert runs(again) == runs(made)
    assert tune_plans(again) == tune_plans(made)
    assert not from_file(tmp_path, plan_yaml(made)).dry_run  # the plan that is kept is one to run


def test_the_engine_is_kept_and_the_runs_are_the_same(tmp_path):
    made = plan(engine="ray", cpus=2, gpus=0.5)
    assert (made.engine, made.cpus, made.gpus) == ("ray", 2, 0.5)
    assert yaml.safe_load(plan_yaml(made))["engine"] == "ray"
    assert from_file(tmp_path, plan_yaml(made)) == made
    assert runs(made) == runs(plan())


# Tuning ---------------------------------------------------------------------------------------------------------------


def test_spaces_are_of_one_size():
    assert {len(space) for space in SPACES.values()} == {0, 2}
    assert [name for name, space in SPACES.items() if not space] == ["auto"]


def test_every_arm_has_the_same_number_of_trials_over_its_own_space():
    made = plan(
        optimizers="SophiaG,AdamW,AdamW,auto", tune_trials=3, epochs=20, data="a.yaml,b.yaml", lr0=0.002,
        bn_recalibrate=True, cut_runs="restart", out="there",
    )  # fmt: skip
    studies = tune_plans(made)
    arms_of = ("SophiaG", "AdamW", "AdamW-again1", "auto")
    assert list(studies) == [(arm, data) for data in ("a.yaml", "b.yaml") for arm in arms_of]
    assert len({study.study for study in studies.values()}) == 8
    for (arm, data), study in studies.items():
        assert study.trials == (1 if arm == "auto" else 3) and study.pruner == "none"
        assert study.storage == f"sqlite:///{Path('there', 'study.db')}"
        (first,), (other,) = study.runs({}), study.runs({"lr0": 0.003})
        assert first.seed == TRIAL_SEED and first.seed not in made.seeds and first.restart and first.bn_recalibrate
        assert (first.arguments["lr0"], other.arguments["lr0"]) == (0.002, 0.003)  # a given value is the first trial's
        assert first.data == data and first.arguments["epochs"] == 6 and first.arm == f"tune-{arm}"
    assert set(studies["AdamW", "a.yaml"].space) == {"lr0", "weight_decay"}
    assert next(iter(tune_plans(plan(tune_trials=1, tune_epochs=2)).values())).epochs == 2
    assert next(iter(tune_plans(plan(tune_trials=1, epochs=2)).values())).epochs == 1
    assert not tune_plans(plan())


def test_tuning_of_another_version_is_refused(tmp_path):
    made = plan(tune_trials=2, out=tmp_path)
    check_tuning(made)
    (run,) = tune_plans(made)["AdamW", BASE["data"]].runs({})
    folder = tmp_path / "runs" / run.key
    folder.mkdir(parents=True)
    write_order(folder, run, 1)
    check_tuning(plan(out=tmp_path))
    with pytest.raises(ValueError, match=r"has tuning trials of yolo-sophia 0\.1\.0"):
        check_tuning(made)


@pytest.mark.parametrize(("found", "says"), [(None, "the package optuna, which is missing"), ("4.8.0", "optuna>=4.9")])
def test_tuning_without_optuna_names_the_extra(found, says, tmp_path, tiny_data, monkeypatch, capsys):
    monkeypatch.setattr("yolo_sophia.tune.command.find_spec", lambda name: found)
    monkeypatch.setattr("yolo_sophia.tune.command.metadata.version", lambda name: found)
    words = [f"data={tiny_data}", "model=m.pt", "optimizers=SGD", "tune_trials=2", f"out={tmp_path / 'out'}"]
    assert cli.main(["compare", *words]) == 2
    error = capsys.readouterr().err
    assert says in error and 'pip install "yolo-sophia[compare]"' in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


# The progress ---------------------------------------------------------------------------------------------------------


def progress(state: str, epochs: int = 0, seconds: float = 0.0, before: int = 0) -> Progress:
    run = make_run("SGD", "d.yaml", 0, 1.0, {"epochs": 10}, False)
    return Progress(run, state, epochs, seconds, before=before)


def test_eta():
    assert eta_seconds([progress("waiting")], 1) is None
    board = [progress("running", 5, 50.0), progress("waiting"), progress("failed", 2, 20.0), progress("elsewhere", 4)]
    board.append(progress("pruned", 3, 30.0))
    assert eta_seconds(board, 1) == pytest.approx((5 + 10 + 6) * 10.0)
    assert eta_seconds(board, 2) == pytest.approx((5 + 10 + 6) * 10.0 / 2)
    assert eta_seconds([progress("finished", 10, 100.0)], 1) == 0.0


def test_eta_counts_only_what_was_trained_now():
    """Epochs that an earlier invocation trained, of this run or of finished ones, say nothing of the pace."""
    found, resumed = progress("finished", 10, before=10), progress("running", 9, 20.0, before=8)
    assert eta_seconds([found, resumed, progress("waiting")], 1) == pytest.approx((1 + 10) * 20.0)


@pytest.mark.parametrize(
    ("seconds", "shown"), [(None, "-"), (0, "0:00:00"), (59.6, "0:01:00"), (3723, "1:02:03"), (360000, "100:00:00")]
)
def test_duration(seconds, shown):
    assert duration(seconds) == shown


def test_last_lines_leave_progress_bars_out(tmp_path):
    log = tmp_path / "log.txt"
    bar = "".join(f"\r 1/3 {i}%" for i in range(100))
    log.write_bytes(f"start\n{bar}\nTraceback:\n\n  wrong \xff\n".encode("latin-1"))
    assert last_lines(log).splitlines() == ["start", " 1/3 99%", "Traceback:", "  wrong \ufffd"]
    log.write_text("".join(f"{i}\n" for i in range(50)))
    assert last_lines(log).split() == [str(i) for i in range(38, 50)]
    assert last_lines(tmp_path / "none") == ""


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [[], ["help"], ["-h"], ["--help"]])
def test_help_names_every_key(capsys, word):
    assert cli.main(["compare", *word]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if re.match(r"  \S", line)]
    assert lines == list(KEYS)
    assert all(spec.meaning for spec in KEYS.values())


@pytest.mark.parametrize(
    ("word", "message"), [("epochz=3", "Did you mean 'epochs'?"), ("optimizers=SophiaG,AdmaW", "Did you mean 'AdamW'?")]
)
def test_a_typo_is_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, word, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", *(f"{key}={value}" for key, value in BASE.items()), "out=here", word]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1 and shown.err.startswith("yolo-sophia: ") and message in shown.err
    assert not list(tmp_path.iterdir())


def test_a_typo_in_a_process_of_its_own(tmp_path, python):
    done = python(
        "-m", "yolo_sophia.cli", "compare", "data=d.yaml", "model=m.pt", "tune_trial=3", check=False, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "yolo-sophia: the plan: 'tune_trial' is not a known argument. Did you mean 'tune_trials'?\n"
    assert not list(tmp_path.iterdir())


def test_the_shipped_plans_are_sound():
    folder = Path(__file__).parent.parent / "configs" / "compare"
    paths = sorted(folder.glob("*.yaml"))
    assert paths
    for path in paths:
        made = parse([f"plan={path}", "data=d.yaml", "model=m.pt"])
        assert "SophiaG" in arms(made) and made.reference == "AdamW"
        assert all(a > b for a, b in pairwise(made.horizons))
        assert yaml.safe_load(plan_yaml(made))["seeds"] == list(made.seeds)
