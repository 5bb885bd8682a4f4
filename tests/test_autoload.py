"""How plain `yolo` reaches the package: entry points, interpreter start, orders of install and import, misfits.

Functions named `child_*` run in fresh interpreters (fixture `fresh`), where torch is there and Ultralytics is not.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from yolo_sophia import switch
from yolo_sophia.integration.contract import CONTRACT, MODULES, find

pytestmark = [pytest.mark.slow, pytest.mark.compat]

ROOT = Path(__file__).parent.parent
PTH = ROOT / "yolo_sophia" / "autoload.pth"
YOLO = Path(sys.executable).with_name("yolo")

TRAIN = """
import json, sys
from ultralytics import YOLO
arguments = json.loads(sys.argv[1])
YOLO(arguments.pop("model")).train(**arguments)
"""


# Fresh interpreters ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(fresh):
    """What Ultralytics looks like where this package has done nothing."""
    return fresh(child_order, "import")["after"]


def autoload_now() -> None:
    """Do what the interpreter does with the .pth line at its start."""
    os.environ["YOLO_SOPHIA_AUTOLOAD"] = "1"
    exec(PTH.read_text())


def import_targets() -> tuple[types.ModuleType, ...]:
    import ultralytics.cfg
    import ultralytics.engine.model
    import ultralytics.engine.trainer
    import ultralytics.engine.tuner
    import ultralytics.nn.tasks
    import ultralytics.utils

    return ultralytics.utils, ultralytics.cfg, ultralytics.engine.trainer, ultralytics.engine.tuner


# Entry points ---------------------------------------------------------------------------------------------------------


def check_run(run: dict[str, Any], done: Any) -> None:
    import yaml

    folder = Path(run["project"]) / run["name"]
    args = yaml.safe_load((folder / "args.yaml").read_text())
    assert args["optimizer"] == "SophiaG"
    assert args["sophia_typed"] == "detect-scratch:"
    header, *rows = (folder / "results.csv").read_text().splitlines()
    assert "sophia/clip_fraction" in header
    assert len(rows) == run["epochs"]
    assert "SophiaG(lr=" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "program",
    [
        pytest.param([YOLO], marks=pytest.mark.skipif(not YOLO.exists(), reason="no console script here"), id="yolo"),
        pytest.param([sys.executable, "-m", "ultralytics.cfg.__init__"], id="tune-child"),
    ],
)
def test_plain_command_trains(program, tiny_run, tmp_path, python):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    run = {**tiny_run, "epochs": 1}
    command = [*map(str, program), "train", *(f"{k}={v}" for k, v in run.items()), "optimizer=sophiag"]
    # By way of the fixture: its interpreter only starts the program.
    start = "import os, sys; os.execv(sys.argv[1], sys.argv[1:])"
    check_run(run, python("-c", start, *command, cwd=elsewhere))


def test_python_trains_without_an_import(tiny_run, tmp_path, python):
    run = {**tiny_run, "epochs": 1}
    check_run(run, python("-c", TRAIN, json.dumps({**run, "optimizer": "SOPHIAG"}), cwd=tmp_path))


def test_worker_script_of_multi_gpu_training(tiny_run, tmp_path, python, monkeypatch):
    import ultralytics.utils.dist
    import yaml
    from ultralytics.models.yolo.detect import DetectionTrainer

    pytest.importorskip("cloudpickle")
    monkeypatch.setattr(ultralytics.utils.dist, "USER_CONFIG_DIR", tmp_path)
    run = {**tiny_run, "epochs": 1}
    parent = DetectionTrainer(overrides={**run, "optimizer": "SophiaG", "sophia": "published", "rho": 0.3, "lr0": 0.01})
    args_yaml = Path(run["project"]) / run["name"] / "args.yaml"
    recorded = yaml.safe_load(args_yaml.read_text())
    assert (recorded["rho"], recorded["lr0"], recorded["beta2"]) == (0.3, 0.01, 0.99)
    assert recorded["sophia_typed"] == ":lr0,rho"  # decided by the workers, which know the model
    args_yaml.unlink()

    script = ultralytics.utils.dist.generate_ddp_file(parent)
    done = python(script, cwd=tmp_path)

    found = yaml.safe_load(args_yaml.read_text())
    assert found["sophia_typed"] == "published:lr0,rho"
    decided = {key for key in recorded if found[key] != recorded[key]} - {"sophia_typed"}
    assert decided == {"weight_decay", "momentum", "warmup_bias_lr"}  # of the preset, and Ultralytics' own
    said = done.stdout + done.stderr
    assert "rho=0.3 (explicit)" in said
    assert "beta2=0.99 (preset)" in said
    assert "lr0=0.01 (explicit)" in said
    assert (args_yaml.parent / "weights" / "last.pt").exists()


def child_cli(*commands: str) -> list[str]:
    from ultralytics.cfg import entrypoint

    said = []
    for command in commands:
        try:
            entrypoint(command)
        except Exception as error:
            said.append(re.sub(r"\x1b\[\d+m", "", f"{type(error).__name__}: {error}"))  # without colours
        else:
            said.append("no error")
    return said


def test_switched_off(tiny_run, fresh):
    train = "yolo train " + " ".join(f"{k}={v}" for k, v in tiny_run.items())
    unknown, *keys = fresh(
        child_cli, f"{train} optimizer=SophiaG", f"{train} rho=1", f"{train} hessian_interval=5 optimizer=SGD"
    )
    # Some versions name None for what they do not know.
    assert re.match(r"NotImplementedError: Optimizer '(SophiaG|None)' not found in list of available optim", unknown)
    assert keys[0].startswith("SyntaxError: 'rho' is not a valid YOLO argument")
    assert keys[1].startswith("SyntaxError: 'hessian_interval' is not a valid YOLO argument")


# Interpreter start ----------------------------------------------------------------------------------------------------


def test_start_imports_next_to_nothing(python):
    code = "import json, sys; print(json.dumps(sorted(sys.modules)))"
    on = set(json.loads(python("-c", code).stdout))
    off = set(json.loads(python("-c", code, YOLO_SOPHIA_AUTOLOAD="0").stdout))
    assert {"yolo_sophia", "yolo_sophia.autoload"} <= on, "is the package installed, its .pth line with it?"
    assert on == off
    assert not {"torch", "ultralytics", "yaml", "typing", "yolo_sophia.integration"} & on


def test_line_imports_three_small_modules(python):
    code = (
        f"import os, sys; sys.path.append({str(ROOT)!r}); before = set(sys.modules)\n"
        f"exec({PTH.read_text()!r})\n"
        "print(*sorted(set(sys.modules) - before)); print(*sys.meta_path)"
    )
    modules, finders = python("-S", "-I", "-c", code).stdout.splitlines()
    assert modules.split() == ["yolo_sophia", "yolo_sophia.autoload", "yolo_sophia.switch"]
    assert finders.count("_PostImportFinder") == 1


@pytest.mark.parametrize("left", [[], ["yolo_sophia/"], ["yolo_sophia/__init__.py"], ["yolo_sophia.py"]], ids=str)
def test_line_is_silent_when_the_package_is_gone(left, python, tmp_path):
    (tmp_path / "yolo_sophia_autoload.pth").write_text(PTH.read_text())
    for name in left:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    # The way the interpreter reads .pth files, without the site-packages of this environment.
    code = (
        "import site, sys; before = list(sys.meta_path); site.addsitedir(sys.argv[1]); print(before == sys.meta_path)"
    )
    done = python("-S", "-I", "-c", code, tmp_path)
    assert (done.stdout, done.stderr) == ("True\n", "")


@pytest.mark.parametrize("way", ["-c", "script", "-m"])
def test_line_takes_nothing_from_the_current_directory(way, python, tmp_path):
    trap = "raise SystemExit('taken from the current directory: ' + __name__)\n"
    for package in ("yolo_sophia", "ultralytics", "torch"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(trap)
    (tmp_path / "yolo_sophia" / "autoload.py").write_text(trap)
    (tmp_path / "yaml.py").write_text(trap)
    code = "import yolo_sophia.autoload as a; print(a.__file__, a.installed())\n"
    (tmp_path / "script.py").write_text(code)
    arguments = {"-c": ["-c", code], "script": ["script.py"], "-m": ["-m", "script"]}[way]
    found = python(*arguments, cwd=tmp_path).stdout.split()
    assert found == [str(ROOT / "yolo_sophia" / "autoload.py"), "True"]


# Orders of install, import and uninstall ------------------------------------------------------------------------------


RELOADED = ("engine.trainer", "engine.tuner", "engine.model", "nn.tasks", "cfg", "utils")
ORDERS = [
    "autoload import",
    "autoload autoload import",
    "autoload import install",
    "autoload install import",
    "autoload utils install import",
    "autoload uninstall import",
    "autoload import uninstall",
    "autoload import uninstall install",
    "autoload utils uninstall import",
    "autoload utils uninstall install import",
    "install import",
    "install install import",
    "install utils uninstall import install",
    "install uninstall import",
    "utils install import",
    "utils install uninstall import",
    "import install",
    "import install install",
    "import install uninstall",
    "import install uninstall uninstall",
    "import install uninstall install",
    "import uninstall",
    "import uninstall install",
    "uninstall import",
    "uninstall install import",
    *(f"autoload import reload:{name}" for name in RELOADED),
    *(f"import install reload:{name} install" for name in RELOADED[:2]),
    *(f"install import unhook reload:{name} install" for name in RELOADED),
    "autoload import forget import",
    "install import forget install import",
    "install import unhook forget import install",
    "autoload import forget import uninstall",
    "autoload import forget import forget import uninstall install",
]


def everything() -> dict[str, Any]:
    """Every attribute of Ultralytics' loaded modules and of their classes, by its dotted name."""
    found: dict[str, Any] = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ultralytics":
            for key, value in list(vars(module).items()):
                found[f"{name}.{key}"] = value
                if isinstance(value, type) and value.__module__ == name:
                    found |= {f"{name}.{key}.{k}": v for k, v in vars(value).items()}
    return found


