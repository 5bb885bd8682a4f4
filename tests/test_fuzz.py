"""Random and adversarial input by hypothesis: it is taken as it reads, or refused in one clear message.

`pytest` tries 100 inputs for each test, always the same; `make test-long` tries 1,500 (profiles in conftest.py).
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import event, example, given
from hypothesis import strategies as st

from yolo_sophia import cli
from yolo_sophia.compare import plan as comparison
from yolo_sophia.integration import external_optimizer as dotted
from yolo_sophia.options import ALL
from yolo_sophia.presets import load_preset
from yolo_sophia.tune import plan as tuning

pytestmark = pytest.mark.slow

EVIL = [
    "", " ", "=", "-", "--", "~", ".", "..", "../../x", "..\\..\\x", "/etc/passwd", "/dev/stdin", "C:\\x", "//host/x",
    "CON", "nul.txt", "com1", "a.", "a" * 500, "\u0000", "a\u0000b", "\n", "a\nb: c", "\u001b[31m", "\u007f",
    "\u00e9", "\u202e", "\U0001f986", "\udcff", "<script>alert(1)</script>", "'", '"', "`id`", "$(id)", "%s%n",
    "{0}", "{x}", "[", "{", "{}", "[]", "[[[[", "{a: 1, a: 2}", "&a [*a]", "*a",
    "!!python/object/apply:os.system [id]", "!!int x", "!!binary x", "a: b", "#", "---", "? x", "|", "@", "<<", "nan",
    "inf", "-inf", "1e999", "-1", "0", "1", "2", "1.5", "1e-3", "0x10", "1_0", "1:30", "9" * 500, "1e400", "-0.0",
    "True", "false", "None", "null", "yes", "auto", "2001-99-99", "__import__('os').system('id')", "1,1", "a,b", ",",
    "0,1", "SophiaG", "sofiag", "SGD", "AdamW", "torch.optim.SGD", "torch.optim.Optimizer", "torch.optim.LBFGS",
    "os.path", "a.b", ".a", "__main__.x", "..x.y", "gnb", "hutchinson", "kernel", "grid", "none", "hyperband",
    "https://example.com/x.yaml", "ul://a/b",
]  # fmt: skip
text = st.one_of(st.sampled_from(EVIL), st.text(max_size=20))
number = st.one_of(st.integers(-3, 100), st.integers(), st.floats(), st.sampled_from([0, 1, 0.5, 10**320, 2**70]))
plain = st.one_of(st.none(), st.booleans(), number, text)
value = st.recursive(
    plain, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3), max_leaves=8
)


def keys(*known: str) -> st.SearchStrategy[str]:
    """Known names above all, and others that nobody knows."""
    return st.one_of(*[st.sampled_from(sorted(known))] * 4, text)


KNOWN = {*ALL, "sophia", "optimizer", "optimizer_args", "batch", "epochs", "nbs", "fraction", "time",
         "imgsz", "seed", "data", "pretrained", "device", "val", "single_cls", "classes", "sophia_typed"}  # fmt: skip


class Accepted(BaseException):
    """The input was taken: from here on there would be training."""


def accept(*_: Any, **__: Any) -> None:
    raise Accepted


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """An empty current directory, and nothing that trains or measures."""
    folder = tmp_path_factory.mktemp("here")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("yolo_sophia.compare.command.train", accept)
        patch.setattr("yolo_sophia.tune.study.SharedStudy", accept)
        patch.setattr("yolo_sophia.integration.measure.measure_step", lambda *_: (0.1, 1000, 0.1))
        yield folder


def run(words: list[str]) -> tuple[int, str]:
    """Run `yolo-sophia` in this process; returns its exit code (-1: it would train now) and what it said of errors."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main(words)
        except Accepted:
            code = -1
        except SystemExit as ended:  # argparse
            code = int(ended.code or 0)
    assert "Traceback" not in err.getvalue()
    return code, err.getvalue()


def check_command(words: list[str], folder: Path) -> None:
    code, said = run(words)
    assert code in {-1, 0, 2}, words
    assert bool(said) == (code == 2), (words, said)
    if code == 2:
        event("refused")
        assert said.startswith("yolo-sophia: ") and 30 < len(said) < 2100, (words, said)
        assert said.endswith("\n") and said[:-1].isprintable(), (words, said)  # one line
    assert not list(folder.iterdir()), words


