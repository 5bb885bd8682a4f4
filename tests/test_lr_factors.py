"""Learning rates by part: precedence, the groups of every optimizer, what is refused, resumed runs."""

from __future__ import annotations

import logging
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO
from ultralytics.cfg import get_cfg
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.nn.tasks import DetectionModel
from ultralytics.utils import DEFAULT_CFG_DICT, LOGGER
from ultralytics.utils.patches import torch_load

from yolo_sophia.integration import build, lr_factors
from yolo_sophia.integration.arguments import finalize
from yolo_sophia.integration.lr_factors import assign, split
from yolo_sophia.integration.provenance import ClassRows, Provenance, decode
from yolo_sophia.optim import SophiaG
from yolo_sophia.options import OPTIONS

pytestmark = pytest.mark.compat

HAS_LABELS = hasattr(DetectionTrainer, "_get_warmup_iterations")
"""Whether it is an Ultralytics whose parameter groups have a key `param_group`."""


@pytest.fixture(scope="module")
def model(tiny_model) -> DetectionModel:
    return DetectionModel(str(tiny_model), nc=6, verbose=False)


def part_names(model: nn.Module, factors: dict[str, float], new: Any = ()) -> dict[str, str | None]:
    """Entry by name of the parameter."""
    found = assign(model, factors, dict(new))
    return {name: found.entry[p] for name, p in model.named_parameters()}


# Which part -----------------------------------------------------------------------------------------------------------


def test_layers_are_divided_as_the_model_yaml_divides_them(model):
    found = part_names(model, {"backbone": 2.0, "neck": 3.0, "head": 4.0})
    for name, part in found.items():
        layer = int(name.split(".")[1])
        assert part == ("backbone" if layer < 10 else "neck" if layer < 22 else "head"), name
    assert set(part_names(model, {"neck": 3.0}).values()) == {"neck", None}


def test_precedence():
    """The longest pattern, then what is new, then the layers."""
    model = SimpleNamespace(yaml={"backbone": [0, 0]}, model=nn.Sequential(*[nn.Linear(2, 4) for _ in range(4)]))
    model.named_parameters = lambda: ((f"model.{name}", p) for name, p in model.model.named_parameters())
    factors = {"backbone": 2.0, "head": 3.0, "new": 4.0, "model.1*": 5.0, "model.[01].bias": 6.0, "*.3.weight": 1.0}
    new = {"model.0.bias": None, "model.0.weight": None, "model.1.weight": None, "model.2.weight": (0, 3)}
    new |= {"model.3.bias": (0, 1, 2, 3), "model.3.weight": (1,)}
    found = assign(model, factors, new)
    names = dict(model.named_parameters())
    assert {name: found.entry[p] for name, p in names.items()} == {
        "model.0.weight": "new",
        "model.0.bias": "model.[01].bias",
        "model.1.weight": "model.1*",
        "model.1.bias": "model.[01].bias",
        "model.2.weight": None,
        "model.2.bias": None,
        "model.3.weight": "*.3.weight",
        "model.3.bias": "new",  # all of its rows
    }
    assert {name: found.rows[p] for name, p in names.items() if p in found.rows} == {"model.2.weight": (0, 3)}
    assert not assign(model, {"head": 2.0}, new).rows  # nothing is asked for what is new


@pytest.mark.parametrize(
    ("factors", "says"),
    [
        ({"model.99*": 2.0}, r"'model.99\*' is no part .* Its parts are backbone, neck, head, new, .* model\.22\."),
        ({"backbones": 2.0}, r"'backbones' is no part .* Did you mean 'backbone'\?"),
        ({"Head": 2.0}, r"'Head' is no part .* Did you mean 'head'\?"),
    ],
)
def test_what_is_no_part_of_the_model_is_refused(model, factors, says):
    with pytest.raises(ValueError, match=f"lr_factors: {says}"):
        assign(model, factors, {})


def test_a_model_without_a_list_of_layers_has_patterns_and_what_is_new():
    model = nn.Linear(2, 2)
    assert set(assign(model, {"new": 2.0, "bias": 3.0}, {}).entry.values()) == {None, "bias"}
    with pytest.raises(ValueError, match=r"'head' is no part of this model, .* Its parts are new, and patterns"):
        assign(model, {"head": 2.0}, {})