def looks(value: Any) -> str:
    """What can be compared between two interpreters: code for functions, content for sets and plain mappings."""
    if isinstance(value, types.FunctionType):
        code = value.__code__
        return f"{code.co_qualname if sys.version_info >= (3, 11) else code.co_name} {code.co_filename}"
    if isinstance(value, (set, frozenset)):
        return f"{type(value)} {sorted(map(repr, value))}"
    if isinstance(value, dict):
        return str([(k, v if isinstance(v, (str, int, float)) else type(v)) for k, v in value.items()])
    return str(type(value))


def child_order(order: str) -> dict[str, Any]:
    """Take the steps of an order, then uninstall, and report on both states."""
    from yolo_sophia import autoload

    assert not any(name.partition(".")[0] == "ultralytics" for name in sys.modules)
    originals = None
    for step in order.split():
        if step == "import":
            import_targets()
            if not autoload.installed():
                originals = everything()
        elif step == "utils":
            import ultralytics.utils  # noqa: F401
        elif step == "autoload":
            autoload_now()
        elif step.startswith("reload:"):
            importlib.reload(sys.modules[f"ultralytics.{step.partition(':')[2]}"])
            originals = None
        elif step == "forget":  # as a notebook does before it imports another version
            for name in [name for name in sys.modules if name.partition(".")[0] == "ultralytics"]:
                del sys.modules[name]
            originals = None
        elif step == "unhook":  # a reload that the hooks do not see
            sys.meta_path[:] = [f for f in sys.meta_path if f is not autoload._PostImportFinder]
        else:
            getattr(autoload, step)()
    utils, cfg, _, tuner = import_targets()
    functions = [find(symbol.place) for symbol in CONTRACT if symbol.use == "patched"]
    report: dict[str, Any] = {
        "installed": autoload.installed(),
        "wrapped": [hasattr(f, "__wrapped__") for f in functions],
        "wrapped twice": any(hasattr(getattr(f, "__wrapped__", None), "__wrapped__") for f in functions),
        "keys": [
            "rho" in utils.DEFAULT_CFG_DICT,
            hasattr(utils.DEFAULT_CFG, "hessian_estimator"),
            "clip_fraction" in cfg.CFG_FRACTION_KEYS,
            "beta2" in cfg.CFG_FRACTION_KEYS,
            "hessian_interval" in cfg.CFG_INT_KEYS,
            "hessian_interval" in getattr(tuner, "CFG_INT_KEYS", cfg.CFG_INT_KEYS),
        ],
    }
    autoload.uninstall()
    report["hooks left"] = autoload.installed()
    now = everything()
    report["after"] = {name: looks(value) for name, value in now.items() if not name.endswith("__dict__")}
    report["after"]["DEFAULT_CFG"] = looks(vars(utils.DEFAULT_CFG))
    if originals is not None:
        names = originals.keys() | now.keys()
        report["changed"] = [name for name in names if originals.get(name) is not now.get(name)]
    return report


