"""Facts about what a training starts from: the model, and where its class rows come from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from yolo_sophia.integration.doctor.case import Case
from yolo_sophia.integration.doctor.fact import Fact, plural, some
from yolo_sophia.integration.modules import trained_part


def start_facts(case: Case) -> list[Fact]:
    """The model and its class rows."""
    facts = [_model(case)]
    if case.provenance is not None and case.provenance.class_rows is not None:
        facts.append(_class_rows(case))
    return facts


def _model(case: Case) -> Fact:
    if case.start.model is None:
        argument = "model=... of a file that is here" if case.start.file is None else ""
        return Fact("model", case.start.reason, True, argument, {"file": case.start.file})
    new, parameters = case.provenance.new, dict(trained_part(case.start.model).named_parameters())
    total = sum(p.numel() for p in parameters.values())
    random = 0
    for name, rows in new.items():
        size = parameters[name].numel()
        random += size if rows is None else size * len(rows) // len(parameters[name])
    values = {"file": case.start.file, "parameters": total, "new": random, "task": case.start.task}
    share = "all" if random == total else f"{random:,} of" if random else "none of"
    figure = f"{Path(case.start.file).name}, {case.start.task}: {share} {total:,} parameters are random"
    return Fact("model", figure, values=values)


def _class_rows(case: Case) -> Fact:
    rows = case.provenance.class_rows
    names = case.start.trainer.data["names"]
    values = {kind: [names[k] for k in getattr(rows, kind)] for kind in ("by_name", "by_position", "new")}
    figure = f"{len(rows.new)} new, {len(rows.by_name)} copied by name, {len(rows.by_position)} by position"
    if rows.by_position:
        figure += f": {some(values['by_position'], 3)} {'has the row' if len(rows.by_position) == 1 else 'have rows'} "
        figure += "of other classes"
        return Fact("class rows", figure, True, "names: of the weights in the data YAML, if they are the same", values)
    near = near_names((names[k] for k in rows.new), case.start.weight_names)
    if near and not case.arguments.get("single_cls"):
        figure += f"; {plural(len(near), 'name')} almost as in the weights"
        return Fact("class rows", figure, True, f"in names: {some(f'{a} -> {b}' for a, b in near.items())}", values)
    return Fact("class rows", figure, values=values)


def near_names(names: Iterable[str], known: Iterable[str]) -> dict[str, str]:
    """Names that differ from one of the weights' by spaces, signs or a plural only, with that name.

    Ultralytics copies the row of a class by its exact name, in any case.
    """
    plain = {_plain(name): name for name in known}
    near = {name: plain[_plain(name)] for name in names if _plain(name) in plain}
    return {name: theirs for name, theirs in near.items() if name.lower() != theirs.lower()}


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower()).removesuffix("s")
