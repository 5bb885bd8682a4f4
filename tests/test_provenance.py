"""Which parameters of a run are new: over all forms in which a run can take its weights."""

from __future__ import annotations

import os
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from ultralytics import YOLO, __version__
from ultralytics.nn import tasks

from yolo_sophia.integration import provenance
from yolo_sophia.integration.modules import class_layers
from yolo_sophia.integration.provenance import (
    ClassRows,
    Provenance,
    decode,
    encode,
    provenance_for_workers,
    provenance_of,
)

pytestmark = pytest.mark.compat
IS_84 = tuple(map(int, __version__.split(".")[:2])) >= (8, 4)
NAMES = ("cat", "dog", "Person", "tree", "house", "car")


def trained(model: nn.Module, names=NAMES) -> nn.Module:
    """The model as after a training: its statistics and all its weights have moved."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
    model.names = dict(enumerate(names))
    return model


@pytest.fixture(scope="module")
def weights(tiny_model, tmp_path_factory) -> Path:
    """A checkpoint of a trained model that knows six classes; loaded again it has no record."""
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save({"model": trained(YOLO(tiny_model).model)}, path)
    return path


def loaded(path: Path) -> nn.Module:
    return torch.load(path, weights_only=False)["model"]


def test_a_built_model_is_new_everywhere(tiny_model):
    model = YOLO(tiny_model).model
    found = provenance_of(model)
    assert found.new == dict.fromkeys(name for name, _ in model.named_parameters())
    assert (found.origin, found.class_rows) == ("loads", ClassRows((), (), tuple(range(6))))


def test_the_text_of_a_run(tiny_model):
    found = Provenance({"a.weight": (0, 1, 2, 5), "a.bias": (0, 1, 2, 5), "b": None, "c": (7,)}, "loads", None)
    assert encode(found) == '{"new":[["0-2,5","a.weight a.bias"],[null,"b"],["7","c"]],"classes":null}'
    assert decode(encode(found)) == Provenance(found.new, "recorded", None)
    rows = ClassRows((0,), (), (1, 2))
    assert decode(encode(Provenance({}, "loads", rows))) == Provenance({}, "recorded", rows)
    with pytest.raises(ValueError, match="expected JSON"):
        decode("[]")


# Modules --------------------------------------------------------------------------------------------------------------


def target_of(names: tuple[str, ...], layout: Path) -> nn.Module:
    """A built model that has the names of a data set before it loads, as 8.4's trainers make it."""
    model = tasks.DetectionModel(str(layout), nc=len(names), verbose=False)
    model.names = dict(enumerate(names))
    return model


def check_rows(model: nn.Module, rows: ClassRows) -> Provenance:
    """The class rows are as expected, and nothing else is new but what belongs to a class branch of another width."""
    found = provenance_of(model)
    assert (found.class_rows, found.origin) == (rows, "loads")
    everything = len(rows.new) == len(rows.new + rows.by_name + rows.by_position)
    for path, layer in class_layers(model).items():
        for name in (f"{path}.{own}" for own, _ in layer.named_parameters()):
            assert found.new.get(name, ()) == (None if everything else rows.new)
    return found


WIDE = (*NAMES, *(f"kind {i}" for i in range(24)))  # 30 classes: the class branch is 30 channels wide, not 16
LOADS = [  # names of the data; rows in 8.4: by name, by position, new; rows in 8.3
    (NAMES, ("012345", "", ""), ("012345", "", "")),
    (tuple("uvwxyz"), ("", "012345", ""), ("", "012345", "")),  # no name matches: by position
    (("v", "Dog", "w", "cat", "x", "y"), ("13", "", "0245"), ("1", "02345", "")),
    (("Dog", "cat", "v"), ("01", "", "2"), ("", "", "012")),
    (tuple("uvw"), ("", "", "012"), ("", "", "012")),
]


@pytest.mark.parametrize(("names", "newest", "oldest"), LOADS)
def test_class_rows_of_a_load(names, newest, oldest, weights, tiny_model):
    model = target_of(names, tiny_model)
    model.load(loaded(weights), verbose=False)
    rows = ClassRows(*(tuple(map(int, part)) for part in (newest if IS_84 else oldest)))
    found = check_rows(model, rows)
    layers = {f"{path}.{own}" for path, layer in class_layers(model).items() for own in ("weight", "bias")}
    assert found.new.keys() <= layers  # all else came along


