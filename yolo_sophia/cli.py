"""The `yolo-sophia` command. An error of its user is one line on the error stream and exit code 2."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, NoReturn

from yolo_sophia import __version__, autoload


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        The exit code: 0, 1 where `status` or `doctor --strict` found a problem, 2 for wrong usage.
    """
    parser = _Parser(prog="yolo-sophia", description="Sophia for Ultralytics YOLO: yolo train ... optimizer=SophiaG")
    parser.add_argument("--version", action="version", version=f"yolo-sophia {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND")

    def add(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text)
        command.set_defaults(run=run)
        return command

    found = add("status", lambda a: status(a.check), "print versions, whether the hooks are active, and every patch")
    found.add_argument(
        "--check", action="store_true", help="also run tiny trainings with the installed Ultralytics (half a minute)"
    )
    found = add("presets", lambda a: presets(a.preset), "list the presets, or print one with the origin of each number")
    found.add_argument("preset", nargs="?", help="name of a preset or path of a YAML file")
    found = add("path", lambda a: path(a.name), "print the path of a bundled file, or list all")
    found.add_argument("name", nargs="?", help="name of the file, such as data/shapes.yaml")
    commands.add_parser("doctor", help="check data, steps and rates of a training before it begins")
    commands.add_parser("compare", help="compare optimizers on your data")
    commands.add_parser("tune", help="search an optimizer's settings on your data")
    with contextlib.suppress(AttributeError):  # not every stream has it
        sys.stdout.reconfigure(errors="backslashreplace")  # on Windows it may know few characters
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["doctor"]:
        return _guarded(doctor, words[1:])
    if words[:1] in (["compare"], ["tune"]):  # key=value words as in Ultralytics, not argparse's options
        return _guarded(_with_words, words[0], words[1:])
    arguments = parser.parse_args(words)
    if not hasattr(arguments, "run"):
        parser.print_help()
        return 0
    return _guarded(arguments.run, arguments)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others here."""

    def error(self, message: str) -> NoReturn:
        """Print the error and exit."""
        self.exit(2, f"yolo-sophia: {one_line(message)}; see yolo-sophia --help\n")


def _guarded(command: Callable[..., int], *arguments: Any) -> int:
    """Run a command; a user's error is one line on the error stream, without a traceback."""
    try:
        return command(*arguments)
    except (ValueError, TypeError, NotImplementedError, OSError) as error:
        print(f"yolo-sophia: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("yolo-sophia: interrupted; rerun the command to resume", file=sys.stderr)
        return 130


def one_line(error: object, longest: int = 2000) -> str:
    """A message on one line, what cannot be printed escaped, and of a very long one both ends."""
    text = " ".join(str(error).split())
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def _with_words(name: str, words: Sequence[str]) -> int:
    command = import_module(f"yolo_sophia.{name}.command")
    if not words or words[0] in {"help", "-h", "--help"}:
        print(command.help_text())
        return 0
    return command.main(words)


def status(check: bool = False) -> int:
    """Print versions, the state of the autoload and of every patch; 1 where something does not fit.

    With `check`, tiny trainings try the installed Ultralytics as well.
    """
    versions = {name: _version(name) for name in ("ultralytics", "torch")}
    print(f"yolo-sophia {__version__}, Python {sys.version.split()[0]}")
    print("".join(f"{name} {version or 'is not installed'}, " for name, version in versions.items()).rstrip(", "))
    print(f"optimizer SophiaG from {Path(__file__).parent / 'optim' / 'sophia_g.py'}")
    print(f"autoload: {_autoload_state()}")
    if not versions["ultralytics"]:
        return 1
    from yolo_sophia.integration import smoke_test
    from yolo_sophia.integration.status import patch_report
    from yolo_sophia.presets import preset_directory, preset_names

    lines, problems = patch_report()
    print("\n".join(lines))
    for problem in problems:
        print(f"PROBLEM: {problem}")
    print(f"presets: {', '.join(preset_names())} (in {preset_directory()})")
    ready = "ready" if autoload.installed() else "ready after yolo_sophia.install()"
    failed = False
    if check:
        print("check:", flush=True)
        answers = smoke_test.check()
        print(smoke_test.table(answers))
        failed = any(answer.result != "ok" for answer in answers)
    print(f"state: {'optimizer=SophiaG cannot be used' if problems or failed else ready}")
    return 1 if problems or failed else 0


DOCTOR = """\
yolo-sophia doctor data=my.yaml model=yolov8n.pt epochs=50 optimizer=AdamW

  --strict        exit code 1 if any line says `look`
  --json          print the same facts as JSON

Every argument of `yolo train` is accepted. Nothing is trained, downloaded or written."""


def doctor(words: Sequence[str]) -> int:
    """Print the facts about a training that has not begun; 1 under `--strict` where one deserves a look.

    Raises:
        ValueError: As `yolo train` would; or data or model is missing.
    """
    if not words or words[0] in {"help", "-h", "--help"}:
        print(DOCTOR)
        return 0
    switches = {"--strict", "--json"}
    with contextlib.redirect_stdout(sys.stderr):  # Ultralytics' own lines, some of them at its import
        from yolo_sophia.integration.doctor import as_dicts, examine, table
        from yolo_sophia.runs.checks import as_list, check_known, check_values
        from yolo_sophia.runs.words import read

        given = read([word for word in words if word not in switches], ("data",))
        check_known(given.keys() - {"cfg"}, "doctor")
        check_values({key: value for key, value in given.items() if key not in {"cfg", "data"}}, "doctor")
        sets = as_list(given.get("data"))
        found = {str(data): examine({**given, "data": data}) for data in sets}
    if "--json" in words:
        print(json.dumps([{"data": data, "facts": as_dicts(facts)} for data, facts in found.items()], indent=2))
    else:
        shown = (f"{data}\n" * (len(sets) > 1) + table(facts) for data, facts in found.items())
        print("\n\n".join(shown))
    return int("--strict" in words and any(fact.look for facts in found.values() for fact in facts))


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _autoload_state() -> str:
    if os.environ.get("YOLO_SOPHIA_AUTOLOAD", "1") == "0":
        return "off (YOLO_SOPHIA_AUTOLOAD=0)"
    if autoload.installed():
        return "on"
    lines = [path for path in sys.path if (Path(path) / "yolo_sophia_autoload.pth").is_file()]
    if lines:
        return f"not active in this interpreter, although {lines[0]}/yolo_sophia_autoload.pth is there"
    return (
        "no yolo_sophia_autoload.pth in this environment; install the package with pip, or call yolo_sophia.install()"
    )


def presets(name: str | None) -> int:
    """Print one preset with the origin of each number, or one line for each that ships."""
    from yolo_sophia.presets import load_preset, preset_names

    if name is None:
        for preset in map(load_preset, preset_names()):
            print(f"{preset.name:<16} {preset.status:<12} {preset.description}")
        return 0
    preset = load_preset(name)
    print(f"{preset.name} ({preset.status}): {preset.description}")
    for key, value in preset.settings.items():
        print(f"  {key + '=' + str(value):<28} {preset.origins[key]}")
    return 0


def path(name: str | None) -> int:
    """Print the path of a shipped data set, plan or preset, or the names of all.

    Raises:
        ValueError: There is no such file.
    """
    from yolo_sophia.options import suggestion
    from yolo_sophia.presets import preset_directory

    root = preset_directory().parent
    files = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*.yaml"))}
    if name is None:
        print("\n".join(files))
    elif name in files:
        print(files[name])
    else:
        raise ValueError(f"{name!r} does not ship with the package.{suggestion(name, files)} What does: {list(files)}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