@pytest.mark.parametrize("order", ORDERS)
def test_order(order, fresh, plain):
    report = fresh(child_order, order)
    switches = [step for step in order.split() if step in {"autoload", "install", "uninstall"}]
    on = switches[-1] != "uninstall"
    assert report["installed"] == on
    assert set(report["wrapped"]) == {on} and len(report["wrapped"]) >= 10
    assert not report["wrapped twice"]
    assert report["keys"] == [on] * 6
    # uninstall() follows: nothing of ours may be left, and the very objects of before are back.
    assert not report["hooks left"]
    for name in [name for name in report["after"] if name.startswith("ultralytics.utils.patches._")]:
        del report["after"][name]  # functions of other packages: a second import finds Ultralytics' replacements
    assert {k: (v, plain.get(k)) for k, v in report["after"].items() if plain.get(k) != v} == {}
    assert {name for name in plain if not name.startswith("ultralytics.utils.patches._")} == report["after"].keys()
    assert report.get("changed", []) == []
    if not re.search("reload|forget", order):
        assert ("changed" in report) == (order.split("import")[0].split()[-1:] in ([], ["uninstall"]))


def child_installed_after(name: str) -> list[bool]:
    """What `installed` says after a reload that the hooks did not see, and after `install`."""
    from yolo_sophia import autoload

    autoload.install()
    import_targets()
    said = [autoload.installed()]
    hooks = list(sys.meta_path)
    sys.meta_path[:] = [finder for finder in hooks if finder is not autoload._PostImportFinder]
    importlib.reload(sys.modules[name])
    sys.meta_path[:] = hooks
    said.append(autoload.installed())
    autoload.install()
    return [*said, autoload.installed()]