def test_a_class_branch_of_another_width(weights, tiny_model):
    """8.4 rebuilds it at the width of the source, so that its hidden layers come along; 8.3 leaves it random."""
    model = target_of(WIDE, tiny_model)
    model.load(loaded(weights), verbose=False)
    new = tuple(range(6, 30)) if IS_84 else tuple(range(30))
    found = check_rows(model, ClassRows(tuple(range(6)) if IS_84 else (), (), new))
    there = {name: p.shape for name, p in loaded(weights).named_parameters()}
    random = {name for name, p in model.named_parameters() if p.shape != there[name]}
    assert {name for name, rows in found.new.items() if rows is None} == (set() if IS_84 else random)


def test_a_chain_of_loads(weights, tiny_model):
    """A row that is copied from a random row is new; one that is copied from a copy has the origin of that copy."""
    middle = target_of((*NAMES[:2], "new", "newer"), tiny_model)
    middle.load(loaded(weights), verbose=False)
    model = target_of((*NAMES[:2], "new", "newer"), tiny_model)
    model.load(middle, verbose=False)
    check_rows(model, ClassRows((0, 1), (), (2, 3)) if IS_84 else ClassRows((), (), (0, 1, 2, 3)))
    assert provenance_of(model) == provenance_of(middle)
    again = target_of(tuple("wxyz"), tiny_model)
    again.load(middle, verbose=False)  # by position: what was random stays new
    check_rows(again, ClassRows((), (0, 1), (2, 3)) if IS_84 else ClassRows((), (), (0, 1, 2, 3)))


def test_a_load_of_random_weights(tiny_model, weights):
    model = target_of(NAMES, tiny_model)
    model.load(YOLO(tiny_model).model, verbose=False)
    assert set(provenance_of(model).new.values()) == {None}
    model.load(loaded(weights), verbose=False)  # and then of trained ones
    assert provenance_of(model) == Provenance({}, "loads", ClassRows(tuple(range(6)), (), ()))
    model.load(YOLO(tiny_model).model, verbose=False)  # and back
    assert set(provenance_of(model).new.values()) == {None}


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_input_channels_that_are_copied_in_part(channels, weights, tiny_model):
    model = tasks.DetectionModel(str(tiny_model), ch=channels, nc=6, verbose=False)
    model.load(loaded(weights), verbose=False)
    assert provenance_of(model).new == ({} if IS_84 else {"model.0.conv.weight": None})


def test_a_checkpoint_with_an_average(weights, tiny_model):
    """8.4 loads the EMA, 8.3 the model."""
    ema = loaded(weights)
    check = {"ema": ema, "model": YOLO(tiny_model).model}
    model = target_of(NAMES, tiny_model)
    model.load(check, verbose=False)
    assert (not provenance_of(model).new) == IS_84


def test_layers_that_are_reset_or_replaced_after_the_load(weights, tiny_model):
    model = target_of(NAMES, tiny_model)
    model.load(loaded(weights), verbose=False)
    for module in (*model.model[0].modules(), *model.model[22].cv3[1].modules()):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.model[22].cv3[0][2] = nn.Conv2d(16, 7, 1)
    found = {name for name in provenance_of(model).new}
    assert {"model.0.conv.weight", "model.0.bn.weight", "model.22.cv3.0.2.weight"} <= found
    assert all(name.startswith(("model.0.", "model.22.cv3.0.2.", "model.22.cv3.1.")) for name in found)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert set(provenance_of(model).new.values()) == {None}
    assert len(provenance_of(model).new) == len(list(model.parameters()))


# Where no load was seen -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("names", [("Dog", "cat", "v"), tuple("uvw"), WIDE])
def test_what_the_tensors_show(names, half, weights, tiny_model):
    """A copy has no record. Its biases and statistics show the same, except whether a name or a position led to it."""
    model = target_of(names, tiny_model)
    model.load(loaded(weights), verbose=False)
    seen, copy = provenance_of(model), deepcopy(model)
    found = provenance_of(copy.half() if half else copy)
    assert found.origin == "tensors"
    assert found.new == seen.new
    assert found.class_rows == (seen.class_rows if not seen.class_rows.by_name else None)


# Other heads ----------------------------------------------------------------------------------------------------------

