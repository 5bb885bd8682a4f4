"""COCO metrics: annotations from labels, scores known by hand, and the study's driver."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest

from yolo_sophia.compare.plan import parse
from yolo_sophia.runs import coco_metrics as coco_runs
from yolo_sophia.runs.coco import METRICS, Image, evaluate, evaluator, from_file, from_labels, image_id
from yolo_sophia.runs.results import RunResult
from yolo_sophia.runs.run import make_run

ROOT = Path(__file__).parent.parent
EVALUATORS = {"faster-coco-eval": "faster_coco_eval", "pycocotools": "pycocotools"}


def driver():
    spec = importlib.util.spec_from_file_location("compare_coco", ROOT / "scripts" / "compare_coco.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- annotations


def image(folder: Path, name: str, boxes: tuple = (), height: int = 100, width: int = 200) -> Image:
    return Image(folder / name, height, width, boxes)


@pytest.mark.parametrize(
    ("name", "number"), [("000000000139.jpg", 139), ("7.png", 7), ("cat.jpg", "cat"), ("a.b.jpg", "a.b")]
)
def test_image_id(name, number):
    assert image_id(Path("folder") / name) == number


def test_annotations_from_labels(tmp_path):
    images = [
        image(tmp_path, "000012.jpg", ((1, 0.5, 0.5, 0.25, 0.5), (0, 0.125, 0.25, 0.0625, 0.125))),
        image(tmp_path, "cat.jpg", (), 480, 640),
    ]
    assert from_labels(images, ["a", "b"]) == {
        "images": [
            {"id": 12, "file_name": "000012.jpg", "height": 100, "width": 200},
            {"id": "cat", "file_name": "cat.jpg", "height": 480, "width": 640},
        ],
        "annotations": [
            # 200 x 100 px: the centre at (100, 50), 50 wide, 50 high; then the centre at (25, 25), 12.5 on each side
            {"id": 1, "image_id": 12, "category_id": 2, "bbox": [75, 25, 50, 50], "area": 2500, "iscrowd": 0},
            {"id": 2, "image_id": 12, "category_id": 1, "bbox": [18.75, 18.75, 12.5, 12.5], "area": 156.25}
            | {"iscrowd": 0},
        ],
        "categories": [{"id": 1, "name": "a"}, {"id": 2, "name": "b"}],
    }


def test_category_ids_are_those_of_the_predictions(tmp_path):
    boxes = (1, 0.5, 0.5, 0.1, 0.1), (0, 0.5, 0.5, 0.1, 0.1)
    made = from_labels([image(tmp_path, "1.jpg", boxes)], ["person", "stop sign"], [1, 13])
    assert [box["category_id"] for box in made["annotations"]] == [13, 1]
    assert [category["id"] for category in made["categories"]] == [1, 13]


def test_images_with_one_id_are_refused(tmp_path):
    with pytest.raises(ValueError, match="have the same id 7"):
        from_labels([image(tmp_path, "7.jpg"), image(tmp_path, "007.jpg")], ["a"])


def coco_file(folder: Path, **changed) -> Path:
    content = {
        "images": [{"id": 501, "file_name": "val/cat.jpg"}, {"id": 502, "file_name": "000007.jpg"}]
        + [{"id": 503, "file_name": "other.jpg"}],
        "categories": [{"id": 90, "name": "b"}, {"id": 4, "name": "a"}, {"id": 5, "name": "unused"}],
        "annotations": [
            {"id": 0, "image_id": 502, "category_id": 90, "bbox": [1, 2, 30, 40], "area": 700.5, "iscrowd": 1},
            {"id": 1, "image_id": 503, "category_id": 4, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0},
            {"id": 2, "image_id": 501, "category_id": 4, "bbox": [5, 6, 7, 8]},
        ],
        **changed,
    }
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return path


def test_annotations_from_a_file_take_the_predictions_ids(tmp_path):
    images = [image(tmp_path, "cat.jpg"), image(tmp_path, "000007.jpg")]
    made = from_file(coco_file(tmp_path), images, ["a", "b"])
    assert [entry["id"] for entry in made["images"]] == ["cat", 7]
    assert made["annotations"] == [
        {"id": 1, "image_id": 7, "category_id": 2, "bbox": [1, 2, 30, 40], "area": 700.5, "iscrowd": 1},
        {"id": 2, "image_id": "cat", "category_id": 1, "bbox": [5, 6, 7, 8], "area": 56, "iscrowd": 0},
    ]


@pytest.mark.parametrize(
    ("changed", "names", "message"),
    [
        ({"images": [{"id": 1, "file_name": "x.jpg"}]}, ["a", "b"], "lacks 1 of 1 images, cat.jpg among them"),
        ({}, ["b", "c"], "has boxes of 'a', which is not a class"),
        ({"annotations": 3, "categories": [{}]}, ["a", "b"], "is no COCO annotations file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, changed, names, message):
    with pytest.raises(ValueError, match=message):
        from_file(coco_file(tmp_path, **changed), [image(tmp_path, "cat.jpg")], names)


# --- scores


def hide(monkeypatch, module: str) -> None:
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.fixture(params=["faster-coco-eval", pytest.param("pycocotools", marks=pytest.mark.extras)])
def package(request, monkeypatch) -> str:
    """One of the evaluators, the other hidden."""
    for name, module in EVALUATORS.items():
        if name == request.param:
            pytest.importorskip(module, reason=f"{name} is not installed")
        else:
            hide(monkeypatch, module)
    assert evaluator()[0] == request.param
    return request.param


def truth(*boxes: tuple, images=(1, 2), categories=(1, 2)) -> dict:
    return {
        "images": [{"id": name, "file_name": f"{name}.jpg", "height": 400, "width": 400} for name in images],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": list(b), "area": b[2] * b[3], "iscrowd": 0}
            for n, (i, c, b) in enumerate(boxes, 1)
        ],
        "categories": [{"id": c, "name": f"c{c}"} for c in categories],
    }


def found(*boxes: tuple) -> list[dict]:
    return [{"image_id": i, "category_id": c, "bbox": list(b), "score": s} for i, c, b, s in boxes]


SMALL, MEDIUM, LARGE = (10, 10, 20, 20), (100, 100, 50, 50), (200, 200, 100, 100)


def test_perfect_predictions_score_one(package):
    scores = evaluate(truth((1, 1, SMALL), (1, 1, MEDIUM), (2, 2, MEDIUM)),
                      found((1, 1, SMALL, 0.9), (1, 1, MEDIUM, 0.8), (2, 2, MEDIUM, 0.7)))  # fmt: skip
    assert list(scores) == list(METRICS)
    assert {name: value for name, value in scores.items() if name != "APl"} == pytest.approx(
        dict.fromkeys([name for name in METRICS if name != "APl"], 1.0)
    )
    assert scores["APl"] is None, "there is no large box: not measured, which is not 0"


@pytest.mark.parametrize(
    ("boxes", "predictions", "expected"),
    [
        # 20 px to the right: IoU = 80 / 120 = .667 passes .50, .55, .60 and .65 of the ten thresholds
        ([(1, 1, LARGE)], [(1, 1, (220, 200, 100, 100), 0.9)], {"AP": 0.4, "AP50": 1, "AP75": 0, "AR100": 0.4}),
        # one of two found: precision 1 at the recalls 0, .01 ... .50, which are 51 of 101
        ([(1, 1, LARGE), (2, 1, LARGE)], [(1, 1, LARGE, 0.9)], {"AP": 51 / 101, "AP50": 51 / 101, "AR100": 0.5}),
        # a false positive on an image without boxes goes first: precision 1/2 at every recall
        ([(1, 1, LARGE)], [(2, 1, LARGE, 0.9), (1, 1, LARGE, 0.8)], {"AP": 0.5, "AP75": 0.5, "AR100": 1}),
        # the second class is never predicted: the mean of 1 and 0
        ([(1, 1, LARGE), (1, 2, LARGE)], [(1, 1, LARGE, 0.9)], {"AP": 0.5, "AR100": 0.5}),
        # a class without a box does not count, whatever is predicted for it
        ([(1, 1, LARGE)], [(1, 1, LARGE, 0.9), (1, 2, LARGE, 0.9)], {"AP": 1, "AR100": 1}),
        ([(1, 1, LARGE)], [], {"AP": 0, "AP50": 0, "APl": 0, "APs": None, "AR100": 0}),
        ([], [(1, 1, LARGE, 0.9)], dict.fromkeys(METRICS)),
    ],
    ids=["shifted", "missed", "false positive", "class missed", "class absent", "nothing predicted", "nothing there"],
)
def test_scores_known_by_hand(package, boxes, predictions, expected):
    scores = evaluate(truth(*boxes), found(*predictions))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)


def test_ids_may_be_numbers_and_names(package, tmp_path):
    path = tmp_path / "predictions.json"
    path.write_text(json.dumps(found(("cat", 2, LARGE, 0.9), (7, 1, LARGE, 0.9))))
    assert evaluate(truth((7, 1, LARGE), ("cat", 2, LARGE), images=(7, "cat")), path)["AP"] == pytest.approx(1)


def test_evaluators_are_silent(package, capfd):
    evaluate(truth((1, 1, LARGE)), found((1, 1, LARGE, 0.9)))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("prediction", "message"),
    [
        ((9, 1, LARGE, 0.9), "1 of 2 predictions have image_ids that the annotations lack, such as 9"),
        ((1, 80, LARGE, 0.9), "1 of 2 predictions have category_ids that the annotations lack, such as 80"),
        ((1, 1, (), 0.9), "expected a bbox of 4 numbers"),
    ],
)
def test_predictions_of_something_else_are_refused(prediction, message):
    with pytest.raises(ValueError, match=message):
        evaluate(truth((1, 1, LARGE)), found((1, 1, LARGE, 0.9), prediction))


def test_without_an_evaluator_the_error_says_what_to_install(monkeypatch):
    for module in EVALUATORS.values():
        hide(monkeypatch, module)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "yolo-sophia\[compare\]"'):
        evaluate(truth((1, 1, LARGE)), [])


# --- runs


def result(out: Path, data: str, seed: int = 0, weights: Path | None = None, finished: bool = True, **arguments):
    run = make_run("AdamW", data, seed, 1.0, {"model": "yolov8n.yaml", **arguments}, False)
    folder = out / "runs" / run.key / "train" / "weights"
    folder.mkdir(parents=True)
    if weights:
        shutil.copy(weights, folder / "last.pt")
    return RunResult(run, (), {"key": run.key} if finished else None, None)


def test_every_finished_run_is_measured_once(tmp_path, monkeypatch):
    measured, told, metrics = [], [], {"AP": 0.5, "APl": None}
    monkeypatch.setattr(coco_runs, "_measure", lambda *args: measured.append(args) or {"metrics": metrics})
    weights = tmp_path / "last.pt"
    weights.touch()
    done, bare, cut = (result(tmp_path, "d.yaml", 0, weights), result(tmp_path, "d.yaml", 1),
                       result(tmp_path, "d.yaml", 2, weights, finished=False))  # fmt: skip
    for _ in range(2):
        got = coco_runs.coco_metrics(tmp_path, [done, bare, cut], tell=told.append)
        assert got == {done.run.key: {"AP": 0.5}}, "what was not measured is left out"
    assert [args[0].name for args in measured] == ["last.pt"]
    assert any(bare.run.key in line and "save=False" in line for line in told)
    record = tmp_path / "runs" / done.run.key / "coco.json"
    assert json.loads(record.read_text())["metrics"] == metrics
    record.write_text(record.read_text()[:20])
    coco_runs.coco_metrics(tmp_path, [done])
    assert len(measured) == 2, "a record that was cut off is written anew"
    coco_runs.coco_metrics(tmp_path, [done], annotations=tmp_path / "instances.json")
    assert len(measured) == 3, "other annotations give other metrics"


@pytest.fixture(scope="session")
def tiny_weights(tiny_model, tmp_path_factory) -> Path:
    """Untrained weights of the tiny model, as a checkpoint."""
    import torch
    from ultralytics import YOLO

    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save({"model": YOLO(str(tiny_model)).model}, path)
    return path


@pytest.mark.compat
def test_predict_names_what_was_validated(tiny_weights, tiny_data, tmp_path):
    from yolo_sophia.integration.predictions import predict

    made = predict(tiny_weights, str(tiny_data), tmp_path, {"imgsz": 64, "batch": 4, "device": "cpu", "conf": 1e-9})
    assert len(made.images) == 8
    for path, height, width, boxes in made.images:
        assert path.is_file() and path.parent.name == "val" and (height, width) == (64, 64)
        labels = path.parents[2] / "labels" / "val" / f"{path.stem}.txt"
        rows = labels.read_text().splitlines()
        assert boxes == [pytest.approx(tuple(map(float, row.split())), abs=1e-6) for row in rows]
    assert len(made.names) == 6
    assert made.annotations is None, "only COCO's own images have COCO's own annotations"
    predictions = json.loads(made.path.read_text())
    assert {p["category_id"] for p in predictions} <= set(made.categories)
    assert {p["image_id"] for p in predictions} <= {image_id(path) for path, *_ in made.images}


@pytest.mark.parametrize("argument", [{"single_cls": True}, {"classes": [0]}])
def test_predict_refuses_other_classes_than_those_labelled(tiny_weights, tmp_path, argument):
    from yolo_sophia.integration.predictions import predict

    with pytest.raises(ValueError, match=f"found {next(iter(argument))}="):
        predict(tiny_weights, "no.yaml", tmp_path, argument)


@pytest.mark.slow
@pytest.mark.compat
def test_equal_to_ultralytics_own_map(shared_data, tmp_path):
    """Not the same definition (see `coco.py`), so not the same figure; the difference stays under .005."""
    pytest.importorskip("faster_coco_eval")
    root = tmp_path / "coco_open"  # a copy: Ultralytics writes a cache beside the labels
    for kind in ("images", "labels"):
        (root / kind).mkdir(parents=True)
        (root / kind / "val").mkdir()
        for file in (shared_data / "coco_open" / kind / "val").iterdir():
            shutil.copyfile(file, root / kind / "val" / file.name)
    (root / "images" / "train").mkdir()
    shutil.copyfile(shared_data / "coco_open" / "data.yaml", root / "data.yaml")
    weights = shared_data / "weights" / "yolov8n-dequantised.pt"
    run = result(tmp_path, str(root / "data.yaml"), weights=weights, imgsz=320, batch=16, device="cpu")
    (scores,) = coco_runs.coco_metrics(tmp_path, [run]).values()
    record = json.loads((tmp_path / "runs" / run.run.key / "coco.json").read_text())
    assert record["images"] == 164 and record["boxes"] == 1541
    assert record["ultralytics"]["mAP50-95"] > 0.24, "the weights are not those of the README"
    assert scores["AP"] == pytest.approx(record["ultralytics"]["mAP50-95"], abs=0.005)
    assert scores["AP50"] == pytest.approx(record["ultralytics"]["mAP50"], abs=0.005)
    assert scores["APs"] < scores["APm"] < scores["APl"]


# --- plans and the driver


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "configs" / "compare").glob("*.yaml")))
def test_plans_are_valid(name):
    plan = parse([f"plan={ROOT / 'configs' / 'compare' / name}", "data=my.yaml", "model=my.pt"])
    assert {"SophiaG", "AdamW", "SGD", "auto"} <= {arm.name for arm in plan.arms}
    assert plan.reference == "AdamW" and len(plan.seeds) >= 2


def test_the_study_by_default():
    plan, annotations = driver().read([])
    assert plan.data == ("coco.yaml",) and annotations is None
    assert [arm.name for arm in plan.arms] == ["SophiaG", "AdamW", "SGD", "MuSGD", "auto"]
    assert plan.common["imgsz"] == 640 and plan.epochs == 100 and len(plan.seeds) == 3
    assert plan.horizons == (1.0, 0.8, 0.65, 0.5)


def test_keys_of_the_driver(tiny_data):
    words = ["--data", str(tiny_data), "small=True", "--arms", "SophiaG,AdamW", "--subset=4", "imgsz=96", "seeds=1"]
    plan, _ = driver().read(words)
    assert plan.data == (str(tiny_data),) and plan.common["imgsz"] == 96 and plan.epochs == 3
    assert [arm.name for arm in plan.arms] == ["SophiaG", "AdamW"]
    assert plan.common["fraction"] == 4 / 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arms=SophiaG,Lion"], "Lion not in the plan, expected some of SophiaG"),
        (["arms=SophiaG,SGD"], "lacks the reference AdamW"),
        (["subset=17"], "subset=17: expected a number of images, 1 to 16"),
        (["subset=half"], "expected a number of images"),
        (["subset=8", "fraction=0.5"], "no `fraction` beside it"),
        (["small=yes"], "expected True or False"),
        (["annotations=nowhere.json"], "no such file"),
    ],
)
def test_the_driver_refuses(tiny_data, words, message):
    with pytest.raises(ValueError, match=message):
        driver().read([f"data={tiny_data}", *words])


@pytest.mark.slow
def test_the_study_end_to_end(tiny_data, tiny_model, tmp_path, capsys):
    pytest.importorskip("faster_coco_eval")
    words = ["small=True", f"data={tiny_data}", f"model={tiny_model}", "arms=SophiaG,AdamW", "seeds=1", "epochs=1"]
    words += ["imgsz=64", "batch=4", "nbs=4", "device=cpu", f"out={tmp_path / 'out'}"]
    main = driver().main
    assert main(words) == 0
    records = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("runs/*/coco.json")}
    assert len(records) == 2
    assert "AR100" in (tmp_path / "out" / "report.md").read_text()
    assert "COCO metrics of last.pt" in capsys.readouterr().err
    assert main(words) == 0
    assert "COCO metrics of last.pt" not in capsys.readouterr().err
    assert records == {path: path.stat().st_mtime_ns for path in records}