@pytest.mark.parametrize(
    ("value", "error", "says"),
    [
        (
            {"head": 0},
            ValueError,
            "found 0, expected a finite number > 0. To keep layers as they are, use freeze=",
        ),
        ({"head": -1}, ValueError, "expected a finite number > 0"),
        ({"head": float("inf")}, ValueError, "expected a finite number > 0"),
        ({"new": float("nan")}, ValueError, "expected a finite number > 0"),
        ({"head": "auto"}, TypeError, "head: found 'auto', expected a number > 0."),
        ({"new": "much"}, TypeError, "new: found 'much', expected a number > 0, or auto."),
        ({"head": True}, TypeError, "expected a number"),
        ({1: 2}, TypeError, "found the part 1"),
        (3.0, TypeError, "must be a mapping of parts to numbers > 0, such as {'backbone': 0.1, 'new': 20}"),
    ],
)
def test_what_is_no_factor_is_refused(value, error, says):
    with pytest.raises(error) as caught:
        OPTIONS["lr_factors"].check(value)
    assert says in str(caught.value)


def test_factors_are_numbers():
    given = {"new": "AUTO", "head": "1e1", "neck": 2}  # YAML 1.1 reads 1e1 as text
    assert OPTIONS["lr_factors"].check(given) == {"new": "auto", "head": 10.0, "neck": 2.0}


# Groups ---------------------------------------------------------------------------------------------------------------


def groups_of(model: nn.Module, lrs: tuple[float, ...] = (0.1, 0.1, 0.3)) -> list[dict[str, Any]]:
    """Biases first, as in Ultralytics 8.3."""
    named = list(model.named_parameters())
    kinds = [[p for n, p in named if "bias" in n], [p for n, p in named if "bias" not in n and p.dim() > 1]]
    kinds.append([p for n, p in named if "bias" not in n and p.dim() == 1])
    return [{"params": params, "lr": lr, "own": i} for i, (params, lr) in enumerate(zip(kinds, lrs))]


def test_the_first_group_stays_first_and_new_parts_come_last(model):
    groups = groups_of(model)
    new = {name: None for name, p in model.named_parameters() if ".cv3." in name and p.dim() == 4}
    found = split(groups, assign(model, {"new": 20.0, "head": 2.0, "model.1.*": 0.5, "neck": 1.0}, new))
    shown = [(g["own"], round(g["lr"], 9)) for g in found.groups]
    others, head = [(0, 0.1), (1, 0.1), (2, 0.3)], [(0, 0.2), (1, 0.2), (2, 0.6)]
    assert shown == [*others, *head, (0, 0.05), (1, 0.05), (2, 0.15), (1, 2.0)]
    assert found.biases == [0, 3, 6] and not found.row_rates
    parameters = [p for g in found.groups for p in g["params"]]
    assert len(parameters) == len(set(parameters)) == len(list(model.parameters()))
    assert [len(g["params"]) for g in groups] == [len(g["params"]) for g in groups_of(model)]  # as they were


def test_a_factor_of_1_changes_no_group(model):
    groups = groups_of(model)
    found = split(groups, assign(model, {"new": 1.0, "head": 1.0}, {"model.22.cv3.0.2.bias": None}))
    assert found.groups == groups


def test_biases_stay_first_where_all_of_them_have_a_rate_of_their_own(model):
    """Ultralytics 8.3 starts the first group at warmup_bias_lr: it must not be one of weights."""
    found = split(groups_of(model), assign(model, {"*bias": 2.0}, {}))
    assert [(g["own"], len(g["params"]) > 0) for g in found.groups] == [(0, False), (1, True), (2, True), (0, True)]


def test_rows_take_their_rate_from_a_group_that_may_be_empty(model):
    new = {"model.22.cv3.0.2.weight": (1, 2), "model.22.cv3.0.2.bias": (1, 2)}
    found = split(groups_of(model), assign(model, {"new": 20.0, "head": 4.0}, new))
    assert [(g["own"], round(g["lr"], 9), len(g["params"]) > 0) for g in found.groups[-2:]] == [
        (0, 2.0, False),
        (1, 2.0, False),
    ]
    names = {p: name for name, p in model.named_parameters()}
    seen = {names[r.parameter]: (r.rows, r.group, r.reference, r.factor(found.groups)) for r in found.row_rates}
    assert seen == {
        "model.22.cv3.0.2.weight": ((1, 2), 4, 7, pytest.approx(5.0)),
        "model.22.cv3.0.2.bias": ((1, 2), 3, 6, pytest.approx(5.0)),
    }


def test_rows_of_factor_1_in_a_part_of_another_follow_lr0(model):
    found = split(groups_of(model), assign(model, {"new": 1.0, "head": 4.0}, {"model.22.cv3.0.2.bias": (3,)}))
    (rate,) = found.row_rates
    assert (rate.group, rate.reference, rate.factor(found.groups)) == (3, 0, 0.25)