HEADS = {  # layout of the head over two levels of eight channels, and the model
    "segment": ("SegmentationModel", "Segment", ["nc", 4, 8]),
    "pose": ("PoseModel", "Pose", ["nc", [4, 3]]),
    "obb": ("OBBModel", "OBB", ["nc", 1]),
    "classify": ("ClassificationModel", "Classify", ["nc"]),
    "v10": ("DetectionModel", "v10Detect", ["nc"]),
    "rtdetr": ("RTDETRDetectionModel", "RTDETRDecoder", ["nc", 16, 20, 4, 2, 2]),
}


def model_of(kind: str, names: tuple[str, ...], two_heads: bool = False) -> nn.Module:
    model, head, arguments = HEADS[kind]
    layout = {"nc": len(names), "backbone": [[-1, 1, "Conv", [8, 3, 2]]] * 4, "kpt_shape": [4, 3]}
    layout["head"] = [[-1 if kind == "classify" else [2, 3], 1, head + "26" * two_heads, list(arguments)]]
    layout |= {"reg_max": 1, "end2end": True} if two_heads else {}
    made = getattr(tasks, model)(layout, verbose=False)
    made.names = dict(enumerate(names))
    return made


ALL_HEADS = [(kind, False) for kind in HEADS] + [(kind, True) for kind in ("segment", "pose", "obb")] * IS_84


@pytest.mark.parametrize(("kind", "two_heads"), ALL_HEADS)
def test_every_head(kind, two_heads):
    """Fewer classes with one known name: its row comes along in 8.4, except in a classifier."""
    source = trained(model_of(kind, NAMES, two_heads))
    model = model_of(kind, ("v", "Dog", "w"), two_heads)
    model.load(source, verbose=False)
    found, layers = provenance_of(model), class_layers(model)
    assert len(layers) == {"classify": 1, "v10": 4, "rtdetr": 3}.get(kind, 4 if two_heads else 2)
    by_name = (1,) if IS_84 and kind != "classify" else ()
    assert found.class_rows == ClassRows(by_name, (), tuple(k for k in range(3) if k not in by_name))
    expected = {f"{path}.{own}" for path in layers for own in ("weight", "bias")}
    expected |= {"model.4.denoising_class_embed.weight"} if kind == "rtdetr" else set()
    expected |= (
        {f"model.4.proto.semseg.2.{own}" for own in ("weight", "bias")}
        if (kind, two_heads) == ("segment", True)
        else set()
    )
    assert set(found.new) == expected
    assert set(found.new.values()) == {(0, 2) if by_name else None}
    equal = model_of(kind, tuple("uvwxyz"), two_heads)
    equal.load(source, verbose=False)
    assert provenance_of(equal) == Provenance({}, "loads", ClassRows((), tuple(range(6)), ()))


# Runs -----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """The training has built its optimizer."""


