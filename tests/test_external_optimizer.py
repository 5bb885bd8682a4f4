"""Any optimizer by its dotted path under Ultralytics: an argument is used or refused."""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import pytest
import torch
import yaml

from yolo_sophia.integration import external_optimizer
from yolo_sophia.integration.arguments import OUR_KEYS, canonical_optimizer, finalize, refuse_for_others

pytestmark = pytest.mark.compat


class Swallowing(torch.optim.SGD):
    """An optimizer that takes any keyword and ignores it, as some libraries' do."""

    def __init__(self, params, lr=0.02, momentum=0.5, weight_decay=0.0, **ignored):
        super().__init__(params, lr=lr, momentum=momentum, weight_decay=weight_decay)


def train(tiny_run: dict, **arguments):
    from ultralytics import YOLO

    arguments = {**tiny_run, **arguments}
    model = YOLO(arguments.pop("model"))
    seen: dict[str, object] = {}

    def start(trainer):
        seen["optimizer"] = trainer.optimizer

    def batch(trainer):
        lr = [group["lr"] for group in trainer.optimizer.param_groups if group.get("param_group", "bias") == "bias"]
        seen.setdefault("bias_lr", lr)

    model.add_callback("on_train_start", start)
    model.add_callback("on_train_batch_end", batch)
    model.train(**arguments)
    return model.trainer, seen


@pytest.mark.slow
def test_trains_with_the_optimizers_own_default_learning_rate(tiny_run):
    trainer, seen = train(tiny_run, optimizer="torch.optim.RAdam", optimizer_args={"betas": (0.8, 0.9)})
    assert type(seen["optimizer"]) is torch.optim.RAdam
    assert {group["betas"] for group in seen["optimizer"].param_groups} == {(0.8, 0.9)}
    assert trainer.args.lr0 == 0.001 and max(seen["bias_lr"]) <= 0.001  # not Ultralytics' 0.01 and 0.1
    recorded = yaml.safe_load((trainer.save_dir / "args.yaml").read_text())
    assert recorded["optimizer"] == "torch.optim.RAdam" and "rho" not in recorded and "sophia" not in recorded
    with Path(trainer.csv).open() as file:
        assert not [column for column in next(csv.reader(file)) if column.strip().startswith("sophia/")]


@pytest.mark.slow
def test_momentum_reaches_an_optimizer_that_has_one(tiny_run):
    path = f"{__name__}.Swallowing"
    trainer, seen = train(tiny_run, optimizer=path, optimizer_args={"momentum": 0.7}, lr0=0.003)
    assert trainer.args.lr0 == 0.003
    assert {group["momentum"] for group in seen["optimizer"].param_groups} == {0.7}


@pytest.mark.slow
def test_weight_decay_replaces_ultralytics_own_where_there_is_decay(tiny_run):
    _, seen = train(tiny_run, optimizer="torch.optim.RAdam", optimizer_args={"weight_decay": 0.25})
    assert sorted({group["weight_decay"] for group in seen["optimizer"].param_groups}) == [0.0, 0.25]


@pytest.mark.slow
def test_state_stays_float32_in_checkpoints(tiny_run):
    saved = {}

    from ultralytics import YOLO

    arguments = dict(tiny_run)
    model = YOLO(arguments.pop("model"))
    model.add_callback("on_model_save", lambda t: saved.update(torch.load(t.last, weights_only=False)))
    model.train(**arguments, optimizer="torch.optim.Adagrad", lr0=0.001)
    states = list(saved["optimizer"]["state"].values())
    assert states and all(state["sum"].dtype == torch.float32 for state in states)


@pytest.mark.parametrize(
    ("path", "given", "message"),
    [
        ("torch.optim.Adamm", None, "no such class. Did you mean 'Adam'"),
        ("torch.optim.no.Such", None, "cannot import torch.optim.no"),
        ("pathlib.Path", None, "no torch.optim.Optimizer"),
        ("torch.optim.RAdam", {"beta": 1}, "no argument 'beta'. Did you mean 'betas'"),
        ("torch.optim.RAdam", {"lr": 1}, "give it as lr0"),
        (f"{__name__}.Swallowing", {"rho": 1}, "no argument 'rho'"),
    ],
)
def test_refuses(path, given, message):
    with pytest.raises(ValueError, match="optimizer") as error:
        external_optimizer.check_arguments(path, given or {}) if given else external_optimizer.load_class(path)
    assert message in str(error.value)