# Warm-up of 8.3 -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("done", "touched"), [(0.0, True), (0.25, True), (1.0, False)])
def test_every_group_of_biases_starts_from_warmup_bias_lr(done, touched):
    start, schedule = 0.1, 0.8
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.01, 0.01, 0.05)])
    trainer = SimpleNamespace(args=SimpleNamespace(warmup_bias_lr=start), lf=lambda epoch: schedule, epoch=0)
    lr_factors.warm_up_biases(optimizer, trainer, [0, 2])
    for i, (group, initial) in enumerate(zip(optimizer.param_groups, (0.01, 0.01, 0.05))):
        group["initial_lr"], begin = initial, start if i == 0 else 0.0
        group["lr"] = begin + (initial * schedule - begin) * done
    optimizer.step()
    first, second, third = (group["lr"] for group in optimizer.param_groups)
    assert (first, second) == (start + (0.008 - start) * done, pytest.approx(0.008 * done))
    assert third == pytest.approx(start + (0.04 - start) * done if touched else 0.04)


def test_a_schedule_of_somebody_else_is_no_warm_up():
    optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.01, 0.01, 0.05)])
    trainer = SimpleNamespace(args=SimpleNamespace(warmup_bias_lr=0.1), lf=lambda epoch: 1.0, epoch=0)
    lr_factors.warm_up_biases(optimizer, trainer, [0, 2])
    for group in optimizer.param_groups:
        group["initial_lr"], group["lr"] = group["lr"], group["lr"] / 2
    optimizer.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.005, 0.005, 0.025]


# The trainers' optimizers ---------------------------------------------------------------------------------------------