def pairs(*known: str) -> st.SearchStrategy[str]:
    return st.one_of(st.tuples(keys(*known), text | number.map(str) | value.map(repr)).map("=".join), text)


BASE = {"data": "d.yaml", "model": "m.yaml", "optimizers": "SophiaG,AdamW"}
PLAN = {**BASE, "optimizers": ["SophiaG", "AdamW"]}
TUNE = {"data": "d.yaml", "model": "m.yaml", "optimizer": "SophiaG"}


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    command = draw(
        st.sampled_from(["compare", "compare", "tune", "tune", "presets", "path", "status", "", None]) | text
    )
    if command in {"compare", "tune"}:
        base, own = (BASE, comparison.KEYS) if command == "compare" else (TUNE, tuning.KEYS)
        kept = draw(st.sampled_from([list(base), list(base), list(base), []]))
        rest = draw(st.lists(pairs(*own, *KNOWN), max_size=4))
        return [command, *(f"{key}={base[key]}" for key in kept), *rest]
    rest = draw(st.lists(text | st.sampled_from(["detect-scratch", "--help", "--version", "-h"]), max_size=3))
    return [*([] if command is None else [command]), *rest]


@given(command_lines())
@example(["presets", "\x1b[31m.yaml\n"])
@example(["presets", "", "a\nb"])
def test_command_line(place, words):
    check_command(words, place)


@given(st.sampled_from(["compare", "tune"]), st.text(), st.binary(max_size=60))
@example("compare", "&a [*a]", b"")
@example("tune", "[" * 2000, b"\xff")
def test_plan_files_of_any_content(place, tmp_path_factory, command, content, raw):
    path = tmp_path_factory.getbasetemp() / "plan-file.yaml"
    path.write_bytes(content.encode("utf-8", "surrogatepass") + raw)
    check_command([command, f"plan={path}"], place)


USUAL: dict[str, list[Any]] = {  # values that are taken, by key
    "epochs": [1, 5], "lr0": [0.01, 1e-4], "imgsz": [64], "batch": [8], "seeds": [1, [0, 5]], "workers": [2],
    "out": ["here"], "target": [0.3], "horizons": [[1.0, 0.5]], "tune_trials": [2], "bn_recalibrate": [True],
    "reference": ["SophiaG"], "trials": [4],
    "sampler": ["grid", "cmaes"], "pruner": ["none", "hyperband"], "study": ["mine"],
    "cut_runs": ["restart"], "data": ["d.yaml", ["a/data.yaml", "b/data.yaml"]],
    "model": ["yolov8n.pt"], "devices": [[0, 1]],
    "engine": ["ray"],
}  # fmt: skip