def test_refuses_arguments_that_are_no_mapping():
    with pytest.raises(TypeError, match="expected a mapping"):
        external_optimizer.check_arguments("torch.optim.RAdam", "betas")


@pytest.mark.parametrize("optimizer", ["AdamW", "SophiaG"])
def test_optimizer_args_need_a_dotted_path(optimizer):
    args = argparse.Namespace(optimizer=optimizer, resume=None, task="detect", optimizer_args={"a": 1}, sophia=None)
    with pytest.raises(ValueError, match="optimizer_args"):
        finalize(args, {"optimizer": optimizer, "optimizer_args": {"a": 1}})


@pytest.mark.parametrize(
    ("path", "given", "says"),
    [
        ("torch.optim.LBFGS", None, "LBFGS needs a closure at each step"),
        ("torch.optim.Optimizer", None, "Optimizer has no step of its own"),
        ("torch.optim.SGD", {"momentum": -1}, "does not take {'momentum': -1}: ValueError: Invalid momentum"),
        ("torch.optim.SGD", {"nesterov": True}, "ValueError: Nesterov momentum requires"),
        ("torch.optim.Adam", {"betas": 3}, "does not take {'betas': 3}: TypeError"),
    ],
)
def test_what_the_constructor_refuses_is_refused_before_a_directory_is_made(tiny_run, path, given, says):
    from ultralytics import YOLO

    arguments = dict(tiny_run)
    model = YOLO(arguments.pop("model"))
    with pytest.raises(ValueError) as error:
        model.train(**arguments, optimizer=path, optimizer_args=given)
    assert says in str(error.value)
    assert not Path(tiny_run["project"]).exists()


def test_only_the_named_module_is_imported(tmp_path, monkeypatch):
    package = tmp_path / "named_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "beside.py").write_text("raise SystemExit('imported, although it was not named')")
    (package / "named.py").write_text("import torch\nclass Mine(torch.optim.SGD): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    for name in ("SGD", "auto", "named_package", "named package.named.Mine", "named_package/named.Mine", "x.y.Z()"):
        assert not external_optimizer.is_path(name) and canonical_optimizer(name) is None
    assert external_optimizer.load_class("named_package.named.Mine").__name__ == "Mine"
    assert set(sys.modules) - before == {"named_package", "named_package.named"}


def test_a_module_that_ends_the_interpreter_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "leaving.py").write_text("raise SystemExit(3)")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"optimizer=leaving\.X: importing leaving ended in SystemExit: 3\."):
        external_optimizer.load_class("leaving.X")


def test_arguments_for_any_dotted_optimizer_are_refused_with_the_way_to_use_them():
    for keys, hint in (({"bn_momentum"}, True), ({"bn_momentum", "rho"}, False)):
        with pytest.raises(ValueError, match=r"are arguments of optimizer=SophiaG, .*optimizer=AdamW") as caught:
            refuse_for_others(keys, "AdamW")
        assert ("given by a dotted path, as torch.optim.AdamW, takes them too" in str(caught.value)) == hint


def test_arguments_of_a_sophia_run_go_to_an_external_optimizer():
    """As of `cfg=runs/.../args.yaml optimizer=torch.optim.AdamW optimizer_args=... lr_factors=...`."""
    from ultralytics.utils import DEFAULT_CFG_DICT

    given = {"optimizer": "torch.optim.AdamW", "optimizer_args": {"eps": 1e-6}, "lr_factors": {"head": 2.0}}
    recorded = {"sophia_typed": "detect-finetune:lr0", "rho": 0.5, "bn_momentum": 0.1, "momentum": 0.6, "lr0": 0.002}
    args = argparse.Namespace(**{**DEFAULT_CFG_DICT, **recorded, **given})
    finalize(args, given)
    kept = {key: value for key, value in vars(args).items() if key in OUR_KEYS}
    assert kept == {"optimizer_args": {"eps": 1e-6}, "lr_factors": {"head": 2.0}}
    assert args.lr0 == 0.002