@pytest.mark.parametrize("name", MODULES)
def test_installed_is_true_of_the_modules_that_are_there(name, fresh):
    assert fresh(child_installed_after, name) == [True, False, True]


def child_train_after_a_second_import(run: dict[str, Any]) -> str:
    """Train, import Ultralytics again, and train."""
    import torch

    from yolo_sophia import autoload

    autoload.install()
    for name in ("first", "second"):
        from ultralytics import YOLO

        YOLO(run["model"]).train(**{**run, "name": name, "optimizer": "SophiaG"})
        for module in [module for module in sys.modules if module.partition(".")[0] == "ultralytics"]:
            del sys.modules[module]
    paths = [Path(run["project"], name, "weights", "last.pt") for name in ("first", "second")]
    first, second = (torch.load(path, weights_only=False)["train_args"] for path in paths)
    return (
        "" if {**first, "name": "", "save_dir": ""} == {**second, "name": "", "save_dir": ""} else f"{first} {second}"
    )


def test_training_goes_on_after_a_second_import(fresh, tiny_run):
    assert fresh(child_train_after_a_second_import, {**tiny_run, "epochs": 1}) == ""


def test_the_watch_sees_our_patches(fresh, plain):
    """`looks` and `everything` would notice what they are there to notice."""
    seen = fresh(child_differences, plain)
    assert {
        "DEFAULT_CFG",
        *(symbol.place for symbol in CONTRACT if symbol.use in {"extended", "patched"}),
    } - {"ultralytics.utils.DEFAULT_CFG"} <= set(seen)
    assert "ultralytics.utils.torch_utils.convert_optimizer_state_dict_to_fp16" not in seen


def child_differences(plain: dict[str, str]) -> list[str]:
    autoload_now()
    utils = import_targets()[0]
    now = {name: looks(value) for name, value in everything().items()} | {"DEFAULT_CFG": looks(vars(utils.DEFAULT_CFG))}
    return [name for name in plain if now.get(name) != plain[name]]