def plan_of(base: dict[str, Any], own: Any, more: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A plan with up to one arbitrary key, some usual ones, and up to one missing."""
    changed = st.dictionaries(keys(*own, *KNOWN, *more), value, max_size=1)
    usual = {key: st.sampled_from(values) for key, values in USUAL.items() if key in own or key in KNOWN}
    settled = st.dictionaries(st.sampled_from(sorted(usual)), st.none(), max_size=3).flatmap(
        lambda chosen: st.fixed_dictionaries({key: usual[key] for key in chosen})
    )
    structured = st.just({}) | st.fixed_dictionaries({}, optional=more)
    taken = st.sampled_from([*base, None, None, None, None])
    return st.builds(
        lambda a, b, c, out: {k: v for k, v in {**base, **b, **c, **a}.items() if k != out},
        changed,
        settled,
        structured,
        taken,
    )


arm_names = st.one_of(st.sampled_from(["mine", "SophiaG", "SGD", "torch.optim.SGD"]), text)
arms = st.dictionaries(arm_names, st.none() | st.dictionaries(keys(*KNOWN), value, max_size=3), max_size=3)
dimensions = st.one_of(
    value,
    st.lists(number | st.sampled_from(["log", "int"]), min_size=2, max_size=4),
    st.fixed_dictionaries({"choices": value}),
)
spaces = st.dictionaries(keys(*KNOWN), dimensions, max_size=3)


def check_plan(make: Any, content: dict[str, Any]) -> Any:
    """The plan, or None where it was refused as it should be."""
    try:
        made = make(content)
        event("taken")
        return made
    except ValueError as error:
        assert type(error) is ValueError and len(str(error)) > 15, (content, error)
        at = traceback.extract_tb(error.__traceback__)[-1]
        assert "yolo_sophia" in at.filename and at.line.startswith("raise "), (content, error, at)
        return None


def check_name(name: str) -> None:
    """One folder's name on every system, inside the folder where it is put."""
    assert 0 < len(name) <= 200 and not set(name) & set('/\\:*?"<>|') and name.isprintable(), name
    assert name.strip(". ") and not name.endswith((".", " ")), name
    stem = name.split(".")[0].upper()
    assert stem not in {"CON", "PRN", "AUX", "NUL"} and not (stem[:-1] in {"COM", "LPT"} and stem[-1:].isdigit()), name


@given(plan_of(PLAN, comparison.KEYS, {"arms": arms, "optimizers": st.lists(arm_names, max_size=3)}))
@example({**PLAN, "data": ["x/con.y.yaml"]})
@example({**PLAN, "data": ["a" * 400 + ".yaml"]})
@example({**PLAN, "arms": {"CON": {"optimizer": "SGD"}}})
def test_plans(place, content):
    made = check_plan(comparison.parse, content)
    if made is not None:
        assert json.dumps([dict(run.arguments) for run in comparison.runs(made)])  # as the order of a run is written
        for run in comparison.runs(made):
            check_name(run.key)
    assert not list(place.iterdir())


@given(plan_of(TUNE, tuning.KEYS, {"space": spaces}))
@example({**TUNE, "study": "../../x"})
@example({**TUNE, "study": "NUL"})
@example({**TUNE, "epochs": 1})
def test_tune_plans(place, content):
    made = check_plan(tuning.parse, content)
    if made is not None:
        check_name(made.study)
        assert tuning.parse(yaml.safe_load(tuning.plan_yaml(made))) == made
    assert not list(place.iterdir())


# Presets --------------------------------------------------------------------------------------------------------------

entries = st.fixed_dictionaries({"value": value, "origin": st.just("a test") | value}) | value
presets = st.fixed_dictionaries(
    {
        "description": text,
        "status": st.just("provisional") | value,
        "settings": st.dictionaries(keys(*ALL), entries, max_size=4) | value,
    },
    optional={"more": value},
)


@given(
    presets.map(lambda content: yaml.safe_dump(content, allow_unicode=True).encode("utf-8", "replace"))
    | st.binary()
    | st.text().map(str.encode)
)
@example(b"description: &a [*a]\nstatus: x\nsettings: {}")
@example(b"description: a\nstatus: provisional\nstatus: studied\nsettings: {}")
@example(b"description: 2001-99-99\nstatus: provisional\nsettings: {}")
def test_presets(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mine.yaml"
    path.write_bytes(content)
    try:
        preset = load_preset(str(path))
    except ValueError as error:
        assert type(error) is ValueError and str(error).startswith(f"Preset {path}"), (content, error)
        return
    event("taken")
    assert preset.settings.keys() == preset.origins.keys()
    for key, own in preset.settings.items():
        assert ALL[key].check(own) == own and (not isinstance(own, float) or math.isfinite(own))


@given(text)
def test_names_of_presets(name):
    if name.lower() in {"detect-scratch", "detect-finetune", "detect-short", "published"}:
        return
    with pytest.raises(ValueError, match=r"sophia=.*(no such file|is not a preset)") as error:
        load_preset(name)
    assert type(error.value) is ValueError


# Dotted paths ---------------------------------------------------------------------------------------------------------

HOSTILE = {
    "raises": "raise RuntimeError('at import')",
    "leaves": "import sys; sys.exit(3)",
    "broken": "def f(:",
    "dynamic": "def __getattr__(name): raise KeyError(name)",
    "own": "class Metaclass(type):\n def __subclasscheck__(*_): raise RuntimeError\nclass X(metaclass=Metaclass): pass",
    "odd": "import torch\nclass X(torch.optim.SGD):\n def __init__(self, params, lr=1): raise KeyError('no')",
    "abstract": "import torch\nclass X(torch.optim.Optimizer):\n def __init__(self, params, lr=1): pass",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "hostile").mkdir()
    (folder / "hostile" / "__init__.py").touch()
    for name, content in HOSTILE.items():
        (folder / "hostile" / f"{name}.py").write_text(content)
    sys.path.insert(0, str(folder))
    yield
    sys.path.remove(str(folder))


parts = st.one_of(
    st.sampled_from(["torch", "optim", "SGD", "hostile", "X", *HOSTILE, "os", "path", "class", "__main__", ""]), text
)
paths = st.one_of(
    st.lists(parts, min_size=1, max_size=4).map(".".join),
    st.tuples(
        st.just("torch.optim"),
        st.sampled_from(["Adagrad", "SGD", "LBFGS", "Optimizer", "Rprop", "ASGD", "nope", "SparseAdam"]),
    ).map(".".join),
    st.tuples(st.just("hostile"), st.sampled_from(sorted(HOSTILE)), st.just("X")).map(".".join),
)


@given(
    paths,
    st.none()
    | st.dictionaries(keys("betas", "momentum", "weight_decay", "eps", "lr", "params", "self"), value, max_size=3)
    | value,
)
@example("torch.optim.SGD", {"momentum": -1})
@example("torch.optim.SGD", {"momentum": "x"})
def test_dotted_paths(hostile, path, given_arguments):
    content = {**PLAN, "optimizers": [], "arms": {"mine": {"optimizer": path, "optimizer_args": given_arguments}}}
    check_plan(comparison.parse, content)


# Plain yolo -----------------------------------------------------------------------------------------------------------

OURS = str(Path(dotted.__file__).parents[1])
PASSING = {
    str(Path(dotted.__file__).with_name(name)) for name in ("patches.py", "patch_set.py", "explicit.py")
}  # in every traceback


@pytest.fixture(scope="module")
def yolo(place, tiny_model, tiny_data) -> Iterator[Any]:
    """Run `yolo train` with more words in this process, up to where it would make its directory."""
    import ultralytics.cfg
    import ultralytics.engine.trainer
    import ultralytics.utils

    def train(words: list[str]) -> Exception | None:
        patch.setattr(ultralytics.cfg, "ARGV", ["yolo", "train", f"model={tiny_model}", f"data={tiny_data}", *words])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            try:
                ultralytics.cfg.entrypoint()
            except Accepted:
                return None
            except Exception as error:
                return error
        raise AssertionError("yolo train has not come to its directory, and has not said why")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ultralytics.engine.trainer, "get_save_dir", accept)
        patch.setattr(ultralytics.utils.LOGGER, "disabled", True)
        yield train


MINE = ("optimizer", "sophia", "sophia_typed", "optimizer_args", *ALL)
yolo_pairs = st.tuples(
    st.sampled_from(MINE) | st.sampled_from(["epochs", "batch", "nbs", "fraction", "time", "single_cls", "rhoo"]),
    text | number.map(str) | value.map(repr),
).map("=".join)


@pytest.mark.compat
@given(st.sampled_from(["SophiaG", "sophiah", "torch.optim.SGD", "AdamW", "auto"]), st.lists(yolo_pairs, max_size=3))
@example("SophiaG", ["nbs=0", "batch=-1"])
@example("SophiaG", ["batch=" + "9" * 320])
@example("SophiaG", ["sophia=" + "a" * 500 + ".yaml"])
@example("SophiaG", ["sophia_typed=x:y", "rho=2"])
@example("torch.optim.SGD", ["optimizer_args={'momentum': -1}"])
def test_plain_yolo(yolo, place, optimizer, words):
    error = yolo([f"optimizer={optimizer}", *words])
    event("taken" if error is None else "refused")
    if error is not None:
        assert isinstance(error, (SyntaxError, TypeError, ValueError, NotImplementedError, FileNotFoundError)), repr(
            error
        )
        assert len(str(error)) > 15
        frames = traceback.extract_tb(error.__traceback__)
        if any(
            frame.filename.startswith(OURS) and frame.filename not in PASSING for frame in frames
        ):  # an error of ours
            assert frames[-1].line.startswith("raise "), frames[-1]
            assert frames[-1].filename.startswith(OURS) and not error.__cause__, frames[-1]
    assert not list(place.iterdir())
