"""Facts about the data set: images, objects of each class, label files that are missing or dropped."""

from __future__ import annotations

from yolo_sophia.integration.doctor.case import Case
from yolo_sophia.integration.doctor.fact import Fact, plural, some
from yolo_sophia.integration.doctor.label_counts import LabelCounts

FEW_BOXES = 10
"""Objects of a class in the training images below which it is pointed out."""

MANY_BACKGROUNDS = 0.1
"""Share of images without objects above which it is pointed out: Ultralytics recommends up to 10 %."""


def data_facts(case: Case) -> list[Fact]:
    """Images, and what their labels hold."""
    facts = [_images(case)]
    if not case.images:
        return facts
    if not case.has_labels:
        reason = f"of task={case.start.task}" if case.names else "as the data YAML has no classes"
        return [*facts, Fact("labels", f"not counted, {reason}")]
    train = case.labels("train")
    facts.append(_few_boxes(case, train))
    if case.files["val"]:
        facts.append(_without_validation(case, train, case.labels("val")))
    if case.start.task != "classify":
        facts += [_backgrounds(train), _dropped(case)]
    return facts


def _images(case: Case) -> Fact:
    train, val = case.images, len(case.files["val"])
    values = {"train": train, "val": val, "found": case.found}
    if not train:
        figure = "unknown: they are not on this machine; nothing is downloaded"
        return Fact("images", figure, True, "data=... of images that are here", values)
    part = f" (fraction={case.arguments['fraction']} of {case.found:,})" if train < case.found else ""
    figure = f"{train:,} training{part}, {val:,} validation"
    if not val:
        return Fact("images", figure, True, "val: in the data YAML", values)
    return Fact("images", figure, values=values)


def _sampled(counts: LabelCounts) -> str:
    """Words for counts that come from a sample."""
    return f", in a sample of {counts.read:,} of {counts.images:,} label files" if counts.read < counts.images else ""


def _chosen(case: Case) -> list[int]:
    """Indices of the classes that are trained."""
    if case.arguments.get("single_cls"):
        return [0]
    classes = case.arguments.get("classes")
    return list(range(len(case.names))) if classes is None else list(classes if _is_list(classes) else [classes])


def _is_list(value: object) -> bool:
    return isinstance(value, (list, tuple))


def _name(case: Case, index: int) -> str:
    if case.arguments.get("single_cls"):
        return "all classes"
    return case.names[index] if index < len(case.names) else str(index)


def _few_boxes(case: Case, train: LabelCounts) -> Fact:
    noun = "image" if case.start.task == "classify" else "object"
    chosen = _chosen(case)
    boxes = {index: round(train.boxes[index] * train.scale) for index in chosen}
    few = {index: number for index, number in sorted(boxes.items(), key=lambda item: item[1]) if number < FEW_BOXES}
    values = {"few": {_name(case, k): n for k, n in few.items()}, "objects": sum(boxes.values()), "read": train.read}
    name, total = "classes with few labels", f"of {plural(sum(boxes.values()), noun)} in {plural(len(chosen), 'class')}"
    if not few:
        least = min(boxes, key=boxes.get)
        figure = f"none {total}; least: {_name(case, least)}, {boxes[least]:,}{_sampled(train)}"
        return Fact(name, figure, values=values)
    listed = some(f"{_name(case, index)} {number}" for index, number in few.items())
    kept = [index for index in chosen if index not in few]
    figure = f"{len(few)} with fewer than {FEW_BOXES} {noun}s: {listed}{_sampled(train)}"
    leave_out = f"label more, or classes={','.join(map(str, kept))}" if kept and len(kept) <= 20 else "label more"
    return Fact(name, figure, True, leave_out, values)


def _without_validation(case: Case, train: LabelCounts, val: LabelCounts) -> Fact:
    missing = [index for index in _chosen(case) if not val.boxes[index]]
    trained = [index for index in missing if train.boxes[index]]
    values = {"missing": [_name(case, index) for index in missing], "trained": [_name(case, k) for k in trained]}
    name = "classes not validated"
    if not missing:
        return Fact(name, f"none{_sampled(val)}", values=values)
    figure = f"{len(missing)} have no label in validation: {some(values['missing'])}{_sampled(val)}"
    return Fact(name, figure, True, "add images of them to val", values)


def _backgrounds(train: LabelCounts) -> Fact:
    share = train.backgrounds / train.read
    figure = f"{train.backgrounds:,} of {train.read:,} training images ({share:.1%})"
    look = share > MANY_BACKGROUNDS
    argument = "label them, or remove most" if look else ""
    return Fact("images without objects", figure, look, argument, {"backgrounds": train.backgrounds, "share": share})


def _dropped(case: Case) -> Fact:
    splits = {split: case.labels(split) for split in ("train", "val") if case.files[split]}
    corrupt = [reason for counts in splits.values() for reason in counts.corrupt]
    read = sum(counts.read for counts in splits.values())
    values = {"corrupt": len(corrupt), "reasons": corrupt[:20]}
    if not corrupt:
        return Fact("damaged label files", f"none of {read:,}", values=values)
    figure = f"{len(corrupt):,} of {read:,}: their images are dropped, or the training fails"
    return Fact("damaged label files", figure, True, f"correct {corrupt[0]}", values)