def child_found_before_loaded_after() -> bool:
    """Uninstall between the two halves of an import, as with lazy loaders."""
    from yolo_sophia import autoload

    autoload_now()
    spec = importlib.util.find_spec("ultralytics.engine.tuner")
    autoload.uninstall()
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return hasattr(module.Tuner.__init__, "__wrapped__")


def test_a_module_found_before_and_loaded_after_uninstall_is_left_alone(fresh):
    assert not fresh(child_found_before_loaded_after)


def child_keys_of_ultralytics() -> list[Any]:
    """An Ultralytics that has a key by one of our names."""
    from yolo_sophia import autoload

    utils = import_targets()[0]
    utils.DEFAULT_CFG_DICT["rho"] = 7.0
    autoload.install()
    between = utils.DEFAULT_CFG_DICT["rho"]
    autoload.uninstall()
    return [between, utils.DEFAULT_CFG_DICT.get("rho"), "beta2" in utils.DEFAULT_CFG_DICT]


def test_a_key_that_ultralytics_has_stays_its_own(fresh):
    assert fresh(child_keys_of_ultralytics) == [7.0, 7.0, False]


# Child processes ------------------------------------------------------------------------------------------------------

SAY = "import sys, yolo_sophia; open(sys.argv[1], 'a').write(f'{yolo_sophia.installed()}\\n')"


def child_of_several_gpus(run: dict[str, Any], install: bool, said: str) -> list[Any]:
    """What a process says that Ultralytics starts as the launcher of a multi-GPU run; and our variables afterwards."""
    from ultralytics.models.yolo.detect import DetectionTrainer

    from yolo_sophia import autoload

    if install:
        autoload.install()
    module = import_targets()[2]
    before = {name: os.environ.get(name) for name in ("PYTHONPATH", switch.SWITCH)}
    for optimizer in ("SophiaG", "torch.optim.Adagrad", "AdamW") if install else ("AdamW",):
        trainer = DetectionTrainer(overrides={**run, "name": optimizer, "optimizer": optimizer})
        trainer.args.device, trainer.world_size, trainer.ddp = "0,1", 2, True
        module.generate_ddp_command = lambda *_: ([sys.executable, "-c", SAY, said], "none")
        module.ddp_cleanup = lambda *_: None
        trainer.train()
    after = {name: os.environ.get(name) for name in before}
    return [Path(said).read_text().split(), before == after]


@pytest.mark.parametrize(("install", "expected"), [(True, ["True", "True", "False"]), (False, ["False"])])
def test_workers_of_several_gpus_know_us_after_install(install, expected, fresh, tiny_run, tmp_path):
    """YOLO_SOPHIA_AUTOLOAD is 0: a child has the hooks only where this process was patched and its run needs them."""
    assert fresh(child_of_several_gpus, tiny_run, install, str(tmp_path / "said.txt")) == [expected, True]


TUNE = """
import json, sys
import yolo_sophia
yolo_sophia.install()
from ultralytics import YOLO
arguments = json.loads(sys.argv[1])
YOLO(arguments.pop("model")).tune(**arguments, iterations=1, space={"lr0": (0.001, 0.002)})
"""


def test_children_of_tune_know_us_after_install(tiny_run, tmp_path, python):
    run = {**tiny_run, "epochs": 1, "optimizer": "SophiaG", "rho": 0.5, "exist_ok": True, "val": True}
    path = os.pathsep.join(filter(None, [str(YOLO.parent), os.environ.get("PATH")]))
    done = python("-c", TUNE, json.dumps(run), cwd=tmp_path, YOLO_SOPHIA_AUTOLOAD="0", PATH=path)
    assert "not a valid YOLO argument" not in done.stdout + done.stderr
    assert "training failure" not in done.stdout + done.stderr
    assert list(tmp_path.rglob("best_hyperparameters.yaml"))


@pytest.mark.parametrize("own", ["", "print('mine')", "raise ImportError('mine', name='other')"])
def test_the_sitecustomize_of_the_user_is_run_too(own, python, tmp_path):
    """Without site-packages: the package is found from the place of the file alone."""
    from yolo_sophia.integration.children import BOOTSTRAP

    if own:
        (tmp_path / "sitecustomize.py").write_text(own)
    code = (
        f"import sys; path = list(sys.path); sys.path[:0] = [{BOOTSTRAP!r}, {str(tmp_path)!r}]\n"
        "try:\n    import sitecustomize\nexcept ImportError as error:\n    print(error)\n"
        f"print([f.__name__ for f in sys.meta_path].count('_PostImportFinder'), {BOOTSTRAP!r} in sys.path)"
    )
    said = python("-S", "-I", "-c", code).stdout.splitlines()
    assert said[-1] == "1 False"
    assert ("mine" in said) == bool(own)