def built(model: nn.Module, folder: Path, name: str, **arguments: Any) -> tuple[torch.optim.Optimizer, Any, str]:
    """What `build_optimizer` of a trainer gives, its arguments, and the log."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    args = get_cfg(overrides={"optimizer": name, "save_dir": str(folder), "resume": False, **arguments})
    finalize(args, {"optimizer": name, **arguments})
    trainer = DetectionTrainer.__new__(DetectionTrainer)
    trainer.args, trainer.save_dir, trainer.data = args, folder, {"nc": 6, "names": dict.fromkeys(range(6), "x")}
    trainer.model, trainer.callbacks = model, {}
    LOGGER.addHandler(handler)
    try:
        optimizer = trainer.build_optimizer(
            model, name=name, lr=args.lr0, momentum=args.momentum, decay=5e-4, iterations=100
        )
    finally:
        LOGGER.removeHandler(handler)
    return optimizer, args, "\n".join(lines)


OWN = ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSProp", "auto", *(["MuSGD"] if HAS_LABELS else [])]


@pytest.mark.parametrize("name", [*OWN, "torch.optim.Adagrad"])
def test_groups_of_every_optimizer(model, tmp_path, name):
    plain, before, log = built(model, tmp_path, name, **({"lr0": 0.02} if "." in name else {}))
    assert "by part" not in log and not hasattr(before, "lr_factors")
    factors = {"backbone": 0.1, "head": 2.0}
    optimizer, args, log = built(model, tmp_path, name, lr_factors=factors, **({"lr0": 0.02} if "." in name else {}))
    assert type(optimizer) is type(plain) and args.lr_factors == factors and args.lr0 == before.lr0
    parts = part_names(model, factors)
    names = {p: n for n, p in model.named_parameters()}
    kept = {p: {k: v for k, v in g.items() if k != "params"} for g in plain.param_groups for p in g["params"]}
    seen = set()
    for group in optimizer.param_groups:
        for p in group["params"]:
            factor = {"lr": kept[p]["lr"] * {**factors, None: 1.0}[parts[names[p]]]}
            assert {k: v for k, v in group.items() if k != "params"} == {**kept[p], **factor}
            seen.add(p)
    assert seen == set(model.parameters()) and len({g["lr"] for g in optimizer.param_groups}) >= 3
    first = optimizer.param_groups[0]
    assert first.get("param_group") == plain.param_groups[0].get("param_group")
    assert "others" in log and "backbone" in log


def test_the_table(model, tmp_path, monkeypatch):
    new = {"model.22.cv3.0.2.weight": (0, 1), "model.22.cv3.0.2.bias": (0, 1), "model.22.cv3.1.2.bias": None}
    made = Provenance(new, "loads", ClassRows((2, 3, 4, 5), (), (0, 1)))
    monkeypatch.setattr(build, "provenance_of", lambda _: made)
    _, args, log = built(model, tmp_path, "AdamW", lr_factors={"new": 20, "head": 1}, lr0=0.01)
    columns = [line.split("  ") for line in log.splitlines() if line.startswith("    ")]
    table = [[cell.strip() for cell in line if cell.strip()] for line in columns]
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    rows = 2 * (sizes["model.22.cv3.0.2.weight"] + 6) // 6
    head = sum(size for name, size in sizes.items() if name.startswith("model.22.")) - rows - 6
    others = sum(sizes.values()) - head - rows - 6
    count = sum(name.startswith("model.22.") for name in sizes)
    assert table == [
        ["part", "tensors", "parameters", "rate"],
        ["others", str(len(sizes) - count), f"{others:,}", "0.01"],
        ["head", str(count - 1), f"{head:,}", "0.01"],
        ["new", "1", "6", "0.2"],
        ["new (rows of a tensor)", "2", f"{rows:,}", "0.2"],
        ["new: what was not loaded; class rows: 2 new, 4 copied by name, 0 copied by position"],
    ]
    assert args.sophia_new_rows.startswith("{") and "cv3.0.2" in args.sophia_new_rows
    monkeypatch.setattr(build, "provenance_of", lambda _: Provenance({}, "tensors", None))
    _, args, log = built(model, tmp_path, "SGD", lr_factors={"new": "auto"}, lr0=0.001)
    assert args.lr_factors == {"new": 10.0} and "no load of weights was seen" in log
    assert ["new", "0", "0", "-"] in [line.split() for line in log.splitlines()]


# Arguments ------------------------------------------------------------------------------------------------------------


def final(**given: Any) -> Namespace:
    args = Namespace(**{**DEFAULT_CFG_DICT, "task": "detect", **given})
    finalize(args, given)
    return args


@pytest.mark.parametrize(
    ("old", "new"), [(3.0, {"head": 3.0}), (1.0, {}), ("auto", {"new": "auto"})], ids=["number", "one", "auto"]
)
@pytest.mark.parametrize("optimizer", ["SophiaG", "AdamW", "torch.optim.AdamW"])
def test_the_name_of_the_version_before(optimizer, old, new):
    with pytest.warns(FutureWarning, match=f"head_lr_factor={old} is now lr_factors="):
        args = final(optimizer=optimizer, head_lr_factor=old)
    assert args.lr_factors == new and not hasattr(args, "head_lr_factor")
    with pytest.raises(ValueError, match="which are the same setting; remove head_lr_factor"):
        final(optimizer=optimizer, head_lr_factor=old, lr_factors={"head": 2.0})


def test_a_recorded_value_of_the_version_before_gives_way_to_a_new_one(recwarn):
    recorded = {"sophia_typed": "detect-finetune:lr0", "head_lr_factor": 2.5, "lr0": 0.001}
    stale = Namespace(**{**DEFAULT_CFG_DICT, "task": "detect", **recorded, "optimizer": "SophiaG"})
    finalize(stale, {})
    assert stale.lr_factors == {"head": 2.5}
    given = {"optimizer": "SophiaG", "lr_factors": {"new": 5.0}}
    args = Namespace(**{**DEFAULT_CFG_DICT, "task": "detect", **recorded, **given})
    finalize(args, given)
    assert args.lr_factors == {"new": 5.0} and not [w for w in recwarn if w.category is FutureWarning]


@pytest.mark.parametrize("optimizer", ["SophiaG", "AdamW", "torch.optim.AdamW"])
def test_new_rows_are_recorded_for_a_resumed_run_alone(optimizer):
    record = {"optimizer": optimizer, "lr_factors": {"new": 2.0}, "sophia_new_rows": '{"new":[],"classes":null}'}
    assert getattr(final(**record), "sophia_new_rows", None) is None  # as of cfg=runs/.../args.yaml
    assert final(**record, resume="last.pt").sophia_new_rows == record["sophia_new_rows"]


def test_the_command_line_takes_a_mapping():
    from ultralytics.cfg import parse_key_value_pair

    key, value = parse_key_value_pair("lr_factors={'backbone': 0.1, 'model.22.cv3*': 3, 'new': 'auto'}")
    assert OPTIONS[key].check(value) == {"backbone": 0.1, "model.22.cv3*": 3.0, "new": "auto"}


# Trainings ------------------------------------------------------------------------------------------------------------


def stop_after(epoch: int) -> Any:
    def stop(trainer: Any) -> None:
        if trainer.epoch + 1 == epoch:
            raise KeyboardInterrupt

    return stop


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SophiaG", "AdamW", "torch.optim.AdamW"])
def test_a_resumed_run_has_the_rates_of_the_run_before(
    tiny_run, tiny_data, four_classes, tmp_path, optimizer, monkeypatch
):
    """From weights with four of the six classes: their class layers are new in part, or as a whole, by version."""
    seen: list[tuple[str, Any]] = []
    attach = build.attach

    def attached(optimizer, rates):
        seen.append(("rows", [(r.parameter.shape, r.rows, r.group, r.reference) for r in rates]))
        attach(optimizer, rates)

    monkeypatch.setattr(build, "attach", attached)
    run = {k: v for k, v in tiny_run.items() if k not in ("model", "name")}
    names = tmp_path / "names.yaml"
    content = yaml.safe_load(Path(tiny_data).read_text())
    content["names"] = dict(enumerate(("cat", "dog", "person", "tree", "c4", "c5")))
    names.write_text(yaml.safe_dump(content))
    weights, saved = tmp_path / "weights.pt", torch_load(four_classes, weights_only=False)
    for parameter in saved["model"].parameters():
        parameter.data *= 1.5  # no longer an initial value
    torch.save(saved, weights)
    given = {**run, "epochs": 3, "optimizer": optimizer, "warmup_epochs": 1, "warmup_bias_lr": 0.0}
    given |= {"lr_factors": {"backbone": 0.5, "new": 5.0}, "lr0": 0.001, "data": str(names)}

    def rates_of_epoch(trainer: Any) -> None:
        groups = trainer.optimizer.param_groups
        seen.append((trainer.epoch, [(len(g["params"]), g["initial_lr"], g["lr"]) for g in groups]))

    model = YOLO(weights)
    model.add_callback("on_train_epoch_end", rates_of_epoch)
    model.train(**given, name="whole")
    whole = seen[:]
    seen.clear()
    model = YOLO(weights)
    model.add_callback("on_train_epoch_end", rates_of_epoch)
    model.add_callback("on_fit_epoch_end", stop_after(2))
    with pytest.raises(KeyboardInterrupt):
        model.train(**given, name="cut")
    recorded = torch_load(model.trainer.last, weights_only=False)["train_args"]["sophia_new_rows"]
    assert seen == whole[:3]
    again = YOLO(model.trainer.last)
    again.add_callback("on_train_epoch_end", rates_of_epoch)
    again.train(resume=True)
    assert again.trainer.args.sophia_new_rows == recorded
    assert seen[3] == whole[0] and seen[4:] == whole[3:]
    assert len({initial for _, initial, _ in whole[-1][1]}) == 3
    rows = (4, 5) if HAS_LABELS else None  # 8.3 copies class layers of equal size only
    new = [f"model.22.cv3.{i}.2.{kind}" for i in range(3) for kind in ("weight", "bias")]
    assert decode(recorded).new == dict.fromkeys(new, rows)
    assert [rows for _, rows, *_ in whole[0][1]] == [(4, 5)] * (6 if HAS_LABELS else 0)


@pytest.mark.slow
def test_a_run_of_the_version_before_keeps_its_groups(tiny_run):
    """head_lr_factor=4 in the arguments of a checkpoint: groups of the body, then those of the head."""
    model = YOLO(tiny_run["model"])
    model.add_callback("on_fit_epoch_end", stop_after(1))
    run = {k: v for k, v in tiny_run.items() if k != "model"}
    with pytest.raises(KeyboardInterrupt):
        model.train(**run, optimizer="SophiaG", lr_factors={"head": 4.0}, lr0=0.001)
    saved = torch_load(model.trainer.last, weights_only=False)
    del saved["train_args"]["lr_factors"], saved["train_args"]["sophia_new_rows"]
    saved["train_args"]["head_lr_factor"] = 4.0
    head = {len(p.shape) for p in model.trainer.model.model[-1].parameters()}
    assert head and [g["initial_lr"] for g in saved["optimizer"]["param_groups"]] == [0.001] * 3 + [0.004] * 3
    torch.save(saved, model.trainer.last)
    again = YOLO(model.trainer.last)
    again.train(resume=True)
    assert type(again.trainer.optimizer) is SophiaG and again.trainer.args.lr_factors == {"head": 4.0}
    assert [g["initial_lr"] for g in again.trainer.optimizer.param_groups] == [0.001] * 3 + [0.004] * 3