@pytest.fixture
def run(tiny_run, tmp_path):
    """Start a training of a model on data with these class names, and take the provenance before its first step."""

    def start(make, names, look=lambda: None, **arguments) -> Provenance:
        content = yaml.safe_load(Path(tiny_run["data"]).read_text()) | {"names": dict(enumerate(names))}
        (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
        found = []

        def stop(trainer):
            found.append(provenance_of(trainer.model))
            look()
            raise Stop

        model = make()
        model.add_callback("on_pretrain_routine_end", stop)
        arguments = tiny_run | {"data": str(tmp_path / "data.yaml"), "exist_ok": True} | arguments
        del arguments["model"]
        with pytest.raises(Stop):
            model.train(**arguments)
        return found[0]

    return start


OTHER = ("Dog", "cat", *(f"kind {i}" for i in range(4)))
FORMS = {  # model and arguments; whether it has the weights in 8.4 and in 8.3
    "weights": (lambda w, y: YOLO(w), {}, True, True),
    "yaml": (lambda w, y: YOLO(y), {}, False, False),
    "yaml and load": (lambda w, y: YOLO(y).load(w), {}, True, True),
    "yaml and load of a module": (lambda w, y: YOLO(y).load(YOLO(w).model), {}, True, False),
    "yaml and pretrained": (lambda w, y: YOLO(y), {"pretrained": "{w}"}, True, False),
    "pretrained=False": (lambda w, y: YOLO(w), {"pretrained": False}, False, True),
    "reset weights": (lambda w, y: YOLO(w).reset_weights(), {}, False, False),
    "partial freeze": (lambda w, y: YOLO(w), {"freeze": 10}, True, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_run(form, run, weights, tiny_model):
    make, arguments, *trained = FORMS[form]
    arguments = {key: str(weights) if value == "{w}" else value for key, value in arguments.items()}
    found = run(lambda: make(str(weights), str(tiny_model)), OTHER, **arguments)
    if not trained[0 if IS_84 else 1]:
        assert set(found.new.values()) == {None}
        assert found.class_rows == ClassRows((), (), tuple(range(6)))
    elif IS_84:
        assert set(found.new.values()) == {(2, 3, 4, 5)}
        assert found.class_rows == ClassRows((0, 1), (), (2, 3, 4, 5))
    else:
        assert found.new == {}
        assert found.class_rows == ClassRows((), tuple(range(6)), ())
    assert found.origin == "loads"


def test_a_checkpoint_of_ones_own(run, weights, tiny_model, tmp_path):
    """All rows come along, those that were new in the first run too; an untrained row of a saved model stays new."""
    model = target_of(OTHER, tiny_model)
    model.load(loaded(weights), verbose=False)
    torch.save({"model": model}, tmp_path / "saved.pt")
    rows = run(lambda: YOLO(tmp_path / "saved.pt"), OTHER).class_rows
    assert rows == (ClassRows((0, 1), (), (2, 3, 4, 5)) if IS_84 else ClassRows(tuple(range(6)), (), ()))
    torch.save({"model": trained(model, OTHER)}, tmp_path / "tuned.pt")
    found = run(lambda: YOLO(tmp_path / "tuned.pt"), OTHER)
    assert found == Provenance({}, "loads", ClassRows(tuple(range(6)), (), ()))


def test_one_class_for_all(run, weights):
    found = run(lambda: YOLO(weights), NAMES, single_cls=True)
    assert found.class_rows == (
        ClassRows((), (), (0,)) if IS_84 else ClassRows(tuple(range(6)), (), ())
    )  # 8.3 keeps six


def test_weights_by_name_alone(run, weights, monkeypatch, tmp_path):
    """They are found in the folder of the settings, and the name of a model is not what decides."""
    from ultralytics.utils import SETTINGS

    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path / "weights"))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "known.pt").write_bytes(weights.read_bytes())
    assert run(lambda: YOLO("known.pt"), NAMES) == Provenance({}, "loads", ClassRows(tuple(range(6)), (), ()))


def test_workers_of_several_gpus(run, weights, tiny_model):
    """They get the model without its record, and come to the same answer; no other process gets it."""
    model = target_of((*OTHER[:3], "car"), tiny_model)
    model.load(loaded(weights), verbose=False)
    unpickled = deepcopy(model)
    with provenance_for_workers(model):
        assert provenance_of(unpickled) == provenance_of(model)
        built = YOLO(tiny_model).model  # what is built or loaded in the worker itself has a record of its own
        assert set(provenance_of(built).new.values()) == {None}
        other = loaded(weights)
        other.load(built, verbose=False)
        assert set(provenance_of(other).new.values()) == {None}
    assert provenance_of(unpickled).origin == "tensors"

    def environment():
        found.append(decode(os.environ[provenance.VARIABLE]))

    found = []
    rows = run(lambda: YOLO(tiny_model).load(weights), OTHER, environment, optimizer="SophiaG")
    assert found == [replace(rows, origin="recorded")] == [decode(encode(rows))]
    assert provenance.VARIABLE not in os.environ


def test_real_weights(shared_data):
    """Every row of COCO's 80 classes is told from every other."""
    source = shared_data / "weights" / "yolov8n-dequantised.pt"
    names = (*reversed(loaded(source).names.values()), "helmet", "vest")
    model = tasks.DetectionModel("yolov8n.yaml", nc=82, verbose=False)
    model.names = dict(enumerate(names))
    model.load(loaded(source), verbose=False)
    found = provenance_of(model)
    if IS_84:
        assert found.class_rows == ClassRows(tuple(range(80)), (), (80, 81))
        assert set(found.new.values()) == {(80, 81)}
        assert provenance_of(deepcopy(model)).new == found.new
    else:
        assert found.class_rows == ClassRows((), (), tuple(range(82)))