def test_children_need_no_help_where_the_line_is_active(monkeypatch):
    from yolo_sophia.integration import children

    monkeypatch.setattr(switch, "started_at_start", True)
    monkeypatch.delenv(switch.SWITCH, raising=False)
    assert not children.needed()
    path = os.environ.get("PYTHONPATH")
    with children.children_know_us():
        assert os.environ.get("PYTHONPATH") == path
    monkeypatch.setenv(switch.SWITCH, "0")
    assert children.needed()
    with children.children_know_us(), children.children_know_us():
        assert os.environ["PYTHONPATH"].split(os.pathsep)[0] == children.BOOTSTRAP
    assert os.environ.get("PYTHONPATH") == path and os.environ[switch.SWITCH] == "0"


@pytest.mark.parametrize("has_hooks", [True, False])
def test_a_running_ray_whose_workers_do_not_know_us_is_an_error(has_hooks, monkeypatch):
    from yolo_sophia.integration import children

    class Ray:
        is_initialized = staticmethod(lambda: True)
        get = staticmethod(lambda value: value)

        @staticmethod
        def remote(function):
            return types.SimpleNamespace(remote=lambda: has_hooks)

    monkeypatch.setitem(sys.modules, "ray", Ray)
    monkeypatch.setattr(children, "needed", lambda: True)
    if has_hooks:
        children.require_ray_workers()
    else:
        with pytest.raises(RuntimeError, match=r"Ray is running already, .* call ray\.shutdown\(\) before"):
            children.require_ray_workers()


# Arguments that Ultralytics has itself --------------------------------------------------------------------------------


def child_taken_keys(run: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """An Ultralytics with arguments by our names: what its own runs and ours make of them."""
    from yolo_sophia import autoload

    utils, cfg, *_ = import_targets()
    utils.DEFAULT_CFG_DICT.update(keys)
    vars(utils.DEFAULT_CFG).update(keys)
    kinds = {name: getattr(cfg, name) for name in ("CFG_FRACTION_KEYS", "CFG_INT_KEYS", "CFG_BOOL_KEYS")}
    autoload.install()
    report: dict[str, Any] = {
        "kinds": sorted(key for key in keys for name in kinds if key in getattr(cfg, name) and key not in kinds[name])
    }
    from ultralytics.models.yolo.detect import DetectionTrainer

    values = {key: "theirs" for key in keys}
    for name in ("AdamW", "SophiaG", "torch.optim.Adagrad"):
        try:
            trainer = DetectionTrainer(overrides={**run, **values, "name": name, "optimizer": name})
            report[name] = {key: vars(trainer.args).get(key) for key in [*keys, "hessian_interval"]}
            report[name]["args.yaml"] = (Path(trainer.save_dir) / "args.yaml").read_text()
        except Exception as error:
            report[name] = f"{type(error).__name__}: {error}"
    autoload.uninstall()
    report["left"] = {key: utils.DEFAULT_CFG_DICT.get(key) for key in [*keys, "hessian_interval"]}
    return report


@pytest.mark.parametrize(
    "keys",
    [{"cautious": "a", "beta2": 3}, {"rho": None, "bn_momentum": "x"}, {"fit_head": True, "lr_factors": None}],
    ids=lambda keys: " ".join(keys),
)
def test_an_argument_of_ultralytics_own_is_left_alone(keys, fresh, tiny_run):
    report = fresh(child_taken_keys, tiny_run, keys)
    assert report["kinds"] == []
    assert {key: report["AdamW"][key] for key in keys} == dict.fromkeys(keys, "theirs")
    assert all(f"{key}: theirs" in report["AdamW"]["args.yaml"] for key in keys)
    assert report["AdamW"]["hessian_interval"] is None
    message = f"it has arguments of its own with the names of ours: {', '.join(sorted(keys))}. Install a supported"
    assert report["SophiaG"].startswith("RuntimeError: ") and message in report["SophiaG"]
    if shared := sorted({"bn_momentum", "fit_head", "lr_factors"} & keys.keys()):
        assert f"names of ours: {', '.join(shared)}. " in report["torch.optim.Adagrad"]
    else:
        assert report["torch.optim.Adagrad"]["cautious"] == "theirs"
    assert report["left"] == {**keys, "hessian_interval": None}


# Versions and symbols that do not fit ---------------------------------------------------------------------------------


def version_9() -> None:
    import ultralytics

    ultralytics.__version__ = "9.1.0"


def renamed_parameter() -> None:
    trainer = import_targets()[2].BaseTrainer
    original = trainer.build_optimizer
    trainer.build_optimizer = lambda self, **settings: original(self, **settings)


def renamed_check() -> None:
    trainer = import_targets()[2].BaseTrainer
    original = trainer.check_resume
    trainer.check_resume = lambda self, asked: original(self, asked)


def gone_function() -> None:
    trainer = import_targets()[2]
    trainer.halve = trainer.convert_optimizer_state_dict_to_fp16
    del trainer.convert_optimizer_state_dict_to_fp16


def gone_default() -> None:
    import ultralytics.models.yolo.detect  # noqa: F401 - has its own reference, as all that is imported before

    utils = import_targets()[0]
    del utils.DEFAULT_CFG


def gone_tuner() -> None:
    tuner = import_targets()[3]
    del tuner.Tuner


def child_misfit(change: Any, run: dict[str, Any], train: bool) -> dict[str, Any]:
    """Change Ultralytics, set the hooks, and ask for SophiaG and AdamW."""
    from yolo_sophia import autoload

    report: dict[str, Any] = {}
    change()
    autoload_now()  # nothing may be raised by this, nor by an import under it
    utils, cfg, *_ = import_targets()
    try:
        autoload.install()
    except RuntimeError as error:
        report["install"] = str(error)
    from ultralytics.models.yolo.detect import DetectionTrainer

    project = Path(run["project"])
    for name in ("SophiaG", "AdamW"):
        try:
            trainer = DetectionTrainer(cfg.DEFAULT_CFG_DICT, {**run, "name": name, "optimizer": name})
            if train or name == "SophiaG":
                trainer.train()
        except Exception as error:
            report[name] = f"{type(error).__name__}: {error}"
        else:
            report[name] = (project / name / "args.yaml").read_text()
    report["directory"] = (project / "SophiaG").exists()
    autoload.uninstall()
    report["left"] = [key for key in ("rho", "sophia") if key in utils.DEFAULT_CFG_DICT]
    return report


MISFITS = {  # what is changed -> what the message names, and whether plain Ultralytics can train like that
    version_9: ("version 9.1.0 is not in the supported range ultralytics>=8.3,<9", True),
    renamed_parameter: (
        "ultralytics.engine.trainer.BaseTrainer.build_optimizer takes ('self', 'settings'), expected",
        True,
    ),
    renamed_check: ("ultralytics.engine.trainer.BaseTrainer.check_resume takes ('self', 'asked')", True),
    gone_function: ("ultralytics.engine.trainer.convert_optimizer_state_dict_to_fp16 is gone", False),
    gone_default: ("ultralytics.utils: module 'ultralytics.utils' has no attribute 'DEFAULT_CFG'", False),
    gone_tuner: ("ultralytics.engine.tuner: module 'ultralytics.engine.tuner' has no attribute 'Tuner'", False),
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda change: change.__name__)
def test_what_does_not_fit_is_an_error_for_those_who_ask(change, tiny_run, fresh):
    names, trains = MISFITS[change]
    report = fresh(child_misfit, change, {**tiny_run, "epochs": 1}, trains)
    for message in (report["install"], report["SophiaG"]):
        assert names in message
        assert "does not fit the installed ultralytics" in message
        assert "pip install 'ultralytics>=8.3,<9'" in message
    assert report["SophiaG"].startswith("RuntimeError: ")
    # Arguments are judged in check_resume; where that was moved, the last place to refuse is build_optimizer.
    assert report["directory"] == (change is renamed_check)
    assert "optimizer: AdamW" in report["AdamW"]
    assert "rho" not in report["AdamW"]
    assert report["left"] == []
